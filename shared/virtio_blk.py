"""virtio-blk's feature bits and configuration space, for the front end and the worker alike.

Exactly Cloud Hypervisor's (machine page, section 3.1), so that a VM reads the same on both. Sizes: sectors are
512 bytes.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from shared.records import Record

SECTOR = 512
CONFIG_SIZE = 60
WRITEBACK_OFFSET = 32

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
F_TOPOLOGY, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32

BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKIOMIN, BLKIOOPT = 0x80081272, 0x1268, 0x127B, 0x1278, 0x1279
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

# capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp, alignment_offset,
# min_io_size, opt_io_size, writeback, unused, num_queues, max_discard_sectors, max_discard_seg,
# discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
assert _CONFIG.size == CONFIG_SIZE


class Geometry(Record):
    """What the image is: `size` in bytes, block sizes, and whether holes can be punched into it."""

    size: int
    block_size: int
    physical_block_exp: int
    min_io: int
    opt_io: int
    punch_holes: bool


def geometry(fd: int) -> Geometry:
    """Ask the file or block device. Raises OSError."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISBLK(mode):
        return Geometry(os.fstat(fd).st_size, SECTOR, 0, 1, 0, True)
    size = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
    logical, physical, minimum, optimal = (
        struct.unpack("I", fcntl.ioctl(fd, request, bytes(4)))[0]
        for request in (BLKSSZGET, BLKPBSZGET, BLKIOMIN, BLKIOOPT)
    )
    exponent = max(physical // logical, 1).bit_length() - 1
    return Geometry(size, logical, exponent, minimum // logical, optimal // logical, True)


def features(image: Geometry, *, readonly: bool, sparse: bool, num_queues: int) -> int:
    """Offered features, VERSION_1 included."""
    bits = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
    if readonly:
        bits |= F_RO
    elif image.punch_holes:
        bits |= F_WRITE_ZEROES | (F_DISCARD if sparse else 0)
    return bits | (F_MQ if num_queues > 1 else 0)


def config_space(image: Geometry, offered: int, *, num_queues: int, queue_size: int) -> bytes:
    """The 60 bytes at power-on, writeback cache on."""
    may_unmap = 1 if offered & F_DISCARD else 0
    return _CONFIG.pack(
        image.size // SECTOR, 0, queue_size - 2, 0, 0, 0, image.block_size, image.physical_block_exp, 0,
        image.min_io, image.opt_io, 1, 0, num_queues if num_queues > 1 else 0,
        0xFFFFFFFF, 1, image.block_size // SECTOR, 0xFFFFFFFF, 1, may_unmap,
    )  # fmt: skip
