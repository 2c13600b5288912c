"""The VM's runtime directory: 0700, holds control endpoints for the moment in which they are connected.

Every directory has a `lock` file with an OFD lock. One whose lock can be had belonged to a VM that was killed, janitor
included, and is removed at the next start of any VM. So is an empty one that has been without a lock for a while: its
VM was killed while it made it.
"""

from __future__ import annotations

import os
import time

from controller.locks import try_lock
from shared.errors import HostError

PREFIX = "vm."
# Much longer than it takes from mkdir to the lock.
UNLOCKED_SECONDS = 60.0


def root() -> str:
    """$FLOTILLA_RUNTIME_DIR, $XDG_RUNTIME_DIR/flotilla, /run/flotilla (root) or a folder in the temp dir."""
    if path := os.environ.get("FLOTILLA_RUNTIME_DIR"):
        return path
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return f"{base}/flotilla"
    if os.geteuid() == 0:
        return "/run/flotilla"
    import tempfile

    return f"{tempfile.gettempdir()}/flotilla-{os.geteuid()}"


def _remove(path: str) -> None:
    import shutil  # 3 ms, which a VM's start should not cost when there is nothing to remove

    shutil.rmtree(path, ignore_errors=True)


class RuntimeDir:
    """`path` exists from construction to close()."""

    def __init__(self) -> None:
        base = root()
        try:
            self.path, self._lock_fd = _make(base)
        except OSError as error:
            raise HostError(f"runtime directory {base}: {error.strerror}", "set FLOTILLA_RUNTIME_DIR") from error

    def close(self) -> None:
        _remove(self.path)
        try:
            os.rmdir(os.path.dirname(self.path))
        except OSError:
            pass  # another VM lives there
        os.close(self._lock_fd)


def _make(base: str) -> tuple[str, int]:
    """A directory of our own and its lock.

    Another VM may remove `base` because it was the last to end, or take our directory for a stale one before it is
    locked: then all is made again.
    """
    while True:
        os.makedirs(base, 0o700, exist_ok=True)
        try:
            sweep(base)
            path = f"{base}/{PREFIX}{os.urandom(8).hex()}"
            os.mkdir(path, 0o700)
            fd = _make_lock(path)
        except FileNotFoundError:
            continue
        if try_lock(fd, exclusive=True) and os.path.exists(path):
            return path, fd
        os.close(fd)


def _make_lock(path: str) -> int:
    """Raises OSError; the directory is gone then."""
    try:
        return os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        _remove_empty(path)
        raise


def _remove_empty(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass  # gone, or not empty and so not what it was taken for


def sweep(base: str) -> None:
    """Remove what killed VMs left in `base`."""
    for name in os.listdir(base):
        path = f"{base}/{name}"
        if not name.startswith(PREFIX):
            continue
        try:
            fd = os.open(f"{path}/lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # its owner is about to lock it, or was killed before it could
            if _age(path) > UNLOCKED_SECONDS:
                _remove_empty(path)
            continue
        except OSError:
            continue  # not ours
        try:
            if try_lock(fd, exclusive=True):
                _remove(path)
        finally:
            os.close(fd)


def _age(path: str) -> float:
    """Seconds since something was made or removed in it; 0 if it is gone."""
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return 0.0
