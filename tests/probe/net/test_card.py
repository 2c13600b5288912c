"""A guest on the network by a card of ours: traffic, interfaces, kills and pauses."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket

import pytest

from tests.netns import ip
from tests.netpeer import DISCARD, ECHO, Echo, Flow, Sink, ping
from tests.probe.net.rig import GUEST, HOST, guest, inherited_tap, link
from tests.vmm import Vmm, poll, probe

pytestmark = pytest.mark.probe


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
    with guest(tmp_path, f"mode=net report_ms=50 {words}", "--cpus", "boot=2", net=[f"ip={HOST}{net}"]) as vmm:
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
    words = f"mode=netload wait=1 lost_ticks=600 bytes=100 passes=50 peer={HOST} off"
    with Sink(ECHO) as sink, guest(tmp_path, words) as vmm:
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


@pytest.mark.parametrize("words", ["mode=net lost_irq_ticks=100", "mode=net pairs=2 lost_irq_ticks=100"])
def test_killed_net_worker_comes_back_and_the_flow_goes_on(tmp_path, words):
    choice = random.Random(1)
    with guest(tmp_path, words, "--cpus", "boot=2", net=[f"ip={HOST},num_queues=4"]) as vmm:
        ping(GUEST)
        vmm.wait_api()
        index = socket.if_nametoindex("vmtap0")
        with Flow(GUEST) as flow:
            for _ in range(6):
                pid = vmm.pid_of("_net0")
                flow.goes_on(choice.randrange(1, 50))
                os.kill(pid, signal.SIGKILL)
                flow.goes_on()
        assert vmm.fleet()["_net0"]["restarts"] == 6
        assert socket.if_nametoindex("vmtap0") == index
        assert b"BAD" not in vmm.output


def serves(vmm, restarts):
    """Whether the worker of that many restarts is up."""
    row = vmm.fleet()["_net0"]
    return row["restarts"] == restarts and row["state"] in ("running", "degraded")


def test_net_worker_killed_while_the_guest_sends(tmp_path):
    with Sink(DISCARD) as sink, guest(tmp_path, f"mode=netload peer={HOST} bytes=200 lost_irq_ticks=100") as vmm:
        vmm.wait_api()
        numbers = []
        for kills in range(6):
            numbers += [sink.take()[0].number for _ in range(100)]
            firsts = list(dict.fromkeys(numbers))  # a killed worker's successor may send again what that one has sent
            assert firsts == sorted(firsts) and (kills or firsts == numbers)
            os.kill(vmm.pid_of("_net0"), signal.SIGKILL)
            poll(lambda kills=kills: serves(vmm, kills + 1))
            sent = vmm.ask("counters")["_net0"]["tx_frames"]
            poll(lambda sent=sent: vmm.ask("counters")["_net0"]["tx_frames"] > sent)
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
