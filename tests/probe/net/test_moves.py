"""Cards that move with their guest to another VMM of this host, whatever becomes of their workers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.netpeer import Flow, ping
from tests.probe.net.rig import GUEST, HOST, guest, inherited_tap, link
from tests.probe.test_migration import hop
from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe

RARP = 0x8035


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
    words, net = "mode=net pairs=2 lost_irq_ticks=100", [f"ip={HOST},num_queues=4"]
    with guest(tmp_path, words, "--cpus", "boot=2", net=net, name="hop0") as first:
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
                poll(lambda: killer.kills > 5)
                killer.stop()
                flow.goes_on()
        finally:
            killer.stop()
            for vmm in vmms:
                vmm.__exit__()
        assert b"BAD" not in output + vmms[0].output
