"""The API's listening socket: made by the controller with mode 0600 and handed to the api process.

The metrics exporter's is one of the same kind (metrics_socket.py).

A sidecar PATH.lock with an OFD lock tells a live owner from a stale socket, as Cloud Hypervisor does it. A stale one is
replaced; a live one, or a path that is something else, is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from controller.locks import try_lock
from shared.errors import HostError
from shared.listening import listen_as

BACKLOG = 128


class ApiSocket:
    """`sock` listens; `paths` are the names to remove at the end."""

    def __init__(self, sock: socket.socket, path: str | None, lock_fd: int | None) -> None:
        self.sock = sock
        self.path = path
        self._lock_fd = lock_fd
        self.paths = [path, f"{path}.lock"] if path else []

    @classmethod
    def listen(cls, path: str, flag: str = "--api-socket", name: str = "API socket") -> ApiSocket:
        """Raises HostError that names the path and what is in the way."""
        what = f"{flag} {path}"
        in_use = f"{name} {path} is already in use by another running instance"
        try:
            lock_fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HostError(f"{what}: cannot create {path}.lock: {error.strerror}") from error
        if not try_lock(lock_fd, exclusive=True):
            os.close(lock_fd)
            raise HostError(in_use)
        try:
            _remove_stale(path, what, in_use)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listen_as(sock, path, BACKLOG, 0o600)
        except OSError as error:
            os.unlink(f"{path}.lock")
            os.close(lock_fd)
            raise HostError(f"{what}: {error.strerror or error}") from error
        except HostError:
            os.unlink(f"{path}.lock")
            os.close(lock_fd)
            raise
        return cls(sock, os.path.abspath(path), lock_fd)

    @classmethod
    def inherit(cls, fd: int) -> ApiSocket:
        """`--api-socket fd=N`: a listening socket that whoever started us made."""
        try:
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise HostError(f"--api-socket fd={fd}: {error.strerror}") from error
        if not listening:
            raise HostError(f"--api-socket fd={fd}: not a listening socket")
        os.set_inheritable(fd, False)
        return cls(sock, None, None)

    def close(self) -> None:
        """Remove the names, then let go of the lock: in this order nobody sees a stale socket. Idempotent."""
        paths, self.paths = self.paths, []
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.sock.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def _remove_stale(path: str, what: str, in_use: str) -> None:
    """Under the lock: whatever socket is there belongs to nobody of ours. Somebody else's may still listen."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise HostError(f"{what}: the path exists and is not a socket", "remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise HostError(in_use)
