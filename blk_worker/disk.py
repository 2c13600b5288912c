"""A raw disk image or block device, opened for its worker."""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass

from shared.disk_geometry import Geometry, measure
from shared.errors import ConfigError

ID_BYTES = 20


@dataclass(frozen=True, slots=True)
class Disk:
    """An open disk. `fd` belongs to it and may share its open file description with the controller, which locks it."""

    path: str
    fd: int
    direct: bool
    geometry: Geometry
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
        return _checked(what, path, own, readonly, direct, encoded)
    except OSError as error:
        _close_quietly(own)
        raise ConfigError(f"{what}: {os.strerror(error.errno or 0)}") from error
    except ConfigError:
        _close_quietly(own)
        raise


def _close_quietly(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _checked(what: str, path: str, fd: int, readonly: bool, direct: bool, serial: bytes) -> Disk:
    info = os.fstat(fd)
    if not stat.S_ISBLK(info.st_mode) and not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{what} is neither a file nor a block device")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not readonly and flags & os.O_ACCMODE == os.O_RDONLY:
        raise ConfigError(f"{what} is open for reading only", "say readonly=on")
    _set_direct(what, fd, flags, direct)
    geometry = measure(fd, readonly=readonly, direct=direct)
    if not geometry.sectors:
        raise ConfigError(f"{what} has {geometry.size} bytes: not one sector")
    identity = serial or f"{info.st_dev}{info.st_rdev}{info.st_ino}".encode()[:ID_BYTES]
    return Disk(path, fd, direct, geometry, identity)


def _set_direct(what: str, fd: int, flags: int, direct: bool) -> None:
    """Turn O_DIRECT on or off. It belongs to the open file description, which whoever passed the fd shares."""
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    if wanted == flags:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError as error:
        raise ConfigError(f"{what}: direct=on is not possible on its file system", "say direct=off") from error
