"""Every request type against a real file, through the native loop, over a real ring."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from shared.virtio_blk import WRITEBACK_OFFSET, Feature
from tests.blk_worker.driver import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    WRITE_ZEROES,
    range_segment,
)
from tests.blk_worker.rig import Rig, image, sector_bytes

SECTORS = 2048
UNMAP = 1


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.raw", SECTORS)


def test_read_returns_what_the_file_holds(disk: Path) -> None:
    with Rig(disk).start() as rig:
        assert rig.drive[0].do(IN, 7, length=1024) == (OK, sector_bytes(7) + sector_bytes(8))


def test_write_reaches_the_file(disk: Path) -> None:
    with Rig(disk).start() as rig:
        assert rig.drive[0].do(OUT, 9, sector_bytes(9, 1))[0] == OK
    assert disk.read_bytes()[9 * 512 : 11 * 512] == sector_bytes(9, 1) + sector_bytes(10)


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("split", [1, 2, 7], ids="{}-buffers".format)
def test_ring_features_and_buffer_shapes(disk: Path, indirect: bool, event_idx: bool, split: int) -> None:
    if not indirect and split > 2:
        split = 2  # the driver spaces its heads by four
    with Rig(disk, indirect=indirect, event_idx=event_idx).start() as rig:
        data = random.Random(split).randbytes(8 * 512)
        assert rig.drive[0].do(OUT, 100, data, split=split)[0] == OK
        assert rig.drive[0].do(IN, 100, length=len(data), split=split) == (OK, data)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "o_direct"])
def test_many_in_flight_on_two_queues(disk: Path, direct: bool) -> None:
    with Rig(disk, queues=2, size=64, indirect=True, direct=direct).start() as rig:
        step = rig.backend.config.blk_size // 512
        for n in range(400):
            drive = rig.drive[n % 2]
            if not drive.free:
                assert all(status == OK for status, _ in drive.wait(8).values())
            drive.submit(OUT, n * step, sector_bytes(n, 5) * step)
            drive.kick()
        for drive in rig.drive:
            drive.wait(len(drive.pending))
        for n in range(400):
            assert rig.drive[n % 2].do(IN, n * step, length=512 * step) == (OK, sector_bytes(n, 5) * step)
        for n in range(2):
            rig.backend.stop_queue(n)
        stats = rig.backend.stats()
        assert (stats["write_ops"], stats["read_ops"]) == (400, 400)
        assert stats["write_bytes"] == 400 * 512 * step
        assert stats["inflight"] == 0
        assert stats["read_latency_min"] <= stats["read_latency_avg"] <= stats["read_latency_max"]


def test_reads_that_are_not_cached_go_to_the_io_threads(disk: Path) -> None:
    with Rig(disk, indirect=True).start() as rig, disk.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        drive = rig.drive[0]
        wanted = {drive.submit(IN, n, length=512): (OK, sector_bytes(n)) for n in range(0, SECTORS, SECTORS // 8)}
        drive.kick()
        assert drive.wait(len(wanted)) == wanted


def test_o_direct_with_buffers_that_are_not_aligned(disk: Path) -> None:
    """The driver's split in seven puts the borders at odd addresses, so that the bounce buffer is needed."""
    with Rig(disk, indirect=True, direct=True).start() as rig:
        unit = rig.backend.config.blk_size
        data = random.Random(3).randbytes(7 * unit + unit)
        assert rig.drive[0].do(OUT, 0, data, split=7)[0] == OK
        assert rig.drive[0].do(IN, 0, length=len(data), split=5) == (OK, data)
        assert rig.backend.stats()["bounced"] == 2
        assert rig.drive[0].do(IN, 0, length=len(data)) == (OK, data)
        assert rig.backend.stats()["bounced"] == 2
    assert disk.read_bytes()[: len(data)] == data


