"""The toy guest's one vCPU: a worker that counts in shared memory and proves that nobody else does so at the same time.

    RAM page   u32 owner (pid of the runner, 0: paused)   u32 violations   u64 count

A toy that moves to another host has that page as a witness, which all hosts see, and RAM of its own: at each tick the
next page's first word becomes the count, which is in the first page, too.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from shared import atomics
from shared.atomics import cas32, load32, store32
from shared.linux import mmap_fd
from shared.reactor import Reactor, Timer
from shared.state_versions import StateKind
from shared.worker import Start, serve

PAGE = 4096
GUEST_SIZE = 256 * PAGE
OWNER, VIOLATIONS, COUNT = 0, 4, 8
TICK = 0.001


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Ram:
    """The guest's RAM, mapped. `pid`: ours, as others know it."""

    def __init__(self, fd: int, pid: int = 0) -> None:
        self._pid = pid
        self.address = mmap_fd(fd, PAGE)
        self._count = ctypes.c_uint64.from_address(self.address + COUNT)

    @property
    def count(self) -> int:
        return self._count.value

    @property
    def owner(self) -> int:
        return load32(self.address + OWNER)

    @property
    def violations(self) -> int:
        return load32(self.address + VIOLATIONS)

    def violate(self) -> None:
        store32(self.address + VIOLATIONS, self.violations + 1)

    def take(self) -> None:
        """Become the one runner. A living other one sees it at its next tick, and that is a violation: whether there is
        one can't be looked up in here."""
        store32(self.address + OWNER, self._pid)

    def leave(self) -> None:
        cas32(self.address + OWNER, self._pid, 0)

    def tick(self) -> None:
        if self.owner != self._pid:
            self.violate()
        self._count.value += 1


class GuestRam:
    """What a remote migration copies."""

    def __init__(self, fd: int) -> None:
        self.address = mmap_fd(fd, GUEST_SIZE)

    def _word(self, page: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self.address + page * PAGE)

    @property
    def count(self) -> int:
        return self._word(0).value

    @property
    def whole(self) -> bool:
        """Whether every page holds what the ticks so far have left there. A runner that is killed within a tick may
        have left the next one's page already, and not its count."""
        count, pages = self.count, GUEST_SIZE // PAGE - 1
        last = {n % pages: (n,) for n in range(max(1, count - pages + 1), count + 1)}
        begun = (count + 1) % pages
        last[begun] = (*last.get(begun, (0,)), count + 1)
        return all(self._word(1 + page).value in allowed for page, allowed in last.items())

    def tick(self) -> None:
        count = self.count + 1
        self._word(1 + count % (GUEST_SIZE // PAGE - 1)).value = count
        self._word(0).value = count


class Runner:
    states = StateKind("toy_runner")

    def __init__(self, reactor: Reactor, ram: Ram, pulse: int, guest: GuestRam | None) -> None:
        self._guest = guest
        self._reactor = reactor
        self._ram = ram
        self._pulse = pulse
        self._timer: Timer | None = None

    def quiesce(self) -> dict[str, Any]:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._ram.leave()
        return {"bases": {}}

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass

    def resume(self) -> None:
        if self._timer is None:
            self._ram.take()
            self._tick()

    def _tick(self) -> None:
        self._ram.tick()
        if self._guest is not None:
            self._guest.tick()
        os.eventfd_write(self._pulse, 1)
        self._timer = self._reactor.call_later(TICK, self._tick)

    def stats(self) -> dict[str, int]:
        return {}

    def epoch(self) -> int:
        return self._ram.count

    def fault(self, what: str, value: int) -> None:
        pass


def main(start: Start) -> int:
    atomics.preload()
    reactor = Reactor()
    guest = GuestRam(start.fds["guest"]) if "guest" in start.fds else None
    return serve(start, Runner(reactor, Ram(start.fds["ram"], start.pid), start.fds["pulse"], guest), reactor)
