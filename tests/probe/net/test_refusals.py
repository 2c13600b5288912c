"""Bad input to --net: what is refused is named, and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.netns import ip
from tests.probe.net.rig import guest
from tests.vmm import PROGRAM, Vmm, environment, probe, run_remote

pytestmark = pytest.mark.probe


@pytest.fixture
def refused(tmp_path):
    """Start with `--net …`, which is to fail; its complaint must have the words, and nothing may be left."""

    def check(net, *words, pass_fds=()):
        before = ip("-brief", "link")
        command = [sys.executable, "-c", PROGRAM, "--kernel", probe(), "--serial", "null", "--console", "off"]
        done = subprocess.run(
            [*command, "--memory", "size=128M", "--net", *net], capture_output=True, text=True, timeout=30,
            env=environment(), stdin=subprocess.DEVNULL, check=False, pass_fds=pass_fds,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        for word in words:
            assert word in done.stderr, f"no {word!r} in {done.stderr}"
        assert ip("-brief", "link") == before

    return check


def test_taken_tap(tmp_path, refused):
    with guest(tmp_path, net=["tap=mine"]) as vmm:
        vmm.expect("net open")
        refused(["tap=mine"], "--net tap=mine", "another process has this TAP open")
        refused(["tap=new", "tap=mine"], "--net tap=mine")


def test_taken_mac(refused):
    refused(["mac=2e:00:00:00:00:01", "mac=2e:00:00:00:00:01"], "net[1]: mac 2e:00:00:00:00:01 is taken")


def test_bad_mask(refused):
    refused(["ip=10.0.0.1,mask=255.0.255.0"], "mask 255.0.255.0 is no network mask")


def test_missing_bridge(refused):
    refused(["bridge=br0"], "Error parsing --net bridge=br0", "Unknown option: bridge", "tap")


def test_bridge_in_place_of_a_tap(refused):
    ip("link", "add", "br0", "type", "bridge")
    refused(["tap=br0"], "--net tap=br0", "no TAP", "bridge")


def test_tap_name_that_is_too_long(refused):
    refused(["tap=sixteen-bytes-xx"], "sixteen-bytes-xx", "at most 15")


def test_descriptor_that_is_no_tap(refused):
    fd = os.open("/dev/null", os.O_RDWR)
    refused([f"fd={fd}"], f"--net fd={fd}", "no TAP", pass_fds=(fd,))
    os.close(fd)


def test_descriptor_that_is_not_open(refused):
    refused(["fd=77"], "--net fd=77", "not open")


@pytest.mark.parametrize("mtu", [0, 1279, 65522, 1 << 20])
def test_mtu_out_of_range(refused, mtu):
    refused([f"mtu={mtu}"], f"mtu is {mtu}", "1280 to 65521")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_odd_queue_count(refused, count):
    refused([f"num_queues={count}"], f"num_queues is {count}")


def test_queue_size_that_is_no_power_of_two(refused):
    refused(["queue_size=100"], "queue_size is 100", "power of two")


def test_tap_and_descriptor_at_once(refused):
    refused(["tap=mine,fd=7"], "tap and fd at once")


def test_taken_tap_at_vm_boot_leaves_the_vmm_ready_for_another(tmp_path):
    with guest(tmp_path, net=["tap=mine"], name="one") as one, Vmm(tmp_path, name="two") as two:
        one.expect("net open")
        two.wait_api()
        body = {
            "payload": {"kernel": probe(), "cmdline": "mode=net"}, "memory": {"size": 128 << 20},
            "console": {"mode": "Off"}, "net": [{"tap": "mine"}],
        }  # fmt: skip
        (tmp_path / "vm.json").write_text(json.dumps(body))
        two.ask("create", str(tmp_path / "vm.json"))
        done = run_remote("--api-socket", str(two.api), "boot")
        assert done.returncode == 1 and "another process has this TAP open" in done.stderr
        one.__exit__()
        two.ask("boot")