def test_o_direct_request_below_the_block_size_is_refused(disk: Path) -> None:
    with Rig(disk, indirect=True, direct=True).start() as rig:
        unit = rig.backend.config.blk_size
        assert rig.drive[0].do(IN, 0, length=unit // 2)[0] == IOERR


@pytest.mark.parametrize(
    ("sector", "length"),
    [(SECTORS, 512), (SECTORS - 1, 1024), (1 << 63, 512), ((1 << 64) - 1, 1024), (0, 100), (0, 513)],
)
@pytest.mark.parametrize("kind", [IN, OUT])
def test_out_of_range_or_misaligned_is_an_error(disk: Path, kind: int, sector: int, length: int) -> None:
    before = disk.read_bytes()
    with Rig(disk).start() as rig:
        data = b"x" * length if kind == OUT else b""
        assert rig.drive[0].do(kind, sector, data, length)[0] == IOERR
        assert rig.backend.stats()["errors"] == 1
        assert rig.drive[0].do(IN, 0, length=512) == (OK, sector_bytes(0))
    assert disk.read_bytes() == before


def test_last_sector_can_be_read(disk: Path) -> None:
    with Rig(disk).start() as rig:
        assert rig.drive[0].do(IN, SECTORS - 1, length=512) == (OK, sector_bytes(SECTORS - 1))


def test_tail_of_a_file_that_is_no_multiple_of_a_sector_is_not_there(disk: Path) -> None:
    with disk.open("ab") as file:
        file.write(b"tail")
    with Rig(disk).start() as rig:
        assert rig.backend.config.capacity == SECTORS
        assert rig.drive[0].do(IN, SECTORS, length=512)[0] == IOERR


def test_file_that_was_truncated_below_us_gives_errors(disk: Path) -> None:
    with Rig(disk).start() as rig:
        os.truncate(disk, 512)
        assert rig.drive[0].do(IN, 1, length=512)[0] == IOERR
        assert rig.drive[0].do(IN, 0, length=512) == (OK, sector_bytes(0))


def test_readonly_refuses_everything_that_writes(disk: Path) -> None:
    before = disk.read_bytes()
    with Rig(disk, readonly=True).start() as rig:
        drive = rig.drive[0]
        assert drive.do(OUT, 0, bytes(512))[0] == IOERR
        assert drive.do(DISCARD, 0, range_segment(0, 8))[0] in (IOERR, UNSUPP)
        assert drive.do(WRITE_ZEROES, 0, range_segment(0, 8))[0] in (IOERR, UNSUPP)
        assert drive.do(FLUSH)[0] == OK
        assert drive.do(IN, 0, length=512)[0] == OK
        assert rig.backend.features & Feature.RO
    assert disk.read_bytes() == before


def test_get_id_is_the_serial(disk: Path) -> None:
    with Rig(disk, serial="abc").start() as rig:
        assert rig.drive[0].do(GET_ID, length=20) == (OK, b"abc".ljust(20, b"\0"))


def test_get_id_without_serial_is_the_file_s_device_and_inode(disk: Path) -> None:
    info = disk.stat()
    wanted = f"{info.st_dev}{info.st_rdev}{info.st_ino}".encode()[:20].ljust(20, b"\0")
    with Rig(disk).start() as rig:
        assert rig.drive[0].do(GET_ID, length=20) == (OK, wanted)


def test_unknown_request_is_unsupported(disk: Path) -> None:
    with Rig(disk).start() as rig:
        assert rig.drive[0].do(99, length=512)[0] == UNSUPP
        assert rig.backend.stats()["unsupported"] == 1


def test_discard_frees_blocks_and_reads_zero(disk: Path) -> None:
    with Rig(disk).start() as rig:
        before = disk.stat().st_blocks
        assert rig.drive[0].do(DISCARD, 0, range_segment(0, 1024))[0] == OK
        assert rig.drive[0].do(IN, 512, length=512) == (OK, bytes(512))
        assert rig.drive[0].do(IN, 1024, length=512) == (OK, sector_bytes(1024))
        assert disk.stat().st_blocks < before
    assert disk.stat().st_size == SECTORS * 512


@pytest.mark.parametrize("unmap", [0, UNMAP])
@pytest.mark.parametrize("sparse", [False, True])
def test_write_zeroes_reads_zero(disk: Path, unmap: int, sparse: bool) -> None:
    with Rig(disk, sparse=sparse).start() as rig:
        assert rig.drive[0].do(WRITE_ZEROES, 0, range_segment(3, 700, unmap))[0] == OK
        assert rig.drive[0].do(IN, 2, length=1024) == (OK, sector_bytes(2) + bytes(512))
        assert rig.drive[0].do(IN, 702, length=1024) == (OK, bytes(512) + sector_bytes(703))


def test_write_zeroes_without_unmap_keeps_the_blocks(disk: Path) -> None:
    with Rig(disk).start() as rig:
        before = disk.stat().st_blocks
        assert rig.drive[0].do(WRITE_ZEROES, 0, range_segment(0, 1024))[0] == OK
        assert disk.stat().st_blocks >= before


def test_sparse_off_offers_no_discard_and_refuses_it(disk: Path) -> None:
    with Rig(disk, sparse=False).start() as rig:
        assert not rig.backend.features & Feature.DISCARD
        assert rig.backend.features & Feature.WRITE_ZEROES
        assert rig.drive[0].do(DISCARD, 0, range_segment(0, 8))[0] == UNSUPP


@pytest.mark.parametrize(
    ("kind", "segment", "wanted"),
    [
        (DISCARD, range_segment(0, 8, UNMAP), UNSUPP),
        (DISCARD, range_segment(SECTORS - 1, 2), IOERR),
        (DISCARD, range_segment((1 << 64) - 1, 2), IOERR),
        (DISCARD, range_segment(0, 8) * 2, IOERR),
        (DISCARD, range_segment(0, 8)[:12], IOERR),
        (WRITE_ZEROES, range_segment(0, 8, 2), UNSUPP),
        (WRITE_ZEROES, range_segment(SECTORS, 1), IOERR),
        (DISCARD, range_segment(0, 0), OK),
        (WRITE_ZEROES, range_segment(SECTORS, 0), OK),
    ],
)
def test_ranges_are_checked(disk: Path, kind: int, segment: bytes, wanted: int) -> None:
    before = disk.read_bytes()
    with Rig(disk).start() as rig:
        assert rig.drive[0].do(kind, 0, segment)[0] == wanted
    assert disk.read_bytes() == before


def test_without_write_back_cache_each_write_is_synced(disk: Path) -> None:
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        assert rig.backend.get_config(WRITEBACK_OFFSET, 1) == b"\1"
        drive.do(OUT, 0, bytes(512))
        assert rig.backend.stats()["syncs"] == 0
        drive.do(FLUSH)
        assert rig.backend.stats()["syncs"] == 1
        rig.backend.set_config(WRITEBACK_OFFSET, b"\0")
        assert rig.backend.get_config(WRITEBACK_OFFSET, 1) == b"\0"
        drive.do(OUT, 0, sector_bytes(0, 9))
        drive.do(WRITE_ZEROES, 0, range_segment(1, 1))
        drive.do(IN, 0, length=512)
        assert rig.backend.stats()["syncs"] == 3
    assert disk.read_bytes()[:1024] == sector_bytes(0, 9) + bytes(512)


def test_driver_without_flush_and_wce_gets_write_through(disk: Path) -> None:
    with Rig(disk) as rig:
        rig.backend.set_features(rig.features & ~(Feature.FLUSH | Feature.CONFIG_WCE))
        rig.start()
        rig.drive[0].do(OUT, 0, bytes(512))
        assert rig.backend.stats()["syncs"] == 1


def test_failure_injected_by_a_test_reaches_the_guest(disk: Path) -> None:
    with Rig(disk).start() as rig:
        rig.backend.fault("fail", 1)
        assert rig.drive[0].do(OUT, 0, bytes(512))[0] == IOERR
        assert rig.drive[0].do(OUT, 0, bytes(512))[0] == OK


def test_slow_request_does_not_hold_up_the_others(disk: Path) -> None:
    """A request that hangs in an I/O thread leaves the ring and the other threads free."""
    with Rig(disk, indirect=True) as rig:
        drive = rig.drive[0]
        rig.backend.fault("hang", 0)
        stuck = {drive.submit(OUT, 0, sector_bytes(0, 1)), drive.submit(OUT, 1, sector_bytes(1, 1))}
        # Only now: a ring thread that came upon the first request alone would carry it out itself, and hang with it.
        rig.start()
        rig.until(lambda: rig.backend.stats()["inflight"] == 2)
        rig.backend.fault("clear", 0)
        assert set(drive.wait(2)) == stuck


def test_more_than_64_ki_requests_wrap_the_indices(disk: Path) -> None:
    with Rig(disk, size=64, indirect=True).start(base=0) as rig:
        drive, done = rig.drive[0], 0
        while done < 66_000:
            while drive.free:
                drive.submit(IN, done % SECTORS, length=512)
            drive.kick()
            results = drive.wait(len(drive.pending))
            assert all(status == OK for status, _ in results.values())
            done += len(results)
        assert rig.backend.stop_queue(0) == done & 0xFFFF == drive.used_idx()
