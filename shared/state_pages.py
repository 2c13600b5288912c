"""Shared memory for a VM's state pages: POSIX shared memory whose name is gone before anybody could find it."""

from __future__ import annotations

import mmap


def allocate(size: int) -> mmap.mmap:
    """`size` bytes of zeros, shared. Raises HostError when /dev/shm has no room."""
    import os

    import posix_ipc

    from shared.errors import HostError

    try:
        memory = posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=size, mode=0o600)
        memory.unlink()
        try:
            # A tmpfs promises nothing: without this, the first touch of a full one is a SIGBUS for whoever does it.
            os.posix_fallocate(memory.fd, 0, size)
            return mmap.mmap(memory.fd, size)
        finally:
            os.close(memory.fd)
    except (OSError, posix_ipc.Error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise HostError(f"/dev/shm has no room for {size} bytes of state pages: {why}", "make it larger") from error
