"""Descriptors that come beside a request's bytes (SCM_RIGHTS, unix(7)), as `ch-remote add-net fd=` sends them.

    Listener.accept() ─▶ Carrier: recv() keeps what comes ─▶ scope["descriptors"].take() ─▶ the request's

asyncio reads by `recv`, which drops descriptors unseen; hence sockets whose `recv` looks for them. What a request
does not take is closed at its end, so that no later one on the same connection gets it.
"""

from __future__ import annotations

import asyncio
import socket
import weakref
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.linux import close_fds

MOST = 64  # descriptors of one connection that nobody has taken yet; eight queue pairs have eight


class Carrier(socket.socket):
    """One connection. `overflow`: there were more than MOST, and all of them are closed."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._kept: list[int] = []
        self.overflow = False

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        room = socket.CMSG_SPACE((MOST + 1) * 4)
        data, messages, seen, _ = self.recvmsg(bufsize, room, flags | socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in messages:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._kept += memoryview(content[: len(content) // 4 * 4]).cast("i")
        if len(self._kept) > MOST or seen & socket.MSG_CTRUNC:
            self.overflow = True
            self.drop()
        return data

    def take(self) -> list[int]:
        """The caller's from now on."""
        kept, self._kept = self._kept, []
        return kept

    def close(self) -> None:
        self.drop()
        super().close()

    def drop(self) -> None:
        close_fds(self._kept)


class Listener(socket.socket):
    """A listening socket whose connections are Carriers."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._carriers: weakref.WeakValueDictionary[int, Carrier] = weakref.WeakValueDictionary()

    def accept(self) -> tuple[Carrier, Any]:
        connection, address = super().accept()
        carrier = Carrier(connection.detach())
        self._carriers[carrier.fileno()] = carrier
        return carrier, address

    def carrier(self, fileno: int) -> Carrier:
        return self._carriers[fileno]


def protocol(listener: Listener) -> type[H11Protocol]:
    """uvicorn's HTTP for the listener's connections: the scope of each request has "descriptors", the Carrier."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            carrier, app = listener.carrier(transport.get_extra_info("socket").fileno()), self.app

            async def call(scope: Any, receive: Any, send: Any) -> None:
                try:
                    await app({**scope, "descriptors": carrier}, receive, send)
                finally:
                    carrier.drop()

            self.app = call

    return Protocol
