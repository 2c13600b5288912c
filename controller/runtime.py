"""The VM's runtime directory: 0700, holds control endpoints for the moment in which they are connected.

Every directory has a `lock` file with an OFD lock. One whose lock can be had belonged to a VM that was killed, janitor
included, and is removed at the next start of any VM.
"""

from __future__ import annotations

import os

from controller.locks import try_lock
from shared.errors import HostError

PREFIX = "vm."


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
            fd = os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        if try_lock(fd, exclusive=True) and os.path.exists(path):
            return path, fd
        os.close(fd)


def sweep(base: str) -> None:
    """Remove what killed VMs left in `base`."""
    for name in os.listdir(base):
        path = f"{base}/{name}"
        if not name.startswith(PREFIX):
            continue
        try:
            fd = os.open(f"{path}/lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # not ours, or its owner is about to lock it
        try:
            if try_lock(fd, exclusive=True):
                _remove(path)
        finally:
            os.close(fd)
