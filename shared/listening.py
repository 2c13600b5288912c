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

    bind() makes the name that it is given, and until listen() that one refuses: hence another first. The kernel tells
    that one for ever (ss -x, /proc/net/unix), so whoever looks for `path` there is to find it.
    """
    first = f"{path}.{os.urandom(4).hex()}"
    if len(os.fsencode(first)) > MAX_PATH:
        first = path  # no room for a second name
    sock.bind(first)
    try:
        if mode is not None:
            os.chmod(first, mode)
        sock.listen(backlog)
        if first != path:
            _rename(first, path)
    except OSError:
        os.unlink(first)
        raise


def _rename(first: str, path: str) -> None:
    """rename(2) would replace what somebody else has put there meanwhile."""
    try:
        os.link(first, path, follow_symlinks=False)
    except FileExistsError:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.rename(first, path)  # a file system without hard links
        return
    os.unlink(first)
