"""shared.pages: bitmaps, and frames whose lists are checked before a byte is written."""

from __future__ import annotations

import ctypes
import fcntl
import random
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import HostError, ProtocolError
from shared.linux import F_ADD_SEALS, bytes_at, memfd
from shared.pages import (
    COUNTS,
    MAX_DATA_PAGES,
    MAX_RUNS,
    PAGE_SIZE,
    RUN,
    Bitmap,
    Frame,
    Regions,
    data_ranges,
    runs_size,
)  # fmt: skip

HEADER = struct.Struct("<HHI")
F_SEAL_FUTURE_WRITE = 0x10
LOW, HIGH_GPA, HIGH = 2 << 20, 1 << 32, 1 << 20


class Ram:
    """Two regions with a hole between them, as a guest of more than 3 GiB has."""

    def __init__(self) -> None:
        parts = [(0, LOW, 0), (HIGH_GPA, HIGH, 4 * PAGE_SIZE)]
        self.regions = Regions([(g, s, o, memfd("ram", o + s)) for g, s, o in parts], writable=True)
        self.views = [bytes_at(entry.host, entry.size) for entry in self.regions.table]

    def page(self, gpa: int) -> memoryview:
        view, start = (self.views[0], gpa) if gpa < LOW else (self.views[1], gpa - HIGH_GPA)
        return view[start : start + PAGE_SIZE]

    def close(self) -> None:
        self.views = []
        self.regions.close()


def bitmap() -> Bitmap:
    size = Bitmap.bytes_for(HIGH_GPA + HIGH)
    return Bitmap(memfd("bits", size), size)


@pytest.fixture
def ram():
    made = Ram()
    yield made
    made.close()


@pytest.fixture
def copy():
    made = Ram()
    yield made
    made.close()


@pytest.fixture
def bits():
    made = bitmap()
    yield made
    made.close()


