"""shared.virtio_blk and shared.disk_geometry: the configuration space byte by byte, and what makes it differ."""

from __future__ import annotations

import struct

import pytest

from blk_worker.backend import BlockBackend
from blk_worker.disk import open_disk
from controller.config.model import DiskConfig
from controller.disks import open_image
from controller.early_device import disk_device
from controller.vhost_frontend import Frontend
from shared import virtio_blk as vb
from shared.disk_geometry import Geometry, Topology, measure
from shared.errors import ProtocolError
from shared.memory import GuestMemory
from shared.reactor import Reactor
from shared.virtio_blk import Feature

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def geometry(image):
    with open(image, "r+b") as file:
        return measure(file.fileno())


def test_geometry_of_a_file(geometry):
    assert geometry == Geometry(SIZE, block_device=False, readonly=False, can_punch=True, topology=Topology())


def test_a_part_of_a_sector_at_the_end_is_not_the_guests(image):
    with open(image, "ab") as file:
        file.write(b"tail")
        file.flush()
        space = vb.config_space(measure(file.fileno()), num_queues=1, queue_size=128, sparse=True).pack()
    assert struct.unpack_from("<Q", space)[0] == SIZE // 512


def test_configuration_space_by_offset(geometry):
    """Offsets: virtio 1.2, section 5.2.4."""
    space = vb.config_space(geometry, num_queues=2, queue_size=128, sparse=True).pack()
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
        (False, True, 1, Feature.WRITE_ZEROES | Feature.DISCARD, Feature.RO | Feature.MQ),
        (False, False, 1, Feature.WRITE_ZEROES, Feature.DISCARD),
        (True, True, 1, Feature.RO, Feature.WRITE_ZEROES | Feature.DISCARD),
        (False, True, 4, Feature.MQ, 0),
    ],
)
def test_features_follow_the_disks_options(geometry, readonly, sparse, queues, bits, missing):
    image = geometry._replace(readonly=readonly, can_punch=not readonly)
    offered = vb.features(image, sparse=sparse, num_queues=queues)
    assert offered & bits == bits and not offered & missing
    assert offered & Feature.VERSION_1 and offered & Feature.FLUSH and offered & Feature.RING_EVENT_IDX


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("readonly", [False, True], ids=["rw", "ro"])
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("queues", [1, 2, 8])
def test_the_worker_offers_what_the_front_end_told_the_guest(image, readonly, sparse, queues, direct):
    """The front end answers before its worker is up (controller/early_device.py): they must agree to the byte."""
    options = DiskConfig(
        id="_disk0", path=str(image), readonly=readonly, direct=direct, sparse=sparse, num_queues=queues, queue_size=256
    )
    reactor, memory = Reactor(), GuestMemory.create(1 << 20)
    fd = open_image(options, first=True)
    device = disk_device(reactor, Frontend(reactor, memory, "_disk0"), options, fd)
    backend = BlockBackend(
        reactor, open_disk(str(image), fd=fd, readonly=readonly, direct=direct),
        num_queues=queues, queue_size=256, sparse=sparse,
    )  # fmt: skip
    try:
        assert device.features == backend.features
        assert device.config == backend.config.pack()
    finally:
        backend.close()
        memory.close()
        reactor.close()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1 << 64, -1, "x", None, [1]])
def test_a_saved_configuration_with_a_number_that_is_none_is_refused(geometry, value):
    saved = vb.config_space(geometry, num_queues=1, queue_size=128, sparse=True).save()
    with pytest.raises(ProtocolError, match="config can't be read"):
        vb.BlkConfig.load({**saved, "capacity": value})
