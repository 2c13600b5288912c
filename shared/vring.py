"""The device side of a split virtqueue in Python, for devices that move bytes and not gigabytes.

Sources: virtio 1.2, section 2.7; the same ring in C is shared/vring.h. Neither indirect descriptors nor EVENT_IDX may
be offered by a device that uses this. The guest is hostile and writes while we read: each index, avail entry and
descriptor is loaded once, every address range is looked up in the memory table before it is touched, and a chain that
breaks the rules raises GuestError.

Index fields are read and written through memoryview.cast("H"), which is one aligned 16-bit move; struct would be free
to write single bytes, and the driver would see a torn index.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

from shared.errors import BadGuestAddress, GuestError, HostError
from shared.linux import bytes_at
from shared.vhost_backend import Mapping, Ring

VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4

PAGE_SHIFT: Final = 12
_DESC: Final = Struct("<QIHH")
_USED_HEAD = 4  # flags, idx


@cache
def _fetch_or() -> Any:
    """An atomic OR on one byte of shared memory; Python has none of its own."""
    try:
        function = ctypes.CDLL("libatomic.so.1").__atomic_fetch_or_1
    except OSError as error:
        raise HostError("libatomic.so.1 is missing, so no dirty log can be kept", "install libatomic1") from error
    function.argtypes = (ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_int)
    function.restype = ctypes.c_ubyte
    return function


def preload() -> None:
    """For a process that can open no file later (shared/sandbox.py). What is missing the first DirtyLog misses."""
    with suppress(HostError):
        _fetch_or()


_ATOMIC_SEQ_CST = 5


class DirtyLog:
    """A vhost-user dirty bitmap: one bit per 4 KiB page of guest address, ORed atomically."""

    def __init__(self, address: int, size: int) -> None:
        self._address = address
        self._size = size
        self._or = _fetch_or()

    def mark(self, gpa: int, size: int) -> None:
        """Mark every page that [gpa, gpa+size) touches. Pages beyond the bitmap are not logged."""
        if size <= 0:
            return
        for page in range(gpa >> PAGE_SHIFT, min((gpa + size - 1) >> PAGE_SHIFT, self._size * 8 - 1) + 1):
            self._or(self._address + (page >> 3), 1 << (page & 7), _ATOMIC_SEQ_CST)


class MemoryMap:
    """Guest memory of a back end, by guest address."""

    def __init__(self, mappings: tuple[Mapping, ...] = ()) -> None:
        self._spans = sorted((m.gpa, m.gpa + m.size, bytes_at(m.address, m.size)) for m in mappings)

    def views(self, gpa: int, size: int) -> list[memoryview]:
        """The bytes of a range, in order; several where it crosses from one region into the next.

        Raises BadGuestAddress unless all of it is guest memory.
        """
        parts = []
        position, end = gpa, gpa + size
        for start, stop, view in self._spans:
            if start <= position < stop:
                cut = min(end, stop)
                parts.append(view[position - start : cut - start])
                position = cut
            if position == end:
                return parts
        raise BadGuestAddress(f"guest address {gpa:#x}, length {size:#x} is not RAM")


class Buffer(NamedTuple):
    """One descriptor: guest address and length."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A request of the driver: what the device may read, and what it may write."""

    head: int
    readable: tuple[Buffer, ...]
    writable: tuple[Buffer, ...]

    @property
    def capacity(self) -> int:
        return sum(b.size for b in self.writable)


