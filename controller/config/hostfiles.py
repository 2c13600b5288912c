"""Are the files that a VmConfig names there, of the right kind and accessible? Asked when a VM boots or is to arrive,
not before.

Every error is a HostError that names flag and path. Nothing is created, truncated or locked here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial

from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    DiskConfig,
    DiskLock,
    ImageType,
    SerialConfig,
    VmConfig,
)
from shared.errors import HostError
from shared.records import replace

# Signatures of formats that Cloud Hypervisor would serve as such: (offset from the start or, if negative,
# the end).
_SIGNATURES = (
    (0, b"QFI\xfb", ImageType.QCOW2),
    (0, b"vhdxfile", ImageType.VHDX),
    (-512, b"conectix", ImageType.VHD),
)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISREG, "a regular file"),
)


def check_files(config: VmConfig) -> None:
    """Raises HostError for the first file that the VM could not use."""
    for check in _but_disks(config):
        check()
    _disks(config.disks)


def missing_files(config: VmConfig) -> list[HostError]:
    """All that a VM which comes from another host could not use here, but for its images. Kernel and initramfs count:
    its next reset reads them."""
    found = []
    for check in (*_but_disks(config), *_back_ends(config)):
        try:
            check()
        except HostError as error:
            found.append(error)
    return found


def _but_disks(config: VmConfig) -> Iterator[Callable[[], None]]:
    for flag, path in (("--kernel", config.payload.kernel), ("--initramfs", config.payload.initramfs)):
        if path is not None:
            yield partial(_readable_file, flag, path)
    yield partial(_rng, config.rng.src)
    yield partial(_destination, "--serial", config.serial)
    yield partial(_destination, "--console", config.console)


def _back_ends(config: VmConfig) -> Iterator[Callable[[], None]]:
    """A VM that boots waits for them instead: they may be on their way up."""
    for flag, devices in (("--disk", config.disks), ("--net", config.net)):
        for device in devices:
            if device.vhost_socket is not None:
                yield partial(_socket, f"{flag} socket={device.vhost_socket}", device.vhost_socket)


def detect_image_types(config: VmConfig) -> VmConfig:
    """The same VM with every unknown image type replaced by what the image is: raw, or HostError.

    A disk whose type was given as raw is never looked at: its contents belong to the guest.
    """
    return replace(config, disks=tuple(_detected(disk) for disk in config.disks))


def _detected(disk: DiskConfig) -> DiskConfig:
    if disk.path is None or disk.image_type is not ImageType.UNKNOWN:
        return disk
    fd = _open(f"--disk path={disk.path}", disk.path, os.O_RDONLY)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        for offset, signature, kind in _SIGNATURES:
            position = offset if offset >= 0 else size + offset
            if position >= 0 and os.pread(fd, len(signature), position) == signature:
                raise HostError(
                    f"--disk path={disk.path}: this is a {kind.value} image, and only raw images are available yet",
                    "qemu-img convert -O raw converts it; image_type=raw hands its bytes to the guest as they are",
                )
    except OSError as error:
        raise HostError(f"--disk path={disk.path}: {_reason(error)}") from error
    finally:
        os.close(fd)
    return replace(disk, image_type=ImageType.RAW)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _status(what: str, path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise HostError(f"{what}: {_reason(error)}", _where(path, error)) from error


def _where(path: str, error: OSError) -> str:
    """Relative paths are the usual surprise of a migration's destination."""
    if error.errno == errno.ENOENT and not os.path.isabs(path):
        return f"looked for from {os.getcwd()}"
    return ""


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "something else")


def _open(what: str, path: str, flags: int) -> int:
    # O_NONBLOCK: a pipe put in the file's place must not hang the VMM; it means nothing to files and block
    # devices.
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = ""
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and flags & os.O_RDWR:
            hint = "readonly=on needs no permission to write"
        elif error.errno == errno.EINVAL and flags & os.O_DIRECT:
            hint = "its file system has no direct I/O; leave direct=on out"
        raise HostError(f"{what}: {_reason(error)}", hint or _where(path, error)) from error


def _readable_file(flag: str, path: str) -> None:
    what = f"{flag} {path}"
    mode = _status(what, path).st_mode
    if not stat.S_ISREG(mode):
        raise HostError(f"{what}: this is {_kind(mode)}", "a regular file is needed")
    os.close(_open(what, path, os.O_RDONLY))


def _socket(what: str, path: str) -> None:
    """Not connected to: a back end may take that for its one session."""
    mode = _status(what, path).st_mode
    if not stat.S_ISSOCK(mode):
        raise HostError(f"{what}: this is {_kind(mode)}", "the socket of a vhost-user back end is needed")


def _disks(disks: tuple[DiskConfig, ...]) -> None:
    writers: dict[tuple[int, int], str] = {}
    for disk in disks:
        if disk.path is None:
            continue
        what = f"--disk path={disk.path}"
        status = _status(what, disk.path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise HostError(
                f"{what}: this is {_kind(status.st_mode)}", "an image file or a block device is needed"
            )
        access = os.O_RDONLY if disk.readonly else os.O_RDWR
        os.close(_open(what, disk.path, access | (os.O_DIRECT if disk.direct else 0)))
        if disk.readonly or disk.lock is DiskLock.SHARED:
            continue
        # A block device is the same whatever node names it.
        image = (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
        if image in writers:
            raise HostError(
                f"{what}: the same image as --disk path={writers[image]}, both for writing",
                "readonly=on or lock=shared on one of them allows it",
            )
        writers[image] = disk.path


def _rng(src: str) -> None:
    what = f"--rng src={src}"
    mode = _status(what, src).st_mode
    if not (stat.S_ISCHR(mode) or stat.S_ISREG(mode)):
        raise HostError(f"{what}: this is {_kind(mode)}", "a character device or a regular file is needed")
    os.close(_open(what, src, os.O_RDONLY))


def _destination(flag: str, device: SerialConfig | ConsoleConfig) -> None:
    """The file or socket will be created: its folder must exist, and nothing of another kind be in its
    place.
    """
    if device.mode is ConsoleMode.FILE:
        key, path = "file", device.file
    elif device.mode is ConsoleMode.SOCKET:
        key, path = "socket", device.socket
    else:
        return
    assert path is not None, "validate() has seen to it"
    what = f"{flag} {key}={path}"
    folder = os.path.dirname(path) or "."
    mode = _status(f"{what}: its folder {folder}", folder).st_mode
    if not stat.S_ISDIR(mode):
        raise HostError(f"{what}: {folder} is {_kind(mode)}", "a folder is needed there")
    try:
        present = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"{what}: {_reason(error)}") from error
    if stat.S_ISDIR(present):
        raise HostError(f"{what}: this is a directory")
    if key == "socket" and not stat.S_ISSOCK(present):
        raise HostError(
            f"{what}: this is {_kind(present)}", "it would be replaced by a socket; remove it first"
        )
