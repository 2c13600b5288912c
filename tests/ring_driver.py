"""The driver side of a split virtqueue in shared memory, for tests of native workers.

Unlike tests/virtqueue.py it keeps many requests in flight, uses indirect tables and EVENT_IDX. All guest memory is one
memfd, one region at guest address `GPA`.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.linux import bytes_at, memfd, mmap_fd, munmap

GPA = 0x10_0000
NEXT, WRITE, INDIRECT = 1, 2, 4
TABLE_AT = 64  # of the indirect table in a head's slot


def pages(size: int) -> int:
    return (size + mmap.PAGESIZE - 1) & -mmap.PAGESIZE


def rings_size(size: int) -> int:
    """Descriptor table, avail ring and used ring, each on pages of its own."""
    return pages(16 * size) + pages(6 + 2 * size) + pages(6 + 8 * size)


class Memory:
    """Guest RAM of `size` bytes, mapped here at `address`."""

    def __init__(self, size: int, fd: int = -1) -> None:
        self.size = size
        self.fd = memfd("test-ram", size) if fd < 0 else fd
        self.address = mmap_fd(self.fd, size)
        self.view = bytes_at(self.address, size)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view[gpa - GPA : gpa - GPA + size])

    def write(self, gpa: int, data: bytes) -> None:
        self.view[gpa - GPA : gpa - GPA + len(data)] = data

    def u16(self, gpa: int) -> memoryview:
        """A view of one aligned 16-bit word: loads and stores are single."""
        return self.view[gpa - GPA : gpa - GPA + 2].cast("H")

    def close(self) -> None:
        self.view.release()
        munmap(self.address, self.size)
        os.close(self.fd)


@dataclass(slots=True)
class RingDriver:
    """One queue. Each head has a slot of `slot_bytes` of guest memory, for its indirect table and its buffers."""

    memory: Memory
    size: int = 16
    index: int = 0
    event_idx: bool = True
    indirect: bool = False
    slot_bytes: int = 64 << 10
    kick_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    call_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    avail_idx: int = 0
    used_seen: int = 0
    calls: int = 0

    @property
    def base(self) -> int:
        return GPA + self.index * (rings_size(self.size) + self.size * self.slot_bytes)

    @property
    def desc(self) -> int:
        return self.base

    @property
    def avail(self) -> int:
        return self.desc + pages(16 * self.size)

    @property
    def used(self) -> int:
        return self.avail + pages(6 + 2 * self.size)

    def slot(self, head: int) -> int:
        return self.base + rings_size(self.size) + head * self.slot_bytes

    # Building ---------------------------------------------------------------------------------------------------

    def chain(self, head: int, buffers: Sequence[tuple[int, int, int]]) -> None:
        """Write (gpa, length, flags) buffers as the chain of `head`."""
        table, first = (self.slot(head) + TABLE_AT, 0) if self.indirect else (self.desc, head)
        for n, (gpa, length, flags) in enumerate(buffers):
            more = NEXT if n + 1 < len(buffers) else 0
            self.memory.write(
                table + 16 * (first + n),
                struct.pack("<QIHH", gpa, length, flags | more, (first + n + 1) if more else 0),
            )
        if self.indirect:
            entry = struct.pack("<QIHH", table, 16 * len(buffers), INDIRECT, 0)
            self.memory.write(self.desc + 16 * head, entry)

    def offer(self, head: int) -> None:
        self.memory.u16(self.avail + 4 + 2 * (self.avail_idx % self.size))[0] = head
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.u16(self.avail + 2)[0] = self.avail_idx

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def wants_kick(self, since: int) -> bool:
        """Whether the device asked for a kick after what was offered since avail index `since` (virtio 1.2, 2.7.10)."""
        if not self.event_idx:
            return not self.memory.u16(self.used)[0] & 1
        event: int = self.memory.u16(self.used + 4 + 8 * self.size)[0]
        return (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - since) & 0xFFFF

    # Completions ------------------------------------------------------------------------------------------------

    def used_idx(self) -> int:
        value: int = self.memory.u16(self.used + 2)[0]
        return value

    def completed(self) -> list[tuple[int, int]]:
        """(head, bytes written) of what has been completed since the last call."""
        done = []
        while self.used_seen != self.used_idx():
            done.append(struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.used_seen % self.size), 8)))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return done

    def arm(self) -> None:
        """Ask for an interrupt at the next completion (EVENT_IDX)."""
        if self.event_idx:
            self.memory.u16(self.avail + 4 + 2 * self.size)[0] = self.used_seen

    def wait_for(self, ready: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        """Until ready() has taken what it waits for, by interrupts alone: a lost one is an AssertionError."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        while not ready():
            self.arm()
            if self.used_seen != self.used_idx():
                continue
            left = deadline - time.monotonic()
            assert left > 0 and poll.poll(left * 1000), f"not within {seconds} s: {what}"
            self.calls += os.eventfd_read(self.call_fd)

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)


def memory_for(queues: int, size: int, heads: int = 0, slot_bytes: int = 64 << 10) -> Memory:
    """Room for the rings, and for the buffers of `heads` heads (of all, if 0) per queue."""
    return Memory(queues * (rings_size(size) + (heads or size) * slot_bytes))
