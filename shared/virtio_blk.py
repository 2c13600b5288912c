"""virtio-blk's feature bits and configuration space (virtio 1.2, 5.2.3, 5.2.4), byte for byte as Cloud Hypervisor's.

For the front end, which tells the guest before there is a worker, and for the worker: one table, one answer.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntFlag

from shared.disk_geometry import SECTOR, Geometry
from shared.errors import ProtocolError
from shared.records import NamedTuple
from shared.typed import Any, Final


class Feature(IntFlag):
    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32


ALWAYS: Final = (
    Feature.SEG_MAX | Feature.BLK_SIZE | Feature.FLUSH | Feature.TOPOLOGY | Feature.CONFIG_WCE
    | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX | Feature.VERSION_1
)  # fmt: skip
CONFIG: Final = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
CONFIG_SIZE: Final = 60
WRITEBACK_OFFSET: Final = 32
NO_LIMIT: Final = 0xFFFF_FFFF


class BlkConfig(NamedTuple):
    """`struct virtio_blk_config` without its padding, in wire order, named as in Cloud Hypervisor's state."""

    capacity: int
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    writeback: int
    unused: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    def pack(self) -> bytes:
        return CONFIG.pack(*self)

    def with_writeback(self, writeback: int) -> BlkConfig:
        return self._replace(writeback=writeback & 1)

    def save(self) -> dict[str, Any]:
        """As Cloud Hypervisor's state has it: the geometry apart, the padding present."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self._fields if name not in _GEOMETRY}
        return state | {"geometry": {name: getattr(self, name) for name in _GEOMETRY}, "unused1": [0, 0, 0]}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> BlkConfig:
        """Raises ProtocolError for a missing field or a value that its width can't hold."""
        try:
            values = {**state, **state["geometry"]}
            config = cls(**{name: int(values[name]) for name in cls._fields})
            config.pack()
        except (KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise ProtocolError(f"block device state: config can't be read: {error}") from error
        return config


_GEOMETRY: Final = ("cylinders", "heads", "sectors")


def features(image: Geometry, *, num_queues: int, sparse: bool) -> Feature:
    """What is offered. WRITE_ZEROES stays without `sparse`: it then fills holes instead of making them."""
    bits = ALWAYS
    if image.readonly:
        bits |= Feature.RO
    if num_queues > 1:
        bits |= Feature.MQ
    if image.can_punch:
        bits |= Feature.WRITE_ZEROES
        if sparse:
            bits |= Feature.DISCARD
    return bits


def config_space(image: Geometry, *, num_queues: int, queue_size: int, sparse: bool) -> BlkConfig:
    """At power-on, writeback cache on."""
    topology = image.topology
    return BlkConfig(
        capacity=image.sectors,
        size_max=0,
        seg_max=queue_size - 2,
        cylinders=0,
        heads=0,
        sectors=0,
        blk_size=topology.logical,
        physical_block_exp=(topology.physical // topology.logical).bit_length() - 1,
        alignment_offset=0,
        min_io_size=min(topology.minimum_io // topology.logical, 0xFFFF),
        opt_io_size=topology.optimal_io // topology.logical,
        writeback=1,
        unused=0,
        num_queues=num_queues if num_queues > 1 else 0,
        max_discard_sectors=NO_LIMIT,
        max_discard_seg=1,
        discard_sector_alignment=topology.logical // SECTOR,
        max_write_zeroes_sectors=NO_LIMIT,
        max_write_zeroes_seg=1,
        write_zeroes_may_unmap=int(image.can_punch and sparse),
    )
