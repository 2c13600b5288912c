"""Network devices of the whole VMM: the probe guest as a host on a TAP, in a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from controller import taps
from tests.netns import ip, network_namespace
from tests.netpeer import DISCARD, ECHO, Echo, Flow, Sink, ping
from tests.probe.test_migration import hop
from tests.vmm import PROGRAM, Vmm, environment, poll, probe, run_remote

pytestmark = pytest.mark.probe

HOST, GUEST = "192.168.249.1", "192.168.249.2"
RARP = 0x8035


@pytest.fixture(autouse=True)
def network():
    with network_namespace():
        yield


def link(name="vmtap0"):
    """What iproute2 says of an interface; None when there is none."""
    done = subprocess.run(["ip", "-json", "address", "show", "dev", name], capture_output=True, check=False)
    return json.loads(done.stdout)[0] if done.returncode == 0 else None


def guest(folder, words="mode=net", *arguments, net=(f"ip={HOST}",), **options):
    return Vmm.guest(folder, words, "--net", *net, *arguments, **options)


def inherited_tap(name):
    """A TAP as a manager would open it for a VMM without privileges."""
    fd = os.open(taps.TUN_DEVICE, os.O_RDWR)
    request = taps.ifreq(ifr_name=name.encode())
    request.ifru_flags = taps.IFF_TAP | taps.IFF_NO_PI | taps.IFF_VNET_HDR
    fcntl.ioctl(fd, taps.TUNSETIFF, request)
    ip("address", "add", f"{HOST}/24", "dev", name)
    ip("link", "set", name, "up")
    return fd


# A host on the network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "net"),
    [
        ("", ""),
        ("csum=0 event_idx=0", ""),
        ("", ",offload_csum=off"),
        ("", ",mtu=9000,queue_size=64"),
        ("pairs=2", ",num_queues=4"),
        ("poll=1", ",mac=12:34:56:78:90:ab,host_mac=2e:00:00:00:00:01"),
    ],
)
def test_pings_and_echoes_are_answered(tmp_path, words, net):
    with guest(tmp_path, f"mode=net report_ms=0 {words}", "--cpus", "boot=2", net=[f"ip={HOST}{net}"]) as vmm:
        ping(GUEST)
        with Echo(GUEST) as echo:
            echo.until_answered(100)
        vmm.expect(r"net ok \d+ .* verified=1\d\d")
        opened = vmm.expect(r"net open slot=1 mac=(\w+) mtu=(\d+) features=0x(\w+) pairs=(\d) size=(\d+) link=1")
        assert int(opened[2]) == (9000 if "mtu" in net else 1500)
        assert b"BAD" not in vmm.output
        if "mac" in net:
            assert opened[1] == b"1234567890ab" and link()["address"] == "2e:00:00:00:00:01"


@pytest.mark.parametrize("words", ["", "csum=0 bytes=64", "bytes=40000 tx_bytes=64k", "pairs=2"])
def test_what_the_guest_sends_arrives_whole(tmp_path, words):
    with Sink(DISCARD) as sink, guest(
        tmp_path, f"mode=netload peer={HOST} {words}", "--cpus", "boot=2", net=[f"ip={HOST},num_queues=4"]
    ) as vmm:  # fmt: skip
        numbers = [sink.take()[0].number for _ in range(500)]
        assert len(set(numbers)) == 500
        vmm.expect("net load ")
        assert b"BAD" not in vmm.output


def test_round_trips_are_answered_and_counted(tmp_path):
    with Sink(ECHO) as sink, guest(tmp_path, f"mode=netload wait=1 bytes=100 passes=50 peer={HOST} off") as vmm:
        for _ in range(50):
            sink.take(echo=True)
        assert vmm.wait() == 0
        assert b"net load 50 bytes=5000 answered=50 lost=0" in vmm.output


def test_three_disks_and_a_card_make_it_slot_four(tmp_path):
    """ens4 of the migration document; features and configuration are Cloud Hypervisor's."""
    disks = []
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(1 << 20))
        disks.append(f"path={tmp_path / name}")
    net = [f"ip={HOST},mac=12:34:56:78:90:ab"]
    with guest(tmp_path, "mode=pci off", "--disk", *disks, net=net) as vmm:
        assert vmm.wait() == 0
        assert re.search(rb"pci 00:04.0 id=1af4:1041 rev=01 code=020000", vmm.output)
        line = re.search(rb"virtio 00:04.0 type=1 .*", vmm.output)[0]
        assert b" features=0x120637faf " in line and b" vectors=4 queues=256,256,256 " in line
        assert b"config=1234567890ab00000100dc050000000000" in line


