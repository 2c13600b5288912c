"""Kills, and what the guest sees of them: a packet twice on the wire or one less in its rings, never a broken ring."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shared import virtio_net
from shared.native_ring import Step
from tests.net_worker.driver import SLOT_BYTES, RxDriver, TxDriver
from tests.network import Network, frame, number_of
from tests.ring_driver import memory_for
from tests.vhost_frontend import Frontend, connect

SIZE = 16
KILLED = 137
REACHED = [Step.POPPED, Step.MARKED, Step.DONE, Step.LINKED, Step.FILLED, Step.PUBLISHED, Step.SETTLED]
steps = pytest.mark.parametrize("step", REACHED, ids=lambda step: step.name.lower())


class Bench:
    """Drivers, their memory and a TAP, which outlive the victims."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.memory = memory_for(2, SIZE, slot_bytes=SLOT_BYTES)
        self.rx = RxDriver(self.memory, SIZE, 0, indirect=True, slot_bytes=SLOT_BYTES)
        self.tx = TxDriver(self.memory, SIZE, 1, indirect=True, slot_bytes=SLOT_BYTES)
        self.wire = network.wire()

    def victim(self, step: int = 0, nth: int = 0) -> subprocess.Popen[str]:
        queues = [
            {"index": d.index, "desc": d.desc, "avail": d.avail, "used": d.used, "kick_fd": d.kick_fd,
             "call_fd": d.call_fd} for d in (self.rx, self.tx)
        ]  # fmt: skip
        tap = os.dup(self.network.fds[0])
        fds = (tap, self.memory.fd, *(d.kick_fd for d in (self.rx, self.tx)), *(d.call_fd for d in (self.rx, self.tx)))
        task = {
            "size": SIZE, "ram_size": self.memory.size, "ram_fd": self.memory.fd, "tap_fd": tap, "step": step,
            "nth": nth, "queues": queues, "features": virtio_net.F_EVENT_IDX | virtio_net.F_INDIRECT_DESC,
        }  # fmt: skip
        victim = subprocess.Popen(
            [sys.executable, "-m", "tests.net_worker.victim", json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds,
        )  # fmt: skip
        os.close(tap)
        return victim

    def close(self) -> None:
        self.wire.close()
        self.rx.close()
        self.tx.close()
        self.memory.close()


@pytest.fixture
def bench(network: Network) -> Iterator[Bench]:
    bench = Bench(network)
    yield bench
    bench.close()


def finish(victim: subprocess.Popen[str]) -> None:
    """Let it stop in good order."""
    victim.communicate("", timeout=30)
    assert victim.returncode == 0


def until_dead(victim: subprocess.Popen[str], drive: RxDriver | TxDriver, turn: Callable[[], None]) -> None:
    """Take turns, each to its completion, so that the n-th occurrence of a step comes; until it has come."""
    ended = os.pidfd_open(victim.pid)
    for _ in range(SIZE + 2):
        turn()
        drive.arm()
        if drive.used_seen == drive.used_idx():
            select.select([drive.call_fd, ended], [], [], 20)
        with suppress(BlockingIOError):
            os.eventfd_read(drive.call_fd)
        if select.select([ended], [], [], 0)[0]:
            break
    os.close(ended)
    assert victim.wait(30) == KILLED
    victim.communicate()


@steps
def test_kill_at_every_step_of_sending_loses_no_packet(bench: Bench, step: Step) -> None:
    sent = 0

    def send() -> None:
        nonlocal sent
        bench.tx.reap()
        for _ in range(2 if len(bench.tx.free) > 1 else 0):
            bench.tx.put(frame(sent))
            sent += 1
        bench.tx.kick()

    for nth in (1, 7):
        until_dead(bench.victim(step, nth), bench.tx, send)
    send()
    successor = bench.victim()
    bench.tx.drain()
    finish(successor)
    seen: list[int] = []
    while not bench.wire.silent():
        seen.append(number_of(bench.wire.receive()))
    assert sorted(set(seen)) == list(range(sent)), "a packet was lost"
    assert len(seen) <= sent + 2 * SIZE
    backwards = [n for n in range(1, len(seen)) if seen[n] <= seen[n - 1]]
    assert len(backwards) <= 2, "only a successor sends again"


@steps
def test_kill_at_every_step_of_receiving_loses_a_batch_at_most(bench: Bench, step: Step) -> None:
    sent = 0
    got: list[int] = []

    def receive() -> None:
        nonlocal sent
        got.extend(number_of(packet.frame) for packet in bench.rx.packets())
        bench.rx.post_all(2048)
        bench.rx.kick()
        bench.wire.send(frame(sent, to_guest=True))
        sent += 1

    for nth in (1, 7):
        until_dead(bench.victim(step, nth), bench.rx, receive)
    successor = bench.victim()
    receive()
    while not got or got[-1] != sent - 1:
        got += [number_of(packet.frame) for packet in bench.rx.wait(1)]
        bench.rx.post_all(2048)
        bench.rx.kick()
    finish(successor)
    assert got == sorted(set(got)), "a packet came twice"
    assert sent - len(got) <= 2 * SIZE


def test_notification_lost_with_the_dead_is_made_up_for(bench: Bench) -> None:
    """Killed between index and interrupt; the guest waits for an interrupt and submits nothing new."""
    victim = bench.victim(Step.SETTLED, 1)
    assert select.select([bench.tx.call_fd], [], [], 20)[0]  # every start signals, for the predecessor's sake
    os.eventfd_read(bench.tx.call_fd)
    bench.tx.put(frame(1))
    bench.tx.kick()
    assert victim.wait(30) == KILLED
    victim.communicate()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bench.tx.call_fd)
    successor = bench.victim()
    assert select.select([bench.tx.call_fd], [], [], 20)[0]
    assert bench.tx.reap() == 1
    finish(successor)


