"""Bitmaps with one bit per 4 KiB of guest address, and frames of pages that go from one mapping to another (pages.c).

    body of a PAGES frame    u32 data, u32 zero, data + zero runs of (u64 gpa, u64 pages), the data runs' pages

Data runs are pages whose contents follow, in order; zero runs are pages that read as zeros and are not sent. Nothing
is copied on the way out: the kernel reads from the guest's mapping. On the way in it is written to the region's file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from functools import cache
from typing import Final

from shared import native
from shared.errors import HostError, ProtocolError
from shared.linux import bytes_at, mmap_fd, munmap

PAGE_SIZE: Final = 4096
MAX_RUNS: Final = 1024  # of one frame, both kinds
MAX_DATA_PAGES: Final = 512  # of one frame
WORD_PAGES: Final = 64
_STORE: Final = 100000  # pages.c: RAM did not take what had been read
COUNTS = struct.Struct("<II")
RUN = struct.Struct("<QQ")
MAX_BODY: Final = COUNTS.size + MAX_RUNS * RUN.size + MAX_DATA_PAGES * PAGE_SIZE


class region(ctypes.Structure):
    _fields_ = (
        ("gpa", ctypes.c_uint64), ("size", ctypes.c_uint64), ("host", ctypes.c_uint64), ("offset", ctypes.c_uint64),
        ("fd", ctypes.c_int32), ("pad", ctypes.c_uint32),
    )  # fmt: skip


class run(ctypes.Structure):
    _fields_ = (("gpa", ctypes.c_uint64), ("count", ctypes.c_uint64))


class iovec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


class frame(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint32), ("zero", ctypes.c_uint32), ("pages", ctypes.c_uint64), ("zeros", ctypes.c_uint64),
        ("left", ctypes.c_uint64), ("cursor", ctypes.c_uint64), ("first", ctypes.c_uint32), ("last", ctypes.c_uint32),
        ("runs", run * MAX_RUNS), ("iov", iovec * (MAX_RUNS + 1)),
    )  # fmt: skip


@cache
def _library() -> ctypes.CDLL:
    library = native.load("pages")
    pointer, u64, u32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    for name, result, arguments in (
        ("frame_size", u64, ()),
        ("bitmap_or", u64, (pointer, pointer, u64)),
        ("bitmap_take", u64, (pointer, pointer, u64)),
        ("bitmap_count", u64, (pointer, u64)),
        ("bitmap_set", None, (pointer, u64, u64)),
        ("frame_collect", ctypes.c_int, (pointer, pointer, u64, pointer, u32)),
        ("frame_map", u32, (pointer, pointer, u32)),
        ("frame_head", None, (pointer, pointer, u64)),
        ("frame_write", ctypes.c_int64, (pointer, ctypes.c_int)),
        ("frame_read", ctypes.c_int64, (pointer, ctypes.c_int, pointer, u32)),
        ("frame_zero", ctypes.c_int, (pointer, pointer, u32)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.frame_size() == ctypes.sizeof(frame)
    return library


def preload() -> None:
    """For a process that can open no file later (shared/sandbox.py)."""
    _library()


class Bitmap:
    """A bitmap in a memfd, mapped here. `fd` belongs to this object."""

    def __init__(self, fd: int, size: int) -> None:
        """`size` in bytes, a multiple of 8. Raises OSError when the file can't be mapped."""
        self.fd = fd
        self.size = size
        self.address = mmap_fd(fd, size)

    @staticmethod
    def bytes_for(end: int) -> int:
        """Size of a bitmap for guest addresses below `end`."""
        words = -(-end // (PAGE_SIZE * WORD_PAGES))
        return max(1, words) * 8

    @property
    def words(self) -> int:
        return self.size // 8

    def count(self) -> int:
        return int(_library().bitmap_count(self.address, self.words))

    def set(self, gpa: int, size: int) -> None:
        """Mark every page that [gpa, gpa + size) touches. Raises ValueError outside the bitmap."""
        first, end = gpa // PAGE_SIZE, -(-(gpa + size) // PAGE_SIZE)
        if gpa < 0 or size < 0 or end > self.words * WORD_PAGES:
            raise ValueError(f"{gpa:#x} + {size:#x} is not within the bitmap")
        _library().bitmap_set(self.address, first, end - first)

    def add(self, gpa: int, source: int, words: int) -> int:
        """OR a bitmap (at address `source`) of a region that begins at `gpa` into this one; the bits set in it."""
        first, rest = divmod(gpa, PAGE_SIZE * WORD_PAGES)
        if rest or first + words > self.words:
            raise ValueError(f"a region at {gpa:#x} does not fit the bitmap")
        return int(_library().bitmap_or(self.address + first * 8, source, words))

    def take(self, other: Bitmap) -> int:
        """Move the bits of a bitmap that others set bits of meanwhile into this one; how many."""
        return int(_library().bitmap_take(self.address, other.address, min(self.words, other.words)))

    def clear(self) -> None:
        ctypes.memset(self.address, 0, self.size)

    def close(self) -> None:
        munmap(self.address, self.size)
        os.close(self.fd)


class Regions:
    """Guest RAM as pages.c wants it: (gpa, size, offset, fd) each, mapped here. The descriptors belong to this
    object."""

    def __init__(self, parts: Iterable[tuple[int, int, int, int]], *, writable: bool) -> None:
        """Raises HostError when a region can't be mapped; its descriptors stay the caller's then."""
        listed = list(parts)
        self.table = (region * len(listed))()
        self._mapped: list[tuple[int, int]] = []
        try:
            for entry, (gpa, size, offset, fd) in zip(self.table, listed, strict=True):
                entry.gpa, entry.size, entry.offset, entry.fd = gpa, size, offset, fd
                entry.host = mmap_fd(fd, size, offset, writable=writable)
                self._mapped.append((entry.host, size))
        except OSError as error:
            self._unmap()
            raise HostError(f"guest RAM can't be mapped: {error.strerror}") from error

    @property
    def end(self) -> int:
        return max((entry.gpa + entry.size for entry in self.table), default=0)

    def _unmap(self) -> None:
        for address, size in self._mapped:
            munmap(address, size)
        self._mapped = []

    def close(self) -> None:
        self._unmap()
        for entry in self.table:
            os.close(entry.fd)
        self.table = (region * 0)()


class Frame:
    """One PAGES frame, again and again: collected and written at the source, parsed and read at the destination."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._frame = frame()
        self._at = ctypes.addressof(self._frame)
        self._head: ctypes.Array[ctypes.c_char] | None = None

    @property
    def left(self) -> int:
        """Bytes that are still to move."""
        return int(self._frame.left)

    @property
    def pages(self) -> int:
        """With contents."""
        return int(self._frame.pages)

    @property
    def zeros(self) -> int:
        return int(self._frame.zeros)

    @property
    def _table(self) -> tuple[int, int]:
        table = self._regions.table
        return ctypes.addressof(table), len(table)

    # Source

    def rewind(self) -> None:
        """The next collect() begins at the bottom of the bitmap."""
        self._frame.cursor = 0

    def collect(self, bitmap: Bitmap) -> bool:
        """Take the next pages out of the bitmap. False when there are no more after these (there may be none)."""
        return bool(_library().frame_collect(self._at, bitmap.address, bitmap.words, *self._table))

    def seal(self, header: struct.Struct, *fields: int) -> None:
        """Put the header (its last field is the body's length) and the runs in front of what collect() took."""
        made = self._frame
        runs = made.data + made.zero
        if _library().frame_map(self._at, *self._table):
            raise AssertionError("collect() took pages that are no RAM")
        size = COUNTS.size + runs * RUN.size
        head = header.pack(*fields, size + made.left) + COUNTS.pack(made.data, made.zero)
        head += bytes(bytes_at(self._at + frame.runs.offset, runs * RUN.size))
        self._head = ctypes.create_string_buffer(head, len(head))
        _library().frame_head(self._at, ctypes.addressof(self._head), len(head))

    def write(self, fd: int) -> int:
        """Bytes that the kernel took. Raises BlockingIOError and other OSErrors."""
        return self._moved(_library().frame_write(self._at, fd))

    # Destination

    def parse(self, counts: bytes, runs: bytes, length: int) -> None:
        """Take a peer's list for a body of `length` bytes. Raises ProtocolError that names the address at fault."""
        made = self._frame
        made.data, made.zero = COUNTS.unpack(counts)
        ctypes.memmove(self._at + frame.runs.offset, runs, len(runs))
        bad = _library().frame_map(self._at, *self._table)
        if bad:
            wrong = made.runs[bad - 1]
            raise ProtocolError(
                f"PAGES from the peer: {wrong.count} pages at guest address {wrong.gpa:#x} are not guest RAM",
                "the two sides do not agree about the guest's memory",
            )
        expected = COUNTS.size + len(runs) + made.left
        if length != expected:
            raise ProtocolError(f"PAGES from the peer: {length} bytes announced, its list makes {expected}")
        made.zeros = sum(made.runs[i].count for i in range(made.data, made.data + made.zero))

    def read(self, fd: int) -> int:
        """Bytes that came and are in RAM; 0 at the end of the stream. Raises BlockingIOError, OSError, and HostError
        when this host has no memory for them."""
        result = int(_library().frame_read(self._at, fd, *self._table))
        if result <= -_STORE:
            why = os.strerror(-result - _STORE)
            raise HostError(f"guest RAM can't be written: {why}", "this host is out of memory")
        return self._moved(result)

    def clear_zeros(self) -> None:
        """Raises HostError."""
        result = _library().frame_zero(self._at, *self._table)
        if result:
            raise HostError(f"guest RAM: pages can't be given back: {os.strerror(-result)}")

    def _moved(self, result: int) -> int:
        if result == -errno.EINTR:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return int(result)


def runs_size(counts: bytes) -> int:
    """Bytes of the list that follows the counts. Raises ProtocolError for more than a frame has."""
    data, zero = COUNTS.unpack(counts)
    if data + zero > MAX_RUNS:
        raise ProtocolError(f"PAGES from the peer: {data + zero} runs (limit {MAX_RUNS})")
    return int((data + zero) * RUN.size)


def data_ranges(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """(start, size) relative to `offset` of what a file holds; its holes read as zeros. Page-aligned."""
    ranges = []
    position, end = offset, offset + size
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        if start >= end:
            break
        stop = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        ranges.append((start - offset, stop - start))
        position = stop
    return ranges