def test_info_counters_and_fleet_name_the_card(tmp_path):
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        info = vmm.ask("info")
        (net,) = info["config"]["net"]
        assert net["id"] == "_net0" and net["mask"] == "255.255.255.0"
        assert re.fullmatch("2e(:[0-9a-f]{2}){5}", net["mac"])
        assert info["device_tree"]["_virtio-pci-_net0"]["pci_bdf"] == "0000:00:01.0"
        counters = vmm.ask("counters")["_net0"]
        assert counters["rx_frames"] > 0 and counters["tx_frames"] > 0
        assert vmm.fleet()["_net0"]["kind"] == "net"


# Interfaces ---------------------------------------------------------------------------------------------------------


def test_tap_has_its_address_and_is_gone_afterwards(tmp_path):
    with guest(tmp_path) as vmm:
        vmm.expect("net open")
        (address,) = [a for a in link()["addr_info"] if a["family"] == "inet"]
        assert (address["local"], address["prefixlen"]) == (HOST, 24)
    assert link() is None


def test_killed_controller_leaves_no_interface(tmp_path):
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.process.kill()
        vmm.process.wait()
        poll(lambda: link() is None)


def test_users_tap_stays(tmp_path):
    ip("tuntap", "add", "mine", "mode", "tap")
    with guest(tmp_path, net=[f"tap=mine,ip={HOST}"]) as vmm:
        vmm.expect("net open")
        ping(GUEST)
    assert link("mine") is not None


def test_inherited_descriptor(tmp_path):
    fd = inherited_tap("given")
    with guest(tmp_path, net=[f"fd={fd}"], pass_fds=(fd,)) as vmm:
        os.close(fd)
        ping(GUEST)
        vmm.wait_api()
        vmm.ask("reboot")
        ping(GUEST)
        vmm.process.kill()
        vmm.process.wait()
        poll(lambda: link("given") is None)


def test_reboot_makes_the_interface_anew(tmp_path):
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        mac = vmm.ask("info")["config"]["net"][0]["mac"]
        vmm.ask("reboot")
        ping(GUEST)
        assert vmm.ask("info")["config"]["net"][0]["mac"] == mac


def test_vm_create_with_a_card(tmp_path):
    with Vmm(tmp_path) as vmm:
        vmm.wait_api()
        body = {
            "payload": {"kernel": probe(), "cmdline": "mode=net"}, "memory": {"size": 128 << 20},
            "serial": {"mode": "Tty"}, "console": {"mode": "Off"}, "net": [{"ip": HOST, "mask": "255.255.255.0"}],
        }  # fmt: skip
        (tmp_path / "vm.json").write_text(json.dumps(body))
        vmm.ask("create", str(tmp_path / "vm.json"))
        assert link() is None
        vmm.ask("boot")
        ping(GUEST)
        vmm.ask("delete")
        assert link() is None


