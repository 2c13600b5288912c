"""Disk images on the controller's side: opening, locking, and the worker that serves each.

The controller opens the image and holds its OFD lock; the worker gets a duplicate of the descriptor, never a path. Lock
policy (DESIGN, section 4): the first disk is exclusive and a conflict is refused; a conflict on a further disk
is a loud warning; `lock=exclusive|shared` decides otherwise. A read-only disk takes a reader's lock.
"""

from __future__ import annotations

import fcntl
import os
import stat

from controller.backends import Backend
from controller.config.model import DiskConfig, DiskLock
from controller.fleet import Fleet, WorkerSpec
from controller.locks import holders, try_lock
from controller.vhost_frontend import Frontend
from shared import log
from shared.errors import HostError
from shared.reactor import Reactor

BLKFLSBUF = 0x1261


def open_image(disk: DiskConfig, first: bool) -> int:
    """Open and lock. Raises HostError that names the disk and who holds it."""
    fd = open_unlocked(disk)
    try:
        take_lock(disk, first, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_unlocked(disk: DiskConfig) -> int:
    """Raises HostError that names the disk. Nothing may be written before take_lock()."""
    flags = (os.O_RDONLY if disk.readonly else os.O_RDWR) | (os.O_DIRECT if disk.direct else 0)
    try:
        return os.open(disk.path or "", flags | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"--disk path={disk.path}: {error.strerror}") from error


def take_lock(disk: DiskConfig, first: bool, fd: int) -> None:
    """Raises HostError that names the disk and who holds it."""
    what = f"--disk path={disk.path}"
    shared = disk.lock is DiskLock.SHARED
    if try_lock(fd, exclusive=not (disk.readonly or shared)):
        return
    who = ", ".join(holders(fd)) or "another process"
    if shared or (disk.lock is None and not first):
        log.warn(f"{what}: {who} has this image open and locked; it is used all the same, and may be corrupted")
        return
    raise HostError(f"{what}: the image is locked by {who}", "readonly=on on both sides, or lock=shared, allows it")


def drop_cache(disk: DiskConfig, fd: int) -> None:
    """Forget what this host has cached of an image that another host has written: the guest must read what is there.

    Best effort; what can't be done is a warning.
    """
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            fcntl.ioctl(fd, BLKFLSBUF, 0)
        else:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        log.warn(f"--disk path={disk.path}: this host's cache of it can't be dropped: {error.strerror}")


def worker_spec(disk: DiskConfig) -> WorkerSpec:
    assert disk.id is not None
    spec = {
        "path": disk.path,
        "readonly": disk.readonly,
        "direct": disk.direct,
        "serial": disk.serial,
        "sparse": disk.sparse,
        "num_queues": disk.num_queues,
        "queue_size": disk.queue_size,
    }
    return WorkerSpec("blk", disk.id, "blk_worker.__main__", "worker", spec)


def backend(reactor: Reactor, fleet: Fleet, disk: DiskConfig, frontend: Frontend, image: int) -> Backend:
    """The worker of a disk. `image` stays the caller's: the lock outlives every worker. Raises HostError."""
    return Backend(reactor, fleet, worker_spec(disk), {"vhost": frontend}, {"disk": image})
