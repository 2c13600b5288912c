"""One connection to the other agent: non-blocking both ways, frames in, bytes with descriptors out."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable

from migration_agent.wire import Decoder, Frame, Hello
from shared.errors import FlotillaError, MigrationError, ProtocolError
from shared.linux import recv_fds, send_fds
from shared.reactor import Future, Reactor

WRITE_BYTES = 1 << 18  # of one sendmsg
BURST = 64  # items per wake-up, so that a chatty peer does not starve the clock and the controller
MAX_QUEUE = 64 << 20


class Stream:
    """`on_item` gets each Hello and Frame; `on_end` once the reason why no more will come. Both from the reactor."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        on_item: Callable[[Hello | Frame], None],
        on_end: Callable[[FlotillaError], None],
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._on_item = on_item
        self._on_end = on_end
        self._decoder = Decoder()
        self._out: deque[tuple[memoryview, list[int], Future[None]]] = deque()
        self._queued = 0
        self._closed = False
        sock.setblocking(False)
        reactor.add_reader(sock.fileno(), self._read)

    @property
    def congested(self) -> bool:
        """Something waits for the peer to read."""
        return bool(self._out)

    def send(self, data: bytes, fds: list[int] | None = None) -> Future[None]:
        """Queue bytes; the future is done when the kernel has all of them. The descriptors are closed after that."""
        sent: Future[None] = Future()
        if self._closed or self._queued + len(data) > MAX_QUEUE:
            _close_all(fds or [])
            sent.set_exception(MigrationError("the connection to the peer is closed or does not move"))
            return sent
        self._out.append((memoryview(data), fds or [], sent))
        self._queued += len(data)
        if len(self._out) == 1:
            self._write()
        return sent

    def _write(self) -> None:
        while self._out:
            data, fds, sent = self._out[0]
            try:
                count = send_fds(self._sock, data[:WRITE_BYTES].tobytes(), fds)
            except BlockingIOError:
                self._reactor.add_writer(self._sock.fileno(), self._write)
                return
            except OSError as error:
                # What the peer said before it hung up (a reason, perhaps) may still be unread: the reader ends it.
                self._reactor.remove_writer(self._sock.fileno())
                self._drop_output(MigrationError(f"the connection to the peer broke: {error.strerror}"))
                return
            _close_all(fds)  # they went with the first byte
            self._queued -= count
            if count < len(data):
                self._out[0] = (data[count:], [], sent)
            else:
                self._out.popleft()
                sent.set_result(None)
        self._reactor.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        try:
            for _ in range(BURST):
                if self._closed:
                    return
                try:
                    data, fds = recv_fds(self._sock, self._decoder.wants)
                except BlockingIOError:
                    return
                except ConnectionError as error:
                    self._end(MigrationError(f"the connection to the peer broke: {error.strerror}"))
                    return
                except OSError as error:
                    raise ProtocolError(str(error)) from error
                if not data:
                    self._end(self._end_of_stream())
                    return
                if (item := self._decoder.feed(data, fds)) is not None:
                    self._on_item(item)
        except ProtocolError as error:
            self._end(error)

    def _end_of_stream(self) -> FlotillaError:
        if self._decoder.idle:
            return MigrationError("the peer closed the connection")
        return MigrationError("the peer closed the connection in the middle of a message")

    def _end(self, error: FlotillaError) -> None:
        if not self._closed:
            self._reactor.remove_reader(self._sock.fileno())
            self._on_end(error)

    def _drop_output(self, error: FlotillaError) -> None:
        out, self._out = self._out, deque()
        self._queued = 0
        for _, fds, sent in out:
            _close_all(fds)
            sent.set_exception(error)

    def close(self) -> None:
        """Idempotent. What the kernel has already still reaches the peer."""
        if self._closed:
            return
        self._closed = True
        self._reactor.remove_reader(self._sock.fileno())
        self._reactor.remove_writer(self._sock.fileno())
        self._drop_output(MigrationError("the connection to the peer was closed"))
        self._decoder.close()
        self._sock.close()


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