# Kills and pauses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["mode=net", "mode=net pairs=2"])
def test_killed_net_worker_comes_back_and_the_flow_goes_on(tmp_path, words):
    choice = random.Random(1)
    with guest(tmp_path, words, "--cpus", "boot=2", net=[f"ip={HOST},num_queues=4"]) as vmm:
        ping(GUEST)
        vmm.wait_api()
        index = socket.if_nametoindex("vmtap0")
        with Flow(GUEST) as flow:
            for _ in range(6):
                pid = poll(lambda: vmm.fleet().get("_net0", {}).get("pid"))
                flow.goes_on(choice.randrange(1, 50))
                os.kill(pid, signal.SIGKILL)
                flow.goes_on()
        assert vmm.fleet()["_net0"]["restarts"] == 6
        assert socket.if_nametoindex("vmtap0") == index
        assert b"BAD" not in vmm.output


def test_net_worker_killed_while_the_guest_sends(tmp_path):
    with Sink(DISCARD) as sink, guest(tmp_path, f"mode=netload peer={HOST} bytes=200") as vmm:
        vmm.wait_api()
        for kills in range(6):
            numbers = [sink.take()[0].number for _ in range(100)]
            assert numbers == sorted(numbers)
            os.kill(vmm.pid_of("_net0"), signal.SIGKILL)
            poll(lambda kills=kills: vmm.fleet().get("_net0", {}).get("restarts") == kills + 1)
            poll(lambda: vmm.ask("counters").get("_net0", {}).get("tx_frames", 0) > 500)
        assert b"BAD" not in vmm.output


def test_pause_stops_the_answers_and_resume_lets_them_go_on(tmp_path):
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        with Flow(GUEST) as flow:
            flow.goes_on()
            vmm.ask("pause")
            before = vmm.ask("counters")["_net0"]
            with Echo(GUEST, stream=2) as echo:
                assert not echo.once()
            after = vmm.ask("counters")["_net0"]
            assert (after["rx_frames"], after["tx_frames"]) == (before["rx_frames"], before["tx_frames"])
            vmm.ask("resume")
            flow.goes_on()
        assert b"BAD" not in vmm.output


# Migration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "net"), [("", ""), ("pairs=2", ",num_queues=4"), ("", ",tap=named")])
def test_local_migration_keeps_interface_and_flow(tmp_path, words, net):
    name = "named" if "tap=" in net else "vmtap0"
    arguments = ["--cpus", "boot=2"]
    with guest(tmp_path, f"mode=net {words}", *arguments, net=[f"ip={HOST}{net}"], name="hop0") as first:
        ping(GUEST)
        first.wait_api()
        index, mac = socket.if_nametoindex(name), link(name)["address"]
        here, opened, output = first, [], b""
        try:
            with Flow(GUEST) as flow, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(RARP)) as wire:
                wire.bind((name, RARP))
                wire.settimeout(20)
                for number in range(1, 3):
                    flow.goes_on()
                    there = Vmm(tmp_path, name=f"hop{number}")
                    opened.append(there)
                    hop(here, there, tmp_path / f"sock{number}")
                    flow.goes_on()
                    assert socket.if_nametoindex(name) == index and link(name)["address"] == mac
                    frame = wire.recv(2000)
                    guests = bytes.fromhex(there.ask("info")["config"]["net"][0]["mac"].replace(":", ""))
                    assert len(frame) == 60 and frame[:6] == b"\xff" * 6 and frame[6:12] == guests
                    there.expect(rf"net ok .* announced={number} ")
                    output += here.output
                    here = there
                here.ask("reboot")
                ping(GUEST)
        finally:
            for vmm in opened:
                vmm.__exit__()
        assert b"BAD" not in output + here.output
    assert link(name) is None


def test_descriptor_that_came_by_migration_serves_a_reboot(tmp_path):
    fd = inherited_tap("given")
    with guest(tmp_path, net=[f"fd={fd}"], pass_fds=(fd,), name="one") as one, Vmm(tmp_path, name="two") as two:
        os.close(fd)
        ping(GUEST)
        one.wait_api()
        hop(one, two, tmp_path / "sock")
        ping(GUEST)
        two.ask("reboot")
        ping(GUEST)
    assert link("given") is None