# The real program, killed at random ------------------------------------------------------------------------------


def spawn(network: Network, path: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "net_worker", "--socket-path", str(path), "--tap", network.NAME, *options]
    with network.inside():
        return subprocess.Popen(command)


def test_kill_9_under_traffic_both_ways(runtime_folder: Path) -> None:
    network = Network(opened=False)
    path = runtime_folder / "net.sock"
    memory = memory_for(2, SIZE, slot_bytes=SLOT_BYTES)
    rx = RxDriver(memory, SIZE, 0, indirect=True, slot_bytes=SLOT_BYTES)
    tx = TxDriver(memory, SIZE, 1, indirect=True, slot_bytes=SLOT_BYTES)
    chance, wire = random.Random(4), network.wire()
    inflight: bytes | None = None
    inflight_fd, sent, to_guest = -1, 0, 0
    seen: set[int] = set()
    got: list[int] = []
    for life in range(6):
        program = spawn(network, path)
        frontend = Frontend(connect(path), memory, [rx, tx], inflight, inflight_fd)
        inflight, inflight_fd = frontend.inflight, frontend.inflight_fd
        frontend.start(rx, rx.used_idx())
        frontend.start(tx, tx.used_idx())
        target = sent + chance.randrange(50, 300)
        while sent < target:
            if rx.free:
                rx.post_all(2048)
                rx.kick()
            tx.drain()
            for _ in range(chance.randrange(1, SIZE)):
                tx.put(frame(sent))
                sent += 1
            tx.kick()
            wire.send(frame(to_guest, to_guest=True))
            to_guest += 1
            got += [number_of(packet.frame) for packet in rx.packets()]
            while not wire.silent():
                seen.add(number_of(wire.receive()))
        if life < 5:
            program.send_signal(signal.SIGKILL)
            program.wait()
            frontend.close(keep_inflight=True)
            os.unlink(path)
    tx.drain()
    while len(seen) < sent:
        seen.add(number_of(wire.receive()))
    assert seen == set(range(sent))
    assert got == sorted(set(got)) and len(got) > 20
    assert frontend.stop(tx) == tx.used_idx() and frontend.stop(rx) == rx.used_idx()
    frontend.close()
    program.terminate()
    assert program.wait(20) == 0
    assert not path.exists()
    for driver in (rx, tx):
        driver.close()
    memory.close()
    wire.close()
    network.close()
