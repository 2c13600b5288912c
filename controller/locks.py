"""Open-file-description locks: who may write a disk image, who owns an API socket.

An OFD lock belongs to the open file description, not to a process: the controller holds it, workers get duplicates, and
a worker's death unlocks nothing. In a local migration the description itself travels, so there is no moment without it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from shared.linux import F_OFD_GETLK, F_OFD_SETLK

# struct flock on x86-64: l_type, l_whence, 4 bytes of padding, l_start, l_len, l_pid, 4 bytes of padding.
FLOCK = struct.Struct("hh4xqqi4x")


def try_lock(fd: int, *, exclusive: bool) -> bool:
    """Lock the whole file for writing (exclusive) or reading; False when somebody else's lock is in the way."""
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def is_locked(fd: int) -> bool:
    """Whether another description holds a lock that would stop an exclusive one."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def holders(fd: int) -> list[str]:
    """Best effort: "name (pid n)" of other processes that have the same file open. OFD locks name nobody."""
    wanted = os.fstat(fd)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            for number in os.listdir(f"/proc/{entry}/fd"):
                status = os.stat(f"/proc/{entry}/fd/{number}")
                if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                    with open(f"/proc/{entry}/comm") as file:
                        found.append(f"{file.read().strip()} (pid {entry})")
                    break
        except OSError:
            continue  # gone meanwhile, or not ours to look into
    return found
