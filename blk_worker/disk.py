"""A raw disk image or block device: opened, measured, and what it can do found out.

Sources: Linux Documentation/ABI/stable/sysfs-block, include/uapi/linux/fs.h (ioctls), statx(2), open(2) on O_DIRECT.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
from dataclasses import dataclass

from shared.errors import ConfigError
from shared.linux import check, libc

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
ID_BYTES = 20

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


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes in bytes, as the disk or its file system reports them."""

    logical: int = SECTOR
    physical: int = SECTOR
    minimum_io: int = SECTOR
    optimal_io: int = 0


@dataclass(frozen=True, slots=True)
class Disk:
    """An open disk. `fd` belongs to it and may share its open file description with the controller, which locks it."""

    path: str
    fd: int
    sectors: int
    readonly: bool
    direct: bool
    block_device: bool
    can_punch: bool
    topology: Topology
    memory_align: int  # O_DIRECT: of buffers, bytes
    offset_align: int  # O_DIRECT: of offset and length, bytes
    identity: bytes  # what GET_ID answers, at most 20 bytes

    def close(self) -> None:
        os.close(self.fd)


def open_disk(path: str, *, fd: int = -1, readonly: bool = False, direct: bool = False, serial: str = "") -> Disk:
    """Open `path`, or take over `fd`, which is the same file already open. Raises ConfigError that names the disk."""
    what = f"disk path={path}"
    encoded = (serial or "").encode()
    if len(encoded) > ID_BYTES:
        raise ConfigError(f"{what}: serial={serial} has more than {ID_BYTES} bytes")
    own = fd
    try:
        if own < 0:
            own = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        return _measure(what, path, own, readonly, direct, encoded)
    except OSError as error:
        _close_quietly(own)
        raise ConfigError(f"{what}: {os.strerror(error.errno or 0)}") from error
    except ConfigError:
        _close_quietly(own)
        raise


def _close_quietly(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _measure(what: str, path: str, fd: int, readonly: bool, direct: bool, serial: bytes) -> Disk:
    info = os.fstat(fd)
    block_device = stat.S_ISBLK(info.st_mode)
    if not block_device and not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{what} is neither a file nor a block device")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not readonly and flags & os.O_ACCMODE == os.O_RDONLY:
        raise ConfigError(f"{what} is open for reading only", "say readonly=on")
    _set_direct(what, fd, flags, direct)
    if block_device:
        size: int = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
        topology = _block_topology(fd)
    else:
        size = info.st_size
        topology = Topology()
    if size < SECTOR:
        raise ConfigError(f"{what} has {size} bytes: not one sector")
    memory_align, offset_align = _direct_alignment(fd, topology) if direct else (1, 1)
    if direct and not block_device and offset_align > topology.logical:
        # The guest must ask in units that the file system below can carry out.
        topology = Topology(offset_align, max(offset_align, topology.physical), offset_align)
    return Disk(
        path, fd, size // SECTOR, readonly, direct, block_device,
        can_punch=not readonly and _can_punch(fd, info, block_device, size),
        topology=topology, memory_align=memory_align, offset_align=offset_align,
        identity=serial or f"{info.st_dev}{info.st_rdev}{info.st_ino}".encode()[:ID_BYTES],
    )  # fmt: skip


def _set_direct(what: str, fd: int, flags: int, direct: bool) -> None:
    """Turn O_DIRECT on or off. It belongs to the open file description, which whoever passed the fd shares."""
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    if wanted == flags:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError as error:
        raise ConfigError(f"{what}: direct=on is not possible on its file system", "say direct=off") from error


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
