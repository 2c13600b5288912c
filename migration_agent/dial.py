"""Reaching the other agent: unix:PATH and tcp:HOST:PORT, without blocking anything but a name's resolution."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any

from shared.errors import ConfigError, MigrationError
from shared.reactor import Reactor, sleep, writable

RETRY_SECONDS = 0.05  # between two attempts at a listener whose backlog is full
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
SOCKET_BUFFER = 4 << 20
_NOBODY = (errno.ENOENT, errno.ECONNREFUSED)


def targets(url: str) -> list[tuple[int, Any]]:
    """(address family, address) of every place that a URL may mean. Raises ConfigError, MigrationError."""
    scheme, _, rest = url.partition(":")
    if scheme == "unix" and rest:
        return [(socket.AF_UNIX, rest)]
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit():
        raise ConfigError(f"migration URL {url}: expected unix:<path> or tcp:<host>:<port>")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        raise MigrationError(f"cannot connect to {url}: {getattr(error, 'strerror', None) or error}") from None
    return [(family, address) for family, _, _, _, address in found]


async def connect(reactor: Reactor, url: str, given_up: Callable[[], None]) -> socket.socket:
    """A connected socket. `given_up()` raises when nobody wants it any more. Raises MigrationError that says why."""
    problem: OSError | None = None
    for family, address in targets(url):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await _connect(reactor, sock, address, given_up)
            tune(sock)
            return sock
        except OSError as error:
            sock.close()
            problem = error
        except BaseException:
            sock.close()
            raise
    assert problem is not None
    nobody = problem.errno in _NOBODY
    reason = problem.strerror or str(problem)
    where = url.removeprefix("unix:")
    raise MigrationError(
        f"nobody listens on {where}: {reason}" if nobody else f"cannot connect to {where}: {reason}",
        "start receive-migration at the destination first" if nobody else "",
    )


async def _connect(reactor: Reactor, sock: socket.socket, address: Any, given_up: Callable[[], None]) -> None:
    while True:
        given_up()
        code = sock.connect_ex(address)
        if code == errno.EAGAIN:  # a unix socket whose backlog is full
            await sleep(reactor, RETRY_SECONDS)
            continue
        if code == errno.EINPROGRESS:
            await writable(reactor, sock.fileno())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        return


def tune(sock: socket.socket) -> None:
    """Messages at once, room for pages, and a dead host noticed by the kernel, too."""
    if sock.family == socket.AF_UNIX:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
