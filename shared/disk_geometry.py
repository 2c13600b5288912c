"""What a raw disk image or block device is: its size, its block sizes, and what can be done to it.

Asked by the controller, which tells the guest before there is a worker, and by the worker: one measurement, one answer.

Sources: Linux Documentation/ABI/stable/sysfs-block, include/uapi/linux/fs.h (ioctls), statx(2), open(2) on O_DIRECT.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct

from shared.linux import check, libc
from shared.records import NamedTuple

BLKGETSIZE64 = 0x8008_1272
BLKSSZGET = 0x1268
BLKPBSZGET = 0x127B
BLKIOMIN = 0x1278
BLKIOOPT = 0x1279
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
AT_EMPTY_PATH = 0x1000
STATX_DIOALIGN = 0x2000
SECTOR = 512
PAGE = 4096

libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


class statx(ctypes.Structure):
    """The head and the two fields of `struct statx` that are read here."""

    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("_before", ctypes.c_uint8 * 0x94),
        ("stx_dio_mem_align", ctypes.c_uint32),
        ("stx_dio_offset_align", ctypes.c_uint32),
        ("_after", ctypes.c_uint8 * 0x60),
    )


class Topology(NamedTuple):
    """Sizes in bytes, as the disk or its file system reports them."""

    logical: int = SECTOR
    physical: int = SECTOR
    minimum_io: int = SECTOR
    optimal_io: int = 0


class Geometry(NamedTuple):
    """`size` in bytes; `sectors` of 512 bytes, without a part of one at the end."""

    size: int
    block_device: bool
    readonly: bool
    can_punch: bool
    topology: Topology
    memory_align: int = 1  # O_DIRECT: of buffers, bytes
    offset_align: int = 1  # O_DIRECT: of offset and length, bytes

    @property
    def sectors(self) -> int:
        return self.size // SECTOR


def measure(fd: int, *, readonly: bool = False, direct: bool = False) -> Geometry:
    """Ask the file or block device. Raises OSError."""
    info = os.fstat(fd)
    block_device = stat.S_ISBLK(info.st_mode)
    if block_device:
        size: int = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
        topology = _block_topology(fd)
    else:
        size = info.st_size
        topology = Topology()
    memory_align, offset_align = _direct_alignment(fd, topology) if direct else (1, 1)
    if direct and not block_device and offset_align > topology.logical:
        # The guest must ask in units that the file system below can carry out.
        topology = Topology(offset_align, max(offset_align, topology.physical), offset_align)
    can_punch = not readonly and _can_punch(fd, info, block_device, size)
    return Geometry(size, block_device, readonly, can_punch, topology, memory_align, offset_align)


def _block_topology(fd: int) -> Topology:
    def ask(request: int) -> int:
        answer: int = struct.unpack("I", fcntl.ioctl(fd, request, bytes(4)))[0]
        return answer

    return Topology(ask(BLKSSZGET), ask(BLKPBSZGET), ask(BLKIOMIN), ask(BLKIOOPT))


def _direct_alignment(fd: int, topology: Topology) -> tuple[int, int]:
    """(buffer, offset) alignment that O_DIRECT needs; a guess on the safe side before Linux 6.1."""
    info = statx()
    assert ctypes.sizeof(info) == 256
    check(libc.statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, ctypes.byref(info)), "statx")
    if info.stx_mask & STATX_DIOALIGN and info.stx_dio_offset_align:
        return info.stx_dio_mem_align, info.stx_dio_offset_align
    return PAGE, topology.logical


def _can_punch(fd: int, info: os.stat_result, block_device: bool, size: int) -> bool:
    if block_device:
        return _discards(info.st_rdev)
    # A hole behind the end: the file system either knows the operation or not, and nothing is there to lose.
    end = (size + PAGE - 1) & -PAGE
    return bool(libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, end, PAGE) == 0)


def _discards(device: int) -> bool:
    """Whether a block device's queue takes discards; a partition has its disk's queue."""
    base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{base}/queue", f"{base}/../queue"):
        try:
            with open(f"{queue}/discard_max_bytes") as file:
                return int(file.read()) > 0
        except OSError:
            continue
    return False
