"""The real process: its control plane, a kill -9 in the middle of output, and the resize of its terminal."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import console_worker.__main__ as console_program
from controller.vhost_frontend import Frontend
from shared.chardev import open_host_end
from shared.control import Channel, unlink_endpoint
from shared.memory import GuestMemory
from shared.reactor import Future, Reactor
from shared.worker import CONTRACT, Start
from tests.virtqueue import Driver, queue_of
from tests.vmm import SECONDS

PROGRAM = """
import json, sys
from console_worker.__main__ import main
from shared.linux import die_with_parent
from shared.worker import Start
die_with_parent(int(sys.argv[1]))
start = json.loads(sys.argv[2])
sys.exit(main(Start("console", "console", start["spec"], start["fds"], start["endpoint"])))
"""
T = TypeVar("T")
CONSOLE_FEATURES, RNG_FEATURES = 0x1_0000_0001, 0x1_0000_0000
LINES = 400


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reactor = Reactor()
        self.memory = GuestMemory.create(4 << 20)
        self.rx = Driver(self.memory, 0x10000, 0, size=16)
        self.tx = Driver(self.memory, 0x30000, 1, size=16)
        self.entropy = Driver(self.memory, 0x50000, 0, size=16)
        self.end = open_host_end("pty")
        self.user = os.open(self.end.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self.frontends = {name: Frontend(self.reactor, self.memory, f"__{name}") for name in ("console", "rng")}
        self.workers: list[subprocess.Popen[bytes]] = []
        self.channels: list[Channel] = []
        self.printed = bytearray()

    def spawn(self) -> None:
        endpoint = f"ipc://{self.folder}/worker.{len(self.workers)}"
        pairs = {name: socket.socketpair() for name in self.frontends}
        fds = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        fds |= {f"console.{role}": fd for role, fd in self.end.fds.items()}
        spec = {"console": {"mode": "pty", "path": self.end.path}, "rng": {"src": "/dev/urandom"}}
        start = json.dumps({"spec": spec, "fds": fds, "endpoint": endpoint})
        command = [sys.executable, "-c", PROGRAM, str(os.getpid()), start]
        self.workers.append(subprocess.Popen(command, pass_fds=sorted(set(fds.values()))))
        channel = Channel(self.reactor, endpoint, bind=False)
        self.channels.append(channel)
        # Before the replay, whose limit is the program's own: a process that is being born has more.
        self.run(channel.call("hello", SECONDS))
        unlink_endpoint(endpoint)
        for name, (ours, theirs) in pairs.items():
            theirs.close()
            self.run(self.frontends[name].replay(ours))

    def activate(self) -> None:
        self.run(self.frontends["console"].activate(CONSOLE_FEATURES, (queue_of(self.rx), queue_of(self.tx))))
        self.run(self.frontends["rng"].activate(RNG_FEATURES, (queue_of(self.entropy),)))

    def call(self, verb: str, **arguments: object) -> dict[str, Any]:
        return self.run(self.channels[-1].call(verb, SECONDS, **arguments))

    def run(self, awaitable: Awaitable[T]) -> T:
        return self.reactor.run_until(awaitable, SECONDS)

    def until(self, condition: Callable[[], bool]) -> None:
        done: Future[None] = Future()

        def check() -> None:
            if condition():
                done.set_result(None)
            else:
                self.reactor.call_later(0.001, check)

        check()
        self.run(done)

    def read(self) -> bytes:
        """Everything that the user has seen so far."""
        try:
            self.printed.extend(os.read(self.user, 65536))
        except BlockingIOError:
            pass
        return bytes(self.printed)

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for frontend in self.frontends.values():
            frontend.close()
        for worker in self.workers:
            worker.kill()
            worker.wait()
        os.close(self.user)
        self.end.close()
        for d in (self.rx, self.tx, self.entropy):
            d.close()
        self.memory.close()
        self.reactor.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.spawn()
    made.activate()
    yield made
    made.close()


def test_output_over_kills_is_in_order_and_never_twice(bench: Bench) -> None:
    """What a killed worker had taken from the ring and not yet written is lost at most: never repeated, never mixed."""
    tx = bench.tx
    sent, completed, kills, target = 0, 0, 0, 0

    def step() -> bool:
        nonlocal sent, completed
        bench.read()
        completed += len(tx.completed())
        while sent < LINES and sent - completed < tx.size:
            if sent == completed:
                tx.reset_buffers()
            tx.add([b"%06d\n" % sent])
            sent += 1
        tx.kick()
        return completed >= target

    for target in (*range(50, LINES, 50), LINES):
        bench.until(step)
        if target < LINES:
            down: list[Exception | None] = []
            bench.frontends["console"].on_lost = down.append
            bench.workers[-1].send_signal(signal.SIGKILL)
            bench.workers[-1].wait()
            bench.until(lambda: bool(down))  # noqa: B023  evaluated before the next round
            bench.spawn()
            kills += 1
    bench.until(lambda: bench.read().endswith(b"%06d\n" % (LINES - 1)))
    numbers = [int(line) for line in bytes(bench.printed).split()]
    assert kills == 7
    assert numbers == sorted(set(numbers))
    assert LINES - len(numbers) <= kills * tx.size


def test_the_control_plane_serves_the_whole_contract(bench: Bench) -> None:
    who = {"kind": "console_worker", "version": 1, "pid": bench.workers[-1].pid, "contract": CONTRACT}
    assert bench.call("hello") == who
    first, second = (bench.call("heartbeat")["epoch"] for _ in range(2))
    assert second == first + 1
    os.write(bench.user, b"typed")
    bench.until(lambda: bool(bench.call("stats")["console_bytes_in"] == 5))
    assert bench.call("quiesce") == {"bases": {"console.0": 0, "console.1": 0, "rng.0": 0}}
    saved = bench.call("save")
    assert saved == {
        "kind": "console_worker",
        "version": 1,
        "state": {"console": {"in_buffer": list(b"typed"), "out_buffer": []}},
    }
    bench.call("load", **saved)
    bench.call("resume")
    bench.rx.add([], [16])
    bench.rx.kick()
    bench.until(lambda: bench.rx.completed() == [(0, 5)])
    # Its answer is not promised: the worker may be gone before it is sent.
    bench.reactor.spawn(bench.channels[-1].call("shutdown", None), "shutdown")
    bench.until(lambda: bench.workers[-1].poll() is not None)
    assert bench.workers[-1].returncode == 0


def test_a_resize_of_the_users_terminal_reaches_the_driver(bench: Bench) -> None:
    """The worker is its PTY's session leader, so the kernel tells it, and it tells us."""
    changed: list[bool] = []
    bench.frontends["console"].on_config_change = lambda: changed.append(True)
    fcntl.ioctl(bench.user, termios.TIOCSWINSZ, struct.pack("4H", 50, 132, 0, 0))
    bench.until(lambda: bool(changed))
    assert bench.run(bench.frontends["console"].get_config(12))[:4] == struct.pack("<HH", 132, 50)
    bench.workers[-1].kill()
    bench.workers[-1].wait()
    bench.spawn()
    fcntl.ioctl(bench.user, termios.TIOCSWINSZ, struct.pack("4H", 25, 80, 0, 0))
    bench.until(lambda: bench.run(bench.frontends["console"].get_config(4)) == struct.pack("<HH", 80, 25))


def test_a_resize_while_the_worker_is_being_born_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told of it: the PTY's session is not there yet, or has no handler."""
    reactor, end = Reactor(), open_host_end("pty")

    def resize(slave: int) -> None:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 132, 0, 0))

    monkeypatch.setattr(console_program, "_take_terminal", resize)
    monkeypatch.setattr(console_program, "_watch_resize", lambda *_: None)
    spec = {"console": {"mode": "pty", "path": end.path}}
    fds = {f"console.{role}": fd for role, fd in end.fds.items()}
    console = console_program._console(Start("console_worker", "console", spec, fds, ""), reactor)
    assert console is not None and console.get_config(0, 4) == struct.pack("<HH", 132, 50)
    end.close()
    reactor.close()


def test_a_worker_that_is_killed_while_quiet_comes_back_quiet(bench: Bench) -> None:
    bench.run(bench.frontends["console"].stop())
    bench.call("quiesce")
    bench.workers[-1].kill()
    bench.workers[-1].wait()
    bench.spawn()
    bench.tx.add([b"held"])
    bench.tx.kick()
    bench.call("stats")
    assert bench.tx.completed() == []
    bench.run(bench.frontends["console"].resume())
    bench.until(lambda: bench.read() == b"held")
