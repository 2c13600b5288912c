"""The native loop's latency histograms: every operation is in one bucket, and in the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import latency
from tests.blk_worker.driver import FLUSH, IN, OK, OUT
from tests.blk_worker.rig import Rig, image, sector_bytes


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.raw")


def test_buckets_of_all_queues_add_up_to_the_operations(disk: Path) -> None:
    with Rig(disk, queues=2).start() as rig:
        for number in range(60):
            assert rig.drive[number % 2].do(OUT, number, sector_bytes(number, 1))[0] == OK
            assert rig.drive[number % 2].do(IN, number, length=512)[0] == OK
        assert rig.drive[0].do(FLUSH, 0)[0] == OK
        for queue in range(2):
            rig.backend.stop_queue(queue)
        stats = rig.backend.stats()
    for operation, count in (("read", 60), ("write", 60), ("flush", 1), ("discard", 0)):
        total, buckets = latency.read(operation, stats)
        assert sum(buckets) == stats[f"{operation}_ops"] == count
        if count:
            assert total // count == stats[f"{operation}_latency_avg"]


def test_a_slow_operation_is_in_no_bucket_below_its_latency(disk: Path) -> None:
    with Rig(disk).start() as rig:
        rig.backend.fault("delay", 70)
        assert rig.drive[0].do(IN, 0, length=512)[0] == OK
        rig.backend.stop_queue(0)
        _, buckets = latency.read("read", rig.backend.stats())
    assert sum(buckets) == 1
    assert [upper for upper, count in zip(latency.UPPER_SECONDS, buckets, strict=False) if count and upper < 0.07] == []


def test_a_failed_operation_is_in_no_bucket(disk: Path) -> None:
    with Rig(disk).start() as rig:
        assert rig.drive[0].do(IN, 1 << 40, length=512)[0] != OK
        rig.backend.stop_queue(0)
        stats = rig.backend.stats()
    assert (stats["read_ops"], sum(latency.read("read", stats)[1])) == (0, 0)
