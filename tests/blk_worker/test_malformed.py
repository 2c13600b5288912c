"""What a hostile guest can put into a ring costs its own requests or its own queue, nothing else."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.linux import bytes_at, memfd, mmap_fd
from shared.native_ring import VringError
from shared.vhost_backend import Mapping
from shared.virtio_blk import Feature
from tests.blk_worker.driver import GPA, IN, INDIRECT, NEXT, OK, OUT, WRITE, Driver, Memory
from tests.blk_worker.rig import Rig, image, sector_bytes

SIZE = 16


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.raw", 64)


@pytest.fixture
def rig(disk: Path) -> Iterator[Rig]:
    with Rig(disk, indirect=True).start() as rig:
        yield rig


def desc(driver: Driver, slot: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
    driver.memory.write(driver.desc + 16 * slot, struct.pack("<QIHH", gpa, length, flags, following))


def header(driver: Driver, kind: int = IN) -> int:
    at = driver.slot(0)
    driver.memory.write(at, struct.pack("<IIQ", kind, 0, 0))
    return at


def expect(rig: Rig, wanted: VringError) -> None:
    """The chain at head 0 comes back with no byte written, is counted under its name, and the queue goes on."""
    drive = rig.drive[0]
    before = rig.backend.stats()["malformed"]
    drive.offer(0)
    drive.kick()
    rig.until(lambda: drive.used_idx() != drive.used_seen)
    assert struct.unpack("<II", drive.memory.read(drive.used + 4 + 8 * (drive.used_seen % SIZE), 8)) == (0, 0)
    drive.used_seen += 1
    assert rig.backend.stats()["malformed"] == before + 1
    assert VringError(rig.backend.counters(0).last_malformed) is wanted
    drive.free = [n for n in drive.free if n]
    assert drive.do(IN, 3, length=512) == (OK, sector_bytes(3))


def test_loop(rig: Rig) -> None:
    at = header(rig.drive[0])
    desc(rig.drive[0], 0, at, 16, NEXT, 1)
    desc(rig.drive[0], 1, at, 16, NEXT, 0)
    expect(rig, VringError.TOO_LONG)


def test_next_outside_the_table(rig: Rig) -> None:
    desc(rig.drive[0], 0, header(rig.drive[0]), 16, NEXT, SIZE)
    expect(rig, VringError.BAD_NEXT)


@pytest.mark.parametrize(
    ("gpa", "length"), [(0, 16), (GPA - 8, 16), ((1 << 64) - 8, 16), (GPA, 0xFFFF_FFFF), (1 << 63, 1)]
)
def test_address_outside_guest_memory(rig: Rig, gpa: int, length: int) -> None:
    desc(rig.drive[0], 0, header(rig.drive[0]), 16, NEXT, 1)
    desc(rig.drive[0], 1, gpa, length, WRITE)
    expect(rig, VringError.BAD_ADDRESS)


def test_empty_buffer(rig: Rig) -> None:
    desc(rig.drive[0], 0, header(rig.drive[0]), 0, 0)
    expect(rig, VringError.ZERO_LENGTH)


def test_readable_after_writable(rig: Rig) -> None:
    at = header(rig.drive[0])
    desc(rig.drive[0], 0, at, 16, WRITE | NEXT, 1)
    desc(rig.drive[0], 1, at, 16, 0)
    expect(rig, VringError.BAD_ORDER)


@pytest.mark.parametrize("length", [0, 8, 17], ids="{}-bytes".format)
def test_indirect_table_of_a_wrong_size(rig: Rig, length: int) -> None:
    desc(rig.drive[0], 0, rig.drive[0].slot(0), length, INDIRECT)
    expect(rig, VringError.BAD_INDIRECT)


def test_indirect_with_next(rig: Rig) -> None:
    desc(rig.drive[0], 0, rig.drive[0].slot(0), 32, INDIRECT | NEXT, 1)
    expect(rig, VringError.BAD_INDIRECT)


def test_indirect_inside_indirect(rig: Rig) -> None:
    table = rig.drive[0].slot(0) + 64
    rig.memory.write(table, struct.pack("<QIHH", table, 16, INDIRECT, 0))
    desc(rig.drive[0], 0, table, 16, INDIRECT)
    expect(rig, VringError.BAD_INDIRECT)


def test_indirect_next_outside_its_table(rig: Rig) -> None:
    table = rig.drive[0].slot(0) + 64
    rig.memory.write(table, struct.pack("<QIHH", header(rig.drive[0]), 16, NEXT, 1))
    desc(rig.drive[0], 0, table, 16, INDIRECT)
    expect(rig, VringError.BAD_NEXT)


def test_indirect_loop(rig: Rig) -> None:
    table = rig.drive[0].slot(0) + 64
    rig.memory.write(table, struct.pack("<QIHH", header(rig.drive[0]), 16, NEXT, 0))
    desc(rig.drive[0], 0, table, 16, INDIRECT)
    expect(rig, VringError.TOO_LONG)


def test_indirect_not_negotiated(disk: Path) -> None:
    with Rig(disk, indirect=False).start() as rig:
        table = rig.drive[0].slot(0) + 64
        rig.memory.write(table, struct.pack("<QIHH", header(rig.drive[0]), 16, 0, 0))
        desc(rig.drive[0], 0, table, 16, INDIRECT)
        expect(rig, VringError.BAD_INDIRECT)


def test_table_behind_direct_descriptors_is_allowed(rig: Rig) -> None:
    """virtio 1.2, 2.7.5.3.2: zero or more normal descriptors, then one that is indirect."""
    drive = rig.drive[0]
    at = header(drive)
    table = at + 64
    rig.memory.write(table, struct.pack("<QIHH", at + 4096, 512, WRITE | NEXT, 1))
    rig.memory.write(table + 16, struct.pack("<QIHH", at + 32, 1, WRITE, 0))
    desc(drive, 0, at, 16, NEXT, 1)
    desc(drive, 1, table, 32, INDIRECT)
    drive.offer(0)
    drive.kick()
    rig.until(lambda: drive.used_idx() == 1)
    assert rig.memory.read(at + 4096, 512) == sector_bytes(0)
    assert rig.memory.read(at + 32, 1) == bytes([OK])


@pytest.mark.parametrize("shape", ["header-only", "no-header", "short-header"])
def test_chain_that_is_no_request(rig: Rig, shape: str) -> None:
    at = header(rig.drive[0])
    if shape == "header-only":
        desc(rig.drive[0], 0, at, 16, 0)
    elif shape == "no-header":
        desc(rig.drive[0], 0, at, 16, WRITE)
    else:
        desc(rig.drive[0], 0, at, 15, NEXT, 1)
        desc(rig.drive[0], 1, at + 32, 1, WRITE)
    expect(rig, VringError.BAD_REQUEST)


def test_header_and_status_may_be_cut_anywhere(rig: Rig) -> None:
    """virtio 1.2, 2.7.4: no assumption about how a message is spread over descriptors."""
    drive = rig.drive[0]
    drive.memory.write(drive.slot(0), struct.pack("<IIQ", OUT, 0, 5) + sector_bytes(5, 77))
    at, table = drive.slot(0), drive.slot(1)
    cuts = [(at, 3, 0), (at + 3, 13 + 100, 0), (at + 116, 412, 0), (at + 4096, 1, WRITE)]
    for n, (gpa, length, flags) in enumerate(cuts):
        more = NEXT if n < 3 else 0
        rig.memory.write(table + 16 * n, struct.pack("<QIHH", gpa, length, flags | more, n + 1))
    desc(drive, 0, table, 64, INDIRECT)
    drive.offer(0)
    drive.kick()
    rig.until(lambda: drive.used_idx() == 1)
    assert rig.memory.read(at + 4096, 1) == bytes([OK])
    drive.used_seen = 1
    drive.free.remove(0)
    assert drive.do(IN, 5, length=512) == (OK, sector_bytes(5, 77))


@pytest.mark.parametrize("way", [VringError.BAD_HEAD, VringError.BAD_INDEX, VringError.HEAD_IN_USE])
def test_broken_ring_stops_its_queue_and_no_other(disk: Path, way: VringError) -> None:
    with Rig(disk, queues=2, indirect=True) as rig:
        drive = rig.drive[0]
        broken: list[int] = []
        rig.backend.on_broken = broken.append
        if way is VringError.HEAD_IN_USE:
            rig.backend.fault("hang", 0)
            drive.submit(IN, 0, length=512)
            drive.submit(IN, 0, length=512)
            drive.offer(next(iter(drive.pending)))
        elif way is VringError.BAD_HEAD:
            drive.offer(SIZE)
        else:
            drive.memory.u16(drive.avail + 2)[0] = SIZE + 1
        # Only now: a ring thread that came upon the first request alone would carry it out itself, and hang with it.
        rig.start()
        rig.until(lambda: rig.backend.counters(0).broken != 0)
        assert rig.backend.counters(0).broken == way
        rig.until(lambda: broken == [0])
        rig.backend.fault("clear", 0)
        assert rig.drive[1].do(IN, 1, length=512) == (OK, sector_bytes(1))
        assert rig.backend.stats()["broken_queues"] == 1
        rig.backend.stop_queue(0)


# Fuzz -----------------------------------------------------------------------------------------------------------

CANARY = 0xA5
PAGES = 32
address = st.one_of(
    st.integers(GPA, GPA + PAGES * 4096 - 1),
    st.sampled_from([0, GPA - 1, GPA - 4096, GPA + PAGES * 4096 - 1, GPA + PAGES * 4096, (1 << 64) - 16, 1 << 63]),
)
length = st.one_of(st.integers(0, 20000), st.sampled_from([1, 16, 512, 0xFFFF_FFFF, 1 << 31]))
descriptor = st.tuples(address, length, st.integers(0, 15), st.integers(0, SIZE + 2))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, memoryview]]:
    """A device whose guest memory lies between two canaries in one mapping."""
    total = PAGES * 4096 * 3
    fd = memfd("fuzz", total)
    base = mmap_fd(fd, total)
    everything = bytes_at(base, total)
    memory = Memory.__new__(Memory)
    memory.size, memory.fd, memory.address = PAGES * 4096, fd, base + PAGES * 4096
    memory.view = bytes_at(memory.address, memory.size)
    rig = Rig(
        image(tmp_path_factory.mktemp("fuzz") / "disk.raw", 64), size=SIZE, indirect=True, memory=memory, inflight=True
    )
    yield rig, everything
    everything.release()
    memory.address = base
    memory.size = total
    rig.close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    table=st.lists(descriptor, min_size=SIZE, max_size=SIZE),
    scattered=st.lists(st.tuples(st.integers(0, PAGES * 256 - 1), descriptor), max_size=40),
    heads=st.lists(st.integers(0, SIZE + 1), max_size=SIZE),
    claimed=st.integers(0, SIZE + 2),
    seed=st.integers(0, 1 << 32),
    indirect=st.booleans(),
)
def test_random_rings_touch_nothing_outside_guest_memory(
    fuzzed: tuple[Rig, memoryview],
    table: list[tuple[int, int, int, int]],
    scattered: list[tuple[int, tuple[int, int, int, int]]],
    heads: list[int],
    claimed: int,
    seed: int,
    indirect: bool,
) -> None:
    rig, everything = fuzzed
    everything[:] = bytes([CANARY]) * len(everything)
    memory, drive = rig.memory, rig.drive[0]
    memory.view[:] = random.Random(seed).randbytes(64) * (memory.size // 64)
    for at, entry in scattered:
        memory.write(GPA + 16 * at, struct.pack("<QIHH", *entry))
    # Plausible request headers, so that more than the parser is reached.
    for n, kind in enumerate((IN, OUT, 4, 8, 11, 13)):
        memory.write(GPA + 0x4000 + 64 * n, struct.pack("<IIQ", kind, 0, seed % 70))
    for slot, entry in enumerate(table):
        memory.write(drive.desc + 16 * slot, struct.pack("<QIHH", *entry))
    for n, head in enumerate(heads):
        memory.u16(drive.avail + 4 + 2 * n)[0] = head
    memory.u16(drive.used + 2)[0] = 0
    memory.u16(drive.avail + 2)[0] = claimed
    assert rig.inflight is not None
    rig.inflight.view[:] = bytes(rig.inflight.size)
    rig.backend.set_features(rig.features if indirect else rig.features & ~Feature.RING_INDIRECT_DESC)
    before = rig.backend.counters(0).epoch
    rig.backend.start_queue(rig.ring(0, 0))
    # A turn that began after the start has taken what there was; stop_queue waits for it. (The indices can't tell: a
    # read may have been aimed at the ring itself.)
    rig.until(lambda: rig.backend.counters(0).epoch > before)
    rig.backend.stop_queue(0)
    margin = PAGES * 4096
    assert bytes(everything[:margin]) == bytes([CANARY]) * margin
    assert bytes(everything[2 * margin :]) == bytes([CANARY]) * margin


def test_ring_that_spans_regions_with_a_gap(disk: Path) -> None:
    """A buffer over two adjacent regions is served, one into a gap is refused."""
    with Rig(disk, indirect=True) as rig:
        drive = rig.drive[0]
        cut = drive.slot(1) + 4096 + 200 - GPA
        gap = drive.slot(3) - GPA
        host = rig.memory.address
        rig.backend.set_memory((
            Mapping(GPA, cut, 0, host),
            Mapping(GPA + cut, gap - cut, 0, host + cut),
            Mapping(GPA + gap + 4096, rig.memory.size - gap - 4096, 0, host + gap + 4096),
        ))  # fmt: skip
        rig.start()
        drive.free = [1]
        assert drive.do(IN, 2, length=1024) == (OK, sector_bytes(2) + sector_bytes(3))
        desc(drive, 0, GPA + gap - 8, 16, 0)
        expect(rig, VringError.BAD_ADDRESS)

