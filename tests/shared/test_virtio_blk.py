"""shared.virtio_blk: the configuration space byte by byte, and that front end and worker tell the guest the same."""

from __future__ import annotations

import struct

import pytest

from blk_worker.config import config_of, features_of
from blk_worker.disk import open_disk
from shared import virtio_blk as vb

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def geometry(image):
    with open(image, "rb") as file:
        return vb.geometry(file.fileno())


def test_geometry_of_a_file(geometry):
    assert geometry == vb.Geometry(SIZE, 512, 0, 1, 0, True)


def test_a_part_of_a_sector_at_the_end_is_not_the_guests(image):
    with open(image, "ab") as file:
        file.write(b"tail")
        file.flush()
        space = vb.config_space(vb.geometry(file.fileno()), 0, num_queues=1, queue_size=128)
    assert struct.unpack_from("<Q", space)[0] == SIZE // 512


def test_configuration_space_by_offset(geometry):
    """Offsets: virtio 1.2, section 5.2.4."""
    offered = vb.features(geometry, readonly=False, sparse=True, num_queues=2)
    space = vb.config_space(geometry, offered, num_queues=2, queue_size=128)
    assert len(space) == vb.CONFIG_SIZE
    fields = {
        "capacity": ("<Q", 0, SIZE // 512), "size_max": ("<I", 8, 0), "seg_max": ("<I", 12, 126),
        "blk_size": ("<I", 20, 512), "writeback": ("<B", 32, 1), "num_queues": ("<H", 34, 2),
        "max_discard_sectors": ("<I", 36, 0xFFFFFFFF), "max_discard_seg": ("<I", 40, 1),
        "discard_sector_alignment": ("<I", 44, 1), "max_write_zeroes_sectors": ("<I", 48, 0xFFFFFFFF),
        "max_write_zeroes_seg": ("<I", 52, 1), "write_zeroes_may_unmap": ("<B", 56, 1),
    }  # fmt: skip
    assert {name: struct.unpack_from(kind, space, at)[0] for name, (kind, at, _) in fields.items()} == {
        name: value for name, (_, _, value) in fields.items()
    }


@pytest.mark.parametrize(
    ("readonly", "sparse", "queues", "bits", "missing"),
    [
        (False, True, 1, vb.F_WRITE_ZEROES | vb.F_DISCARD, vb.F_RO | vb.F_MQ),
        (False, False, 1, vb.F_WRITE_ZEROES, vb.F_DISCARD),
        (True, True, 1, vb.F_RO, vb.F_WRITE_ZEROES | vb.F_DISCARD),
        (False, True, 4, vb.F_MQ, 0),
    ],
)
def test_features_follow_the_disks_options(geometry, readonly, sparse, queues, bits, missing):
    offered = vb.features(geometry, readonly=readonly, sparse=sparse, num_queues=queues)
    assert offered & bits == bits and not offered & missing
    assert offered & vb.F_VERSION_1 and offered & vb.F_FLUSH and offered & vb.F_EVENT_IDX


@pytest.mark.parametrize("readonly", [False, True], ids=["rw", "ro"])
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("queues", [1, 2, 8])
def test_the_worker_offers_what_the_front_end_told_the_guest(image, geometry, readonly, sparse, queues):
    """The front end answers before its worker is up (controller/early_device.py): they must agree to the byte."""
    disk = open_disk(str(image), readonly=readonly)
    try:
        offered = vb.features(geometry, readonly=readonly, sparse=sparse, num_queues=queues)
        assert offered == int(features_of(disk, queues, sparse))
        space = vb.config_space(geometry, offered, num_queues=queues, queue_size=256)
        writable = bytearray(config_of(disk, queues, 256, sparse).pack())
        if readonly:  # neither is offered, so the driver reads no field of it
            writable[56] = space[56]
        assert space == bytes(writable)
    finally:
        disk.close()