def test_failed_migration_leaves_the_card_with_the_source(tmp_path):
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        with Flow(GUEST) as flow:
            assert vmm.remote("send-migration", "--local", f"unix:{tmp_path}/nobody").returncode == 1
            flow.goes_on()


def test_net_worker_of_the_destination_killed_right_after_the_hop(tmp_path):
    with guest(tmp_path, name="one") as one, Vmm(tmp_path, name="two") as two:
        ping(GUEST)
        one.wait_api()
        with Flow(GUEST) as flow:
            hop(one, two, tmp_path / "sock")
            os.kill(two.pid_of("_net0"), signal.SIGKILL)
            flow.goes_on()


def children(vmm, name):
    """Pids of a VMM's processes by the beginning of their name; the API would be too slow to ask."""
    found = []
    pid = vmm.process.pid
    with contextlib.suppress(OSError):  # the VMM itself may have ended meanwhile
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().startswith(name):
                    found.append(int(child))
    return found


class Killer(threading.Thread):
    """SIGKILL for the net workers of whichever VMMs there are, every now and then and at whatever step; but of three in
    a row one may live for a while: a worker that is killed for ever before it can serve is another test's."""

    YOUNG_SECONDS, YOUNG_KILLS = 3.0, 2

    def __init__(self, vmms):
        super().__init__()
        self._vmms, self._choice, self._stopping = vmms, random.Random(1), threading.Event()
        self._seen = {}  # when each worker was first seen
        self._young = Counter()  # of each VMM: kills of young workers in a row
        self.kills = 0

    def run(self):
        while not self._stopping.wait(self._choice.random() * 0.3):
            for vmm in list(self._vmms):
                for pid in children(vmm, "net"):
                    self._consider(vmm, pid)

    def _consider(self, vmm, pid):
        young = time.monotonic() - self._seen.setdefault(pid, time.monotonic()) < self.YOUNG_SECONDS
        if self._choice.random() < 0.5 or (young and self._young[vmm] >= self.YOUNG_KILLS):
            return
        self._young[vmm] = self._young[vmm] + 1 if young else 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills += 1

    def stop(self):
        self._stopping.set()
        if self.ident is not None:
            self.join()


def test_net_workers_killed_all_the_time_while_the_guest_moves(tmp_path):
    """Source's and destination's, at whatever step: every hop succeeds, and the flow goes on."""
    with guest(tmp_path, "mode=net pairs=2", "--cpus", "boot=2", net=[f"ip={HOST},num_queues=4"], name="hop0") as first:
        ping(GUEST)
        first.wait_api()
        vmms, output = [first], b""
        killer = Killer(vmms)
        try:
            with Flow(GUEST) as flow:
                killer.start()
                for number in range(1, 4):
                    vmms.append(Vmm(tmp_path, name=f"hop{number}"))
                    hop(vmms[0], vmms[1], tmp_path / f"sock{number}")
                    gone = vmms.pop(0)
                    gone.__exit__()
                    output += gone.output
                    flow.goes_on(3, 60)
                killer.stop()
                flow.goes_on()
        finally:
            killer.stop()
            for vmm in vmms:
                vmm.__exit__()
        assert killer.kills > 5
        assert b"BAD" not in output + vmms[0].output


# A back end that somebody else runs ---------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """Our own worker as a program, which is a stranger to the VMM; started again, if it was ended."""
    ip("tuntap", "add", "theirs", "mode", "tap")
    ip("address", "add", f"{HOST}/24", "dev", "theirs")
    ip("link", "set", "theirs", "up")
    path, running = tmp_path / "net.sock", []

    def start():
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "net_worker", "--socket-path", str(path), "--tap", "theirs"]
        running.append(subprocess.Popen(command, env=environment()))
        poll(path.exists)
        return running[-1]

    start.path = path
    yield start
    for process in running:
        process.kill()
        process.wait()
    path.unlink(missing_ok=True)