def move(source: Frame, sink: Frame, bits: Bitmap) -> tuple[int, int]:
    """All of the bitmap through a socket; pages with contents and without."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    pages = zeros = 0
    source.rewind()
    more = True
    with ours, theirs:
        while more:
            more = source.collect(bits)
            source.seal(HEADER, 10, 0)
            pages, zeros = pages + source.pages, zeros + source.zeros
            head = b""
            while source.left:
                try:
                    source.write(ours.fileno())
                except BlockingIOError:
                    pass
                if not head:
                    head = theirs.recv(HEADER.size + COUNTS.size, socket.MSG_WAITALL)
                    counts = head[HEADER.size :]
                    runs = theirs.recv(runs_size(counts), socket.MSG_WAITALL) if runs_size(counts) else b""
                    sink.parse(counts, runs, HEADER.unpack(head[: HEADER.size])[2])
                    sink.clear_zeros()
                if sink.left:
                    sink.read(theirs.fileno())
            while sink.left:
                assert sink.read(theirs.fileno())
    return pages, zeros


@given(st.sets(st.integers(0, (LOW + HIGH) // PAGE_SIZE - 1), max_size=300), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_exactly_the_marked_pages_arrive_and_zero_pages_cost_no_bytes(marked, seed):
    generator = random.Random(seed)
    ram, copy, bits = Ram(), Ram(), bitmap()
    try:
        addresses = [n * PAGE_SIZE if n * PAGE_SIZE < LOW else HIGH_GPA + n * PAGE_SIZE - LOW for n in sorted(marked)]
        expected = 0
        for gpa in addresses:
            bits.set(gpa, PAGE_SIZE)
            copy.page(gpa)[:] = b"\xff" * PAGE_SIZE  # so that a zero page has something to clear
            if generator.random() < 0.5:
                ram.page(gpa)[generator.randrange(PAGE_SIZE)] = 7
                expected += 1
        assert move(Frame(ram.regions), Frame(copy.regions), bits) == (expected, len(addresses) - expected)
        assert bits.count() == 0
        assert all(bytes(a) == bytes(b) for a, b in zip(ram.views, copy.views, strict=True))
    finally:
        for made in (ram, copy, bits):
            made.close()


def test_a_marked_page_that_is_no_ram_is_left_out(ram, copy, bits):
    bits.set(LOW, 16 * PAGE_SIZE)
    assert move(Frame(ram.regions), Frame(copy.regions), bits) == (0, 0) and bits.count() == 0


def test_what_was_not_collected_stays_in_the_bitmap(ram, bits):
    for view in ram.views:
        view[::PAGE_SIZE] = b"\1" * (len(view) // PAGE_SIZE)
    bits.set(0, LOW)
    bits.set(HIGH_GPA, HIGH)
    source = Frame(ram.regions)
    assert source.collect(bits)
    assert source.pages == MAX_DATA_PAGES and bits.count() == (LOW + HIGH) // PAGE_SIZE - MAX_DATA_PAGES


def test_bits_of_a_slot_are_added_at_its_address_and_a_shared_log_is_emptied(bits):
    words = (ctypes.c_uint64 * 1)(5)
    assert bits.add(HIGH_GPA, ctypes.addressof(words), 1) == 2
    log = bitmap()
    log.set(3 * PAGE_SIZE, 1)
    assert bits.take(log) == 1 and log.count() == 0 and bits.count() == 3
    log.close()
    with pytest.raises(ValueError, match="does not fit"):
        bits.add(HIGH_GPA + HIGH, ctypes.addressof(words), 100)
    with pytest.raises(ValueError, match="not within"):
        bits.set(HIGH_GPA + HIGH + (64 << 12), PAGE_SIZE)


BAD_RUNS = [
    (LOW, 1, "beyond the first region"),
    (LOW - PAGE_SIZE, 2, "out of the first region"),
    (HIGH_GPA - PAGE_SIZE, 2, "into the second region"),
    (HIGH_GPA + HIGH, 1, "beyond everything"),
    (1 << 63, 1, "far beyond everything"),
    (2**64 - PAGE_SIZE, 2, "round the end of the numbers"),
    (0, 2**64 - 1, "more pages than there are numbers"),
    (0, 2**52, "a length that overflows in bytes"),
    (12, 1, "not at a page"),
    (0, 0, "nothing"),
    (0, MAX_DATA_PAGES + 1, "too much"),
]


@pytest.mark.parametrize("kind", ["data", "zero"])
@pytest.mark.parametrize(("gpa", "count", "why"), BAD_RUNS, ids=[why for _, _, why in BAD_RUNS])
def test_an_address_outside_ram_is_refused_by_name_before_a_byte_is_written(ram, kind, gpa, count, why):
    ram.page(0)[:] = b"\xaa" * PAGE_SIZE
    runs = RUN.pack(0, 1) + RUN.pack(gpa, count)
    if kind == "zero" and why == "too much":
        return  # zeros have no such limit: they cost nothing
    counts = COUNTS.pack(2, 0) if kind == "data" else COUNTS.pack(0, 2)
    with pytest.raises(ProtocolError, match=f"guest address {gpa:#x} are not guest RAM"):
        Frame(ram.regions).parse(counts, runs, COUNTS.size + len(runs) + PAGE_SIZE * (1 + count))
    assert bytes(ram.page(0)) == b"\xaa" * PAGE_SIZE


def test_a_length_that_does_not_fit_its_list_is_refused(ram):
    with pytest.raises(ProtocolError, match="its list makes"):
        Frame(ram.regions).parse(COUNTS.pack(1, 0), RUN.pack(0, 1), COUNTS.size + RUN.size + PAGE_SIZE - 1)


@pytest.mark.parametrize("counts", [(MAX_RUNS, 1), (0, MAX_RUNS + 1), (2**32 - 1, 2**32 - 1)])
def test_too_many_runs_are_refused(counts):
    with pytest.raises(ProtocolError, match="runs"):
        runs_size(COUNTS.pack(*counts))


def test_only_what_a_file_holds_is_listed(ram):
    assert data_ranges(ram.regions.table[0].fd, 0, LOW) == []
    ram.page(8 * PAGE_SIZE)[0] = 1
    ram.page(HIGH_GPA)[0] = 1
    assert data_ranges(ram.regions.table[0].fd, 0, LOW) == [(8 * PAGE_SIZE, PAGE_SIZE)]
    assert data_ranges(ram.regions.table[1].fd, 4 * PAGE_SIZE, HIGH) == [(0, PAGE_SIZE)]


def test_a_stream_that_ends_and_one_that_breaks_are_told_apart(ram):
    frame = Frame(ram.regions)
    frame.parse(COUNTS.pack(1, 0), RUN.pack(0, 1), COUNTS.size + RUN.size + PAGE_SIZE)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours:
        with pytest.raises(BlockingIOError):
            frame.read(ours.fileno())
        theirs.send(b"x" * 100)
        theirs.close()
        assert frame.read(ours.fileno()) == 100 and frame.left == PAGE_SIZE - 100
        assert frame.read(ours.fileno()) == 0


def test_ram_that_takes_nothing_is_told_from_a_stream_that_breaks(ram):
    """A region's file that can't be written any more stands for a host that has no memory left."""
    frame = Frame(ram.regions)
    frame.parse(COUNTS.pack(1, 0), RUN.pack(0, 1), COUNTS.size + RUN.size + PAGE_SIZE)
    fcntl.fcntl(ram.regions.table[0].fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x" * 100)
        with pytest.raises(HostError, match="guest RAM can't be written: Operation not permitted"):
            frame.read(ours.fileno())
