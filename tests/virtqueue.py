"""The driver side of a split virtqueue, for tests: descriptors in real guest memory, completions from the used ring."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from controller.pci.virtio import Virtqueue
from shared.memory import GuestMemory
from tests.vmm import SECONDS

NEXT, WRITE = 1, 2


@dataclass(slots=True)
class Driver:
    """One queue of `size` entries; its rings take three pages from `base` on, buffers come behind them.

    Buffers are handed out from a bump allocator that `reset_buffers` rewinds.
    """

    memory: GuestMemory
    base: int
    index: int = 0
    size: int = 8
    buffers_at: int = 0
    kick_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    call_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    next_desc: int = 0
    avail_index: int = 0
    used_index: int = 0
    next_buffer: int = 0
    held_back: bool = False

    def __post_init__(self) -> None:
        self.buffers_at = self.buffers_at or self.base + 0x4000
        self.next_buffer = self.buffers_at

    @property
    def desc(self) -> int:
        return self.base

    @property
    def avail(self) -> int:
        return self.base + 0x1000

    @property
    def used(self) -> int:
        return self.base + 0x2000

    def buffer(self, size: int) -> int:
        gpa = self.next_buffer
        self.next_buffer += (size + 15) & -16
        return gpa

    def reset_buffers(self) -> None:
        self.next_buffer = self.buffers_at

    def describe(self, slot: int, gpa: int, size: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.desc + 16 * slot, struct.pack("<QIHH", gpa, size, flags, following))

    def offer(self, head: int) -> None:
        """Put a descriptor chain into the avail ring, without a kick."""
        self.memory.write(self.avail + 4 + 2 * (self.avail_index % self.size), struct.pack("<H", head))
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self._publish()

    def _publish(self) -> None:
        if not self.held_back:
            self.memory.view(self.avail, 4).cast("H")[1] = self.avail_index

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A device finds all that is offered within it, or none."""
        self.held_back = True
        try:
            yield
        finally:
            self.held_back = False
            self._publish()

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> tuple[int, list[int]]:
        """Offer a chain of the given bytes and of writable buffers of the given sizes: (head, their addresses)."""
        parts: list[tuple[int, int, int]] = []
        for data in readable:
            gpa = self.buffer(len(data))
            self.memory.write(gpa, data)
            parts.append((gpa, len(data), 0))
        targets = [self.buffer(size) for size in writable]
        parts += [(gpa, size, WRITE) for gpa, size in zip(targets, writable, strict=True)]
        slots = [(self.next_desc + n) % self.size for n in range(len(parts))]
        self.next_desc = (self.next_desc + len(parts)) % self.size
        for n, (slot, (gpa, size, flags)) in enumerate(zip(slots, parts, strict=True)):
            last = n == len(parts) - 1
            self.describe(slot, gpa, size, flags | (0 if last else NEXT), 0 if last else slots[n + 1])
        self.offer(slots[0])
        return slots[0], targets

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def used_idx(self) -> int:
        return self.memory.u16(self.used + 2)

    def completed(self) -> list[tuple[int, int]]:
        """(head, bytes written) of what has been completed since the last call."""
        done = []
        while self.used_index != self.used_idx():
            slot = self.used_index % self.size
            done.append(struct.unpack("<II", self.memory.read(self.used + 4 + 8 * slot, 8)))
            self.used_index = (self.used_index + 1) & 0xFFFF
        return done

    def wait(self, count: int = 1, seconds: float = SECONDS) -> list[tuple[int, int]]:
        """Wait for `count` completions by interrupt, for a back end in another process."""
        done = self.completed()
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        while len(done) < count:
            assert poll.poll(seconds * 1000), f"{len(done)} of {count} completions within {seconds} s"
            os.eventfd_read(self.call_fd)
            done += self.completed()
        return done

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)


def queue_of(driver: Driver) -> Virtqueue:
    """As the device's registers have it."""
    d = driver
    return Virtqueue(d.index, d.size, d.desc, d.avail, d.used, d.kick_fd, d.call_fd)