def test_foreign_back_end_and_its_successor(tmp_path, foreign):
    first = foreign()
    with guest(tmp_path, net=[f"vhost_user=on,socket={foreign.path},mac=12:34:56:78:90:ab"]) as vmm:
        ping(GUEST)
        assert vmm.expect(r"net open .* mac=(\w+)")[1] == b"1234567890ab"
        with Echo(GUEST) as echo:
            echo.until_answered(20)
            first.kill()
            first.wait()
            foreign()
            echo.until_answered(20)
        assert b"BAD" not in vmm.output


def test_foreign_back_end_that_is_not_there(tmp_path):
    with guest(tmp_path, net=[f"vhost_user=on,socket={tmp_path}/none"]) as vmm:
        assert vmm.wait(60) == 1
        assert f"{tmp_path}/none" in vmm.errors


# Bad input ----------------------------------------------------------------------------------------------------------


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


# add-net ------------------------------------------------------------------------------------------------------------


def test_add_net_before_boot_says_nothing_and_the_guest_has_it(tmp_path):
    with Vmm(tmp_path) as vmm:
        vmm.wait_api()
        body = {
            "payload": {"kernel": probe(), "cmdline": "mode=net"}, "memory": {"size": 128 << 20},
            "serial": {"mode": "Tty"}, "console": {"mode": "Off"},
        }  # fmt: skip
        (tmp_path / "vm.json").write_text(json.dumps(body))
        vmm.ask("create", str(tmp_path / "vm.json"))
        assert vmm.ask("add-net", f"ip={HOST}") is None
        assert link() is None
        vmm.ask("boot")
        ping(GUEST)


def test_add_net_to_a_running_vm_tells_the_place_and_survives_migration_and_reboot(tmp_path):
    """Real guests scan the bus when the GED says so; the probe guest does at its next boot."""
    with guest(tmp_path, name="one") as one, Vmm(tmp_path, name="two") as two:
        ping(GUEST)
        one.wait_api()
        assert one.ask("add-net", "ip=192.168.250.1,id=second,num_queues=2") == {"id": "second", "bdf": "0000:00:03.0"}
        assert one.fleet()["second"]["kind"] == "net" and link("vmtap1")["operstate"] in ("UNKNOWN", "UP")
        bar = one.ask("info")["device_tree"]["_virtio-pci-second"]["resources"][0]["PciBar"]
        assert bar["type_"] == "Mmio64"
        hop(one, two, tmp_path / "sock")
        ping(GUEST)
        assert two.ask("info")["device_tree"]["_virtio-pci-second"]["pci_bdf"] == "0000:00:03.0"
        assert [net["id"] for net in two.ask("info")["config"]["net"]] == ["_net0", "second"]
        two.ask("reboot")
        ping(GUEST)
        assert two.ask("info")["device_tree"]["_virtio-pci-second"]["pci_bdf"] == "0000:00:02.0"
    assert link("vmtap1") is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tap=lo", "this interface is no TAP"),
        ("mtu=5", "mtu is 5"),
        ("id=_net0", "Identifier _net0 is not unique"),
        ("pci_device_id=1", "slot 1 of PCI segment 0 is taken"),
        ("num_queues=4", "at most two for each vCPU"),
        ("iommu=on", "iommu: not available yet"),
        ("fd=5", "fd=5 is not available yet"),
        ("bridge=br0", "Unknown option: bridge"),
        ("vhost_user=on,socket=/nobody/there", "/nobody/there"),
    ],
)
def test_add_net_that_is_refused_changes_nothing(tmp_path, argument, message):
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        before = vmm.ask("info"), ip("-brief", "link"), set(vmm.fleet())
        done = vmm.remote("add-net", argument, timeout=60)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert (vmm.ask("info"), ip("-brief", "link"), set(vmm.fleet())) == before
        ping(GUEST)
