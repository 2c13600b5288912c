"""HTTP/1.1 for one path, by h11: GET /metrics. Every connection is answered once and closed.

    accepted ──request──▶ asked ──figures──▶ answered ──▶ closed
        └── too slow, too long, nonsense, one too many ──────▲

Nobody can keep it from the others: a request has REQUEST_SECONDS and MAX_HEAD bytes, its answer SEND_SECONDS, and of
MAX_CONNECTIONS the oldest goes when another comes. A bug that a request leads to is that client's 500.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Final

import h11

from shared import log
from shared.errors import FlotillaError, Timeout
from shared.reactor import Cancelled, Reactor, Task, describe, readable, within, writable

PATH: Final = b"/metrics"
MAX_CONNECTIONS: Final = 32
MAX_HEAD: Final = 16 << 10
MAX_BODY: Final = 64 << 10  # of a request that should have none; what is more is not waited for
REQUEST_SECONDS: Final = 5.0
SEND_SECONDS: Final = 10.0
TEXT: Final = "text/plain; charset=utf-8"

# What the Accept header says -> (content, content type). Raises FlotillaError.
Scrape = Callable[[str], Awaitable[tuple[bytes, str]]]


class Server:
    """Serves as long as the reactor runs."""

    def __init__(self, reactor: Reactor, listening: socket.socket, scrape: Scrape) -> None:
        self._reactor = reactor
        self._listening = listening
        self._scrape = scrape
        self._open: dict[socket.socket, Task[None]] = {}  # oldest first
        listening.setblocking(False)
        reactor.add_reader(listening.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            client, _ = self._listening.accept()
        except OSError:  # it has gone, or there is no descriptor for it: it comes again
            self._drop_oldest()
            return
        if len(self._open) >= MAX_CONNECTIONS:
            self._drop_oldest()
        client.setblocking(False)
        self._open[client] = self._reactor.spawn(self._serve(client), "client")

    def _drop_oldest(self) -> None:
        for client, task in self._open.items():
            task.cancel()
            self._forget(client)
            break

    def _forget(self, client: socket.socket) -> None:
        self._open.pop(client, None)
        self._reactor.remove_reader(client.fileno())
        self._reactor.remove_writer(client.fileno())
        client.close()

    async def _serve(self, client: socket.socket) -> None:
        try:
            connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
            data = _response(*await self._answer(connection, client))
            await within(self._reactor, SEND_SECONDS, self._send(client, data), "a client to read")
            client.shutdown(socket.SHUT_WR)
        except (OSError, Timeout):
            pass  # it went away, or is too slow
        except Cancelled:
            return  # it was dropped
        self._forget(client)

    async def _answer(self, connection: h11.Connection, client: socket.socket) -> tuple[int, bytes, str]:
        try:
            return await self._answer_of(connection, client)
        except OSError:
            raise
        except Exception as error:
            log.error(f"metrics: a request could not be answered: {describe(error)}")
            return 500, b"this request could not be answered\n", TEXT

    async def _answer_of(self, connection: h11.Connection, client: socket.socket) -> tuple[int, bytes, str]:
        try:
            asking = self._request(connection, client)
            request = await within(self._reactor, REQUEST_SECONDS, asking, "a request")
        except Timeout:
            return 408, b"the request took too long\n", TEXT
        except h11.RemoteProtocolError as error:
            return error.error_status_hint, f"{error}\n".encode(), TEXT
        if request.target.partition(b"?")[0] != PATH:
            return 404, b"there is only /metrics\n", TEXT
        if request.method != b"GET":
            return 405, b"use GET\n", TEXT
        accept = b",".join(value for name, value in request.headers if name == b"accept")
        try:
            content, kind = await self._scrape(accept.decode("ascii", "replace"))
        except FlotillaError as error:
            return 503, f"the controller does not answer: {error}\n".encode(), TEXT
        return 200, content, kind

    async def _request(self, connection: h11.Connection, client: socket.socket) -> h11.Request:
        """With its body, which is read and forgotten: unread bytes would make the answer a reset."""
        request: h11.Request | None = None
        body = 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                await readable(self._reactor, client.fileno())
                try:
                    connection.receive_data(client.recv(MAX_HEAD))
                except BlockingIOError:
                    continue
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += len(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                return request
            else:  # ConnectionClosed, PAUSED
                raise ConnectionError("no request")
            if body > MAX_BODY:
                raise h11.RemoteProtocolError("a body of more than 64 KiB", error_status_hint=413)

    async def _send(self, client: socket.socket, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[client.send(view) :]
            except BlockingIOError:
                await writable(self._reactor, client.fileno())


_REASONS: Final = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    413: "Content Too Large", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip


def _response(status: int, content: bytes, kind: str) -> bytes:
    """Also for a request that h11 could not read, after which it writes nothing any more."""
    allow = "Allow: GET\r\n" if status == 405 else ""
    head = (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(content)}\r\n{allow}Connection: close\r\n\r\n"
    )
    return head.encode() + content