class SplitRing:
    """One running ring. `next_avail` is what GET_VRING_BASE asks for."""

    def __init__(self, ring: Ring, memory: MemoryMap, log: DirtyLog | None = None) -> None:
        size = ring.size
        self.memory = memory
        self.log = log
        self.size = size
        self._ring = ring
        self._desc = bytes_at(ring.desc, 16 * size)
        avail = bytes_at(ring.avail, 4 + 2 * size).cast("H")
        used = bytes_at(ring.used, 4 + 8 * size)
        self._avail = avail
        self._used_index = used[:4].cast("H")
        self._used_ring = used[_USED_HEAD:].cast("I")
        self.next_avail = ring.base
        # Equal to the avail index: these devices complete in order, and nothing is popped at a start.
        self._next_used = ring.base
        self._pending_marks: list[tuple[int, int]] = []

    def _available(self) -> int:
        """How many chains wait. Raises GuestError when the driver claims more than the ring holds."""
        count = (self._avail[1] - self.next_avail) & 0xFFFF
        if count > self._ring.size:
            raise GuestError(f"queue {self._ring.index}: {count} requests in a ring of {self._ring.size}")
        return count

    def pop(self) -> Chain | None:
        """The next request. It counts as popped only once it has been pushed. Raises GuestError."""
        if not self._available():
            return None
        head = self._avail[2 + self.next_avail % self._ring.size]
        return self._parse(head)

    def _parse(self, head: int) -> Chain:
        readable: list[Buffer] = []
        writable: list[Buffer] = []
        index = head
        for _ in range(self._ring.size):
            if index >= self._ring.size:
                raise GuestError(f"queue {self._ring.index}: descriptor {index} in a table of {self._ring.size}")
            gpa, size, flags, following = _DESC.unpack(bytes(self._desc[16 * index : 16 * index + 16]))
            if flags & VRING_DESC_F_INDIRECT:
                raise GuestError(f"queue {self._ring.index}: an indirect descriptor that was not negotiated")
            if flags & VRING_DESC_F_WRITE:
                writable.append(Buffer(gpa, size))
            elif writable:
                raise GuestError(f"queue {self._ring.index}: a readable descriptor after a writable one")
            else:
                readable.append(Buffer(gpa, size))
            if not flags & VRING_DESC_F_NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = following
        raise GuestError(f"queue {self._ring.index}: a descriptor chain longer than the ring")

    def read(self, chain: Chain, limit: int) -> bytes:
        """What the driver wrote into the chain, at most `limit` bytes. Raises BadGuestAddress."""
        parts: list[memoryview] = []
        for buffer in chain.readable:
            size = min(buffer.size, limit)
            limit -= size
            parts += self.memory.views(buffer.gpa, size) if size else []
        return b"".join(parts)

    def write(self, chain: Chain, data: bytes) -> int:
        """Fill the chain's writable part; bytes written, less than len(data) where it is too small.

        The whole chain is checked first, so a bad one is not half filled. Raises BadGuestAddress.
        """
        done = 0
        for view, gpa in list(self._targets(chain, len(data))):
            view[:] = data[done : done + len(view)]
            self._pending_marks.append((gpa, len(view)))
            done += len(view)
        return done

    def _targets(self, chain: Chain, limit: int) -> Iterator[tuple[memoryview, int]]:
        for buffer in chain.writable:
            size = min(buffer.size, limit)
            limit -= size
            gpa = buffer.gpa
            for view in self.memory.views(gpa, size) if size else []:
                yield view, gpa
                gpa += len(view)

    def push(self, chain: Chain, written: int) -> None:
        """Complete a chain. The order of stores and marks is what keeps a migration from losing a page:
        data, used element, the data's marks, used index, the used ring's mark."""
        slot = self._next_used % self._ring.size
        self._used_ring[2 * slot] = chain.head
        self._used_ring[2 * slot + 1] = written
        marks, self._pending_marks = self._pending_marks, []
        if self.log is not None:
            for gpa, size in marks:
                self.log.mark(gpa, size)
        self._next_used = (self._next_used + 1) & 0xFFFF
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        self._used_index[1] = self._next_used
        if self.log is not None and self._ring.log_used:
            self.log.mark(self._ring.used_gpa, 4)
            self.log.mark(self._ring.used_gpa + _USED_HEAD + 8 * slot, 8)

    def notify(self) -> None:
        """Interrupt the driver. Its wish not to be is only a hint, and reading it in time would need a full fence."""
        os.eventfd_write(self._ring.call_fd, 1)
