"""Kills, and what the guest sees of them: nothing but a pause."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.native_ring import Step
from tests.blk_worker.driver import FLUSH, IN, OK, OUT, Driver, Memory, memory_for
from tests.blk_worker.rig import image, sector_bytes
from tests.vhost_frontend import Frontend, connect

SECTORS = 4096
SIZE = 32
KILLED = 137


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.raw", SECTORS)


class Load:
    """Writes and reads of known content, each sector used by one request at a time; everything read is verified."""

    def __init__(self, driver: Driver, seed: int, first: int, count: int) -> None:
        self.driver = driver
        self.random = random.Random(seed)
        self.idle = list(range(first, first + count))
        self.stamps = dict.fromkeys(self.idle, 0)
        self.what: dict[int, tuple[int, int, int]] = {}
        self.done = 0

    def submit(self) -> None:
        while self.driver.free and self.idle:
            sector = self.idle.pop(self.random.randrange(len(self.idle)))
            kind = self.random.choice((OUT, OUT, IN, FLUSH))
            stamp = self.stamps[sector] + 1
            data = sector_bytes(sector, stamp) if kind == OUT else b""
            head = self.driver.submit(kind, sector, data, 512 if kind == IN else 0, split=3)
            self.what[head] = (kind, sector, stamp)
        self.driver.kick()

    def take(self, results: dict[int, tuple[int, bytes]]) -> None:
        for head, (status, data) in results.items():
            kind, sector, stamp = self.what.pop(head)
            assert status == OK
            if kind == OUT:
                self.stamps[sector] = stamp
            elif kind == IN:
                assert data == sector_bytes(sector, self.stamps[sector])
            self.idle.append(sector)
            self.done += 1

    def verify(self, disk: Path) -> None:
        with disk.open("rb") as file:
            for sector, stamp in self.stamps.items():
                file.seek(sector * 512)
                assert file.read(512) == sector_bytes(sector, stamp), f"sector {sector}"


class Bench:
    """A driver's memory and inflight region, which outlive the victims."""

    def __init__(self, disk: Path) -> None:
        self.memory = memory_for(1, SIZE)
        self.inflight = Memory(4096)
        self.driver = Driver(self.memory, SIZE, indirect=True)
        self.disk = disk

    def victim(self, step: int = 0, nth: int = 0) -> subprocess.Popen[str]:
        fds = {
            "ram_fd": self.memory.fd, "inflight_fd": self.inflight.fd,
            "kick_fd": self.driver.kick_fd, "call_fd": self.driver.call_fd,
        }  # fmt: skip
        task: dict[str, Any] = {
            "path": str(self.disk), "size": SIZE, "ram_size": self.memory.size, "inflight_size": self.inflight.size,
            "step": step, "nth": nth, **fds,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "tests.blk_worker.victim", json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=tuple(fds.values()),
        )  # fmt: skip

    def close(self) -> None:
        self.driver.close()
        self.memory.close()
        self.inflight.close()


@pytest.fixture
def bench(disk: Path) -> Iterator[Bench]:
    bench = Bench(disk)
    yield bench
    bench.close()


def die(victim: subprocess.Popen[str]) -> None:
    """Wait until it has reached its step."""
    assert victim.wait(30) == KILLED
    victim.communicate()


def finish(victim: subprocess.Popen[str]) -> int:
    """Let it stop in good order: how many requests it had taken over."""
    output, _ = victim.communicate("", timeout=30)
    assert victim.returncode == 0
    return int(output.split()[-1])


@pytest.mark.parametrize("step", [step for step in Step if step], ids=lambda step: step.name.lower())
def test_kill_at_every_step_returns_each_request_once(bench: Bench, disk: Path, step: Step) -> None:
    load = Load(bench.driver, step, 0, 200)
    for nth in (1, 9):
        load.submit()
        victim = bench.victim(step, nth)
        die(victim)
        load.take(bench.driver.reap())
    load.submit()
    successor = bench.victim()
    load.take(bench.driver.wait(len(bench.driver.pending)))
    finish(successor)
    assert load.done >= SIZE
    load.verify(disk)


def test_requests_of_the_dead_are_taken_over_in_their_number(bench: Bench, disk: Path) -> None:
    load = Load(bench.driver, 1, 0, 200)
    load.submit()
    pending = len(bench.driver.pending)
    victim = bench.victim(Step.DONE, 1)
    die(victim)
    successor = bench.victim()
    load.take(bench.driver.wait(pending))
    assert finish(successor) == pending
    load.verify(disk)


def test_notification_lost_with_the_dead_is_made_up_for(bench: Bench) -> None:
    """Killed between index and interrupt; the guest waits for an interrupt and submits nothing new."""
    victim = bench.victim(Step.SETTLED, 1)
    assert select.select([bench.driver.call_fd], [], [], 20)[0]  # every start signals, for the predecessor's sake
    os.eventfd_read(bench.driver.call_fd)
    bench.driver.submit(IN, 0, length=512)
    bench.driver.kick()
    die(victim)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bench.driver.call_fd)
    successor = bench.victim()
    assert select.select([bench.driver.call_fd], [], [], 20)[0]
    assert len(bench.driver.reap()) == 1
    finish(successor)


# The real program, killed at random ------------------------------------------------------------------------------


def spawn(path: Path, disk: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "blk_worker", "--socket-path", str(path), "--path", str(disk), *options]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def test_kill_9_under_load_loses_nothing(disk: Path, runtime_folder: Path) -> None:
    path = runtime_folder / "blk.sock"
    memory = memory_for(2, SIZE)
    drivers = [Driver(memory, SIZE, n, indirect=True) for n in range(2)]
    loads = [Load(driver, n, 1000 * n, 1000) for n, driver in enumerate(drivers)]
    chance = random.Random(4)
    inflight: bytes | None = None
    inflight_fd = -1
    for life in range(8):
        program = spawn(path, disk, "--num-queues", "2")
        frontend = Frontend(connect(path), memory, drivers, inflight, inflight_fd)
        inflight, inflight_fd = frontend.inflight, frontend.inflight_fd
        for load in loads:
            load.submit()
        for driver in drivers:
            frontend.start(driver, driver.used_idx())
        target = sum(load.done for load in loads) + chance.randrange(1, 600)
        while sum(load.done for load in loads) < target:
            for load in loads:
                load.take(load.driver.wait(1))
                load.submit()
        if life < 7:
            program.send_signal(signal.SIGKILL)
            program.wait()
            frontend.close(keep_inflight=True)
            os.unlink(path)
    for load in loads:
        load.take(load.driver.wait(len(load.driver.pending)))
        assert frontend.stop(load.driver) == load.driver.used_idx()
        load.verify(disk)
    frontend.close()
    program.terminate()
    assert program.wait(20) == 0
    assert not path.exists()
    for driver in drivers:
        driver.close()
    memory.close()
