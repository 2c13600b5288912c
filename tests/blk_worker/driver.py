"""A virtio-blk driver, for tests of the block worker; it checks that every head comes back exactly once."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.ring_driver import (
    GPA,
    INDIRECT,
    NEXT,
    TABLE_AT,
    WRITE,
    Memory,
    RingDriver,
    memory_for,
    pages,
    rings_size,
)

__all__ = ("GPA", "INDIRECT", "NEXT", "TABLE_AT", "WRITE", "Memory", "memory_for", "pages", "rings_size")

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
STATUS_AT, DATA_AT = 32, 4096


@dataclass(slots=True)
class Pending:
    kind: int
    data_gpa: int
    length: int


@dataclass(slots=True)
class Driver(RingDriver):
    """One queue. `submit` returns a head; `wait` returns {head: (status, data read)} of what has completed."""

    pending: dict[int, Pending] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A request takes 3 or more table entries when it is not indirect: heads are spaced.
        step = 1 if self.indirect else 4
        self.free = list(range(0, self.size, step))

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

    def reap(self) -> dict[int, tuple[int, bytes]]:
        """What has completed; AssertionError for a head that was not in flight."""
        done: dict[int, tuple[int, bytes]] = {}
        for head, _ in self.completed():
            assert head in self.pending, f"head {head} returned, but {sorted(self.pending)} are in flight"
            request = self.pending.pop(head)
            status = self.memory.read(self.slot(head) + STATUS_AT, 1)[0]
            data = self.memory.read(request.data_gpa, request.length) if request.kind in (IN, GET_ID) else b""
            done[head] = (status, data)
            self.free.append(head)
        return done

    def wait(self, count: int = 1, seconds: float = 20.0) -> dict[int, tuple[int, bytes]]:
        """At least `count` completions, by interrupts alone: a lost one is an AssertionError."""
        done: dict[int, tuple[int, bytes]] = {}

        def enough() -> bool:
            if len(done) < count:
                done.update(self.reap())
            return len(done) >= count

        self.wait_for(enough, f"{count} completions", seconds)
        return done

    def do(self, kind: int, sector: int = 0, data: bytes = b"", length: int = 0, split: int = 1) -> tuple[int, bytes]:
        """One request from submission to completion: (status, data)."""
        head = self.submit(kind, sector, data, length, split)
        self.kick()
        return self.wait(1)[head]


def range_segment(sector: int, count: int, flags: int = 0) -> bytes:
    """struct virtio_blk_discard_write_zeroes"""
    return struct.pack("<QII", sector, count, flags)
