"""A virtio-blk driver over a split ring in shared memory, for tests of the block worker.

Unlike tests/virtqueue.py it keeps many requests in flight, uses indirect tables and EVENT_IDX, and checks that every
head comes back exactly once. All guest memory is one memfd, one region at guest address `GPA`.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.linux import bytes_at, memfd, mmap_fd, munmap

GPA = 0x10_0000
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
NEXT, WRITE, INDIRECT = 1, 2, 4
SLOT_BYTES = 64 << 10  # per head: header, status, indirect table and data
TABLE_AT, STATUS_AT, DATA_AT = 64, 32, 4096


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
class Pending:
    kind: int
    data_gpa: int
    length: int


@dataclass(slots=True)
class Driver:
    """One queue. `submit` returns a head; `wait` returns {head: (status, data read)} of what has completed."""

    memory: Memory
    size: int = 16
    index: int = 0
    event_idx: bool = True
    indirect: bool = False
    kick_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    call_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    avail_idx: int = 0
    used_seen: int = 0
    pending: dict[int, Pending] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        # A request takes 3 or more table entries when it is not indirect: heads are spaced.
        step = 1 if self.indirect else 4
        self.free = list(range(0, self.size, step))

    @property
    def base(self) -> int:
        return GPA + self.index * (rings_size(self.size) + self.size * SLOT_BYTES)

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
        return self.base + rings_size(self.size) + head * SLOT_BYTES

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

    def submit(self, kind: int, sector: int = 0, data: bytes = b"", length: int = 0, split: int = 1) -> int:
        """One request; `data` for the device, or room for `length` bytes from it, in `split` buffers (indirect)."""
        head = self.free.pop()
        at = self.slot(head)
        self.memory.write(at, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(at + STATUS_AT, b"\xee")
        size = len(data) or length
        if data:
            self.memory.write(at + DATA_AT, data)
        flags = 0 if data else WRITE
        buffers = [(at, 16, 0)]
        for n in range(split):
            begin, end = size * n // split, size * (n + 1) // split
            if end > begin:
                buffers.append((at + DATA_AT + begin, end - begin, flags))
        buffers.append((at + STATUS_AT, 1, WRITE))
        self.chain(head, buffers)
        self.pending[head] = Pending(kind, at + DATA_AT, size)
        self.offer(head)
        return head

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    # Completions ------------------------------------------------------------------------------------------------

    def used_idx(self) -> int:
        value: int = self.memory.u16(self.used + 2)[0]
        return value

    def reap(self) -> dict[int, tuple[int, bytes]]:
        """What has completed; AssertionError for a head that was not in flight."""
        done: dict[int, tuple[int, bytes]] = {}
        while self.used_seen != self.used_idx():
            head, _ = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.used_seen % self.size), 8))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
            assert head in self.pending, f"head {head} returned, but {sorted(self.pending)} are in flight"
            request = self.pending.pop(head)
            status = self.memory.read(self.slot(head) + STATUS_AT, 1)[0]
            data = self.memory.read(request.data_gpa, request.length) if request.kind in (IN, GET_ID) else b""
            done[head] = (status, data)
            self.free.append(head)
        return done

    def arm(self) -> None:
        """Ask for an interrupt at the next completion (EVENT_IDX)."""
        if self.event_idx:
            self.memory.u16(self.avail + 4 + 2 * self.size)[0] = self.used_seen

    def wait(self, count: int = 1, seconds: float = 20.0) -> dict[int, tuple[int, bytes]]:
        """At least `count` completions, by interrupts alone: a lost one is an AssertionError."""
        done: dict[int, tuple[int, bytes]] = {}
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        while len(done) < count:
            done.update(self.reap())
            self.arm()
            if len(done) >= count or self.used_seen != self.used_idx():
                continue
            left = deadline - time.monotonic()
            assert left > 0 and poll.poll(left * 1000), f"{len(done)} of {count} completions within {seconds} s"
            self.calls += os.eventfd_read(self.call_fd)
        return done

    def do(self, kind: int, sector: int = 0, data: bytes = b"", length: int = 0, split: int = 1) -> tuple[int, bytes]:
        """One request from submission to completion: (status, data)."""
        head = self.submit(kind, sector, data, length, split)
        self.kick()
        return self.wait(1)[head]

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)


def memory_for(queues: int, size: int, heads: int = 0) -> Memory:
    """Room for the rings, and for the buffers of `heads` heads (of all, if 0) per queue."""
    return Memory(queues * (rings_size(size) + (heads or size) * SLOT_BYTES))


def range_segment(sector: int, count: int, flags: int = 0) -> bytes:
    """struct virtio_blk_discard_write_zeroes"""
    return struct.pack("<QII", sector, count, flags)
