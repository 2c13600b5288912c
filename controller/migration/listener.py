"""The receiver's listening socket: a name, or a port, that exists only while it is waited on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from controller.migration.arguments import Url
from shared.errors import ConfigError, HostError
from shared.listening import listen_as


def listen(url: Url) -> Listener | TcpListener:
    """Raises ConfigError that names what is in the way, HostError when the host refuses."""
    return Listener(url.path) if url.path else TcpListener(url)


class TcpListener:
    """A port. It has no name that a kill could leave behind."""

    path = ""

    def __init__(self, url: Url) -> None:
        try:
            found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot listen on {url.text}: {reason}", "give an address of this host") from None
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # The port of a migration that has just ended must be free for the next.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.sock.bind(address)
            self.sock.listen(1)
        except OSError as error:
            self.sock.close()
            raise HostError(f"cannot listen on {url.text}: {error.strerror or error}") from error

    def close(self) -> None:
        self.sock.close()


class Listener:
    """`sock` listens at `path` (absolute). close() and remove_name() may come in any order, and twice."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError that names the path when something is in the way, HostError when the host refuses."""
        self.path = os.path.abspath(path)
        _clear(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listen_as(self.sock, self.path, 1, 0o600)
            self._identity: tuple[int, int] | None = _identity(self.path)
        except OSError as error:
            self.sock.close()
            raise HostError(f"cannot listen on {path}: {error.strerror or error}") from error

    @property
    def named(self) -> bool:
        return self._identity is not None

    def remove_name(self) -> None:
        """Unlink the path, unless somebody has put something else there."""
        identity, self._identity = self._identity, None
        with contextlib.suppress(OSError):
            if identity is not None and _identity(self.path) == identity:
                os.unlink(self.path)

    def close(self) -> None:
        self.remove_name()
        self.sock.close()


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _clear(path: str) -> None:
    """Remove a stale socket; refuse anything else that is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is not a socket", "remove it or choose another path")
    # A probe of another socket type: a live stream socket answers EPROTOTYPE and never sees a connection of ours, which
    # a receiver that waits for its one peer would take for that peer.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError as error:
            if error.errno not in (errno.EPROTOTYPE, errno.EAGAIN):
                raise ConfigError(f"cannot listen on {path}: {error.strerror}") from error
    raise ConfigError(f"{path} is a socket that somebody listens on", "choose another path")
