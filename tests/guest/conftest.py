"""QEMU as the VMM: the probe guest is tested on a machine that is not ours."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest.build import build
from guest.lines import Event, Line, Stream
from tests.vmm import SECONDS

QEMU = "qemu-system-x86_64"
# QEMU's microvm has no MCFG table, no CF8 and no BAR allocation, but boots at once.
MICROVM_WORDS = "ecam=0xe0000000 bars=0xc0000000"


class Machine:
    """One QEMU, its serial port as a stream of events."""

    def __init__(self, accel: str, words: str, *devices: str, memory: str = "128M") -> None:
        cpu = ("-cpu", "host,-arch-capabilities") if accel == "kvm" else ()
        command = [QEMU, "-accel", accel, *cpu, "-M", "microvm,pcie=on,pic=off,pit=off", "-m", memory, "-no-reboot"]
        command += ["-nodefaults", "-display", "none", "-serial", "stdio", "-kernel", str(build()), *devices]
        self.process = subprocess.Popen(
            [*command, "-append", f"{words} {MICROVM_WORDS}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.events: list[Event] = []
        self._told = 0  # so many of them until() has looked at
        self._stream = Stream()

    def send(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def until(self, wanted: Callable[[Event], bool], what: str) -> Event:
        """The first wanted event behind the one that was returned last. Fails when the guest ends or the deadline
        passes before it."""
        deadline = time.monotonic() + SECONDS
        while True:
            while self._told < len(self.events):
                event = self.events[self._told]
                self._told += 1
                if wanted(event):
                    return event
            self._read(deadline, what)

    def line(self, kind: type[Line]) -> Line:
        event = self.until(lambda event: isinstance(event, kind), kind.__name__)
        assert isinstance(event, Line)
        return event

    def finish(self) -> list[Event]:
        """Everything, once the guest has ended by itself."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline, "the end", may_end=True):
            pass
        assert self.process.wait(SECONDS) == 0
        return self.events

    def _read(self, deadline: float, what: str, may_end: bool = False) -> list[Event]:
        assert self.process.stdout
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                pytest.fail(f"no {what} within {SECONDS} s; last: {self.events[-8:]}")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data and may_end:
                return []
            assert data, f"the guest ended before {what}; last: {self.events[-8:]}"
            new = self._stream.feed(data)
            self.events += new
            if new:
                return new

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Boot = Callable[..., Machine]


def _boots(accel: str) -> Iterator[Boot]:
    """A function that starts machines, which end with the test."""
    if not shutil.which(QEMU):
        pytest.skip(f"{QEMU} is not installed")
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened")
    machines: list[Machine] = []

    def start(words: str, *devices: str, memory: str = "128M") -> Machine:
        machines.append(Machine(accel, words, *devices, memory=memory))
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture(params=["tcg", pytest.param("kvm", marks=pytest.mark.probe)])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """For what the processor or KVM may do differently."""
    yield from _boots(request.param)


@pytest.fixture
def boot_emulated() -> Iterator[Boot]:
    """For what is a matter of the guest's own code."""
    yield from _boots("tcg")


def disk(path: Path, options: str = "", device: str = "") -> tuple[str, ...]:
    """QEMU's words for a raw image as a modern virtio-blk function."""
    name = path.stem
    return (
        *("-drive", f"id={name},if=none,format=raw,discard=unmap,file={path}{options}"),
        *("-device", f"virtio-blk-pci,disable-legacy=on,drive={name}{device}"),
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One MiB of random bytes."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    """8 MiB of zeros."""
    path = tmp_path / "blank.raw"
    path.touch()
    os.truncate(path, 8 << 20)
    return path
