"""A unix socket that listens before it has a name: scripts that wait for the name connect as soon as they see it."""

from __future__ import annotations

import errno
import os

from shared.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

MAX_PATH = 107  # bytes of a unix socket's path


def listen_as(sock: socket.socket, path: str, backlog: int, mode: int | None = None) -> None:
    """Raises OSError, EADDRINUSE if something is there. `mode` is the name's, by default what umask leaves.

    bind() makes the name that it is given, and until listen() that one refuses: hence a hidden one first.
    """
    hidden = os.path.join(os.path.dirname(path), f".{os.urandom(4).hex()}")
    if len(os.fsencode(path)) > MAX_PATH or len(os.fsencode(hidden)) > MAX_PATH:
        hidden = path  # so deep a folder leaves no room for a second name
    sock.bind(hidden)
    try:
        if mode is not None:
            os.chmod(hidden, mode)
        sock.listen(backlog)
        if hidden != path:
            _rename(hidden, path)
    except OSError:
        os.unlink(hidden)
        raise


def _rename(hidden: str, path: str) -> None:
    """rename(2) would replace what somebody else has put there meanwhile."""
    try:
        os.link(hidden, path, follow_symlinks=False)
    except FileExistsError:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.rename(hidden, path)  # a file system without hard links
        return
    os.unlink(hidden)
