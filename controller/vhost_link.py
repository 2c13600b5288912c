"""One connection to a vhost-user back end: requests out, replies matched to them.

The protocol is strictly ordered, so requests may be pipelined: the oldest request that waits gets the next reply.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from shared import vhost_user as vu
from shared.errors import ProtocolError, WorkerLost
from shared.reactor import Future, Reactor, sleep
from shared.typed import TYPE_CHECKING
from shared.vhost_user import Connection, Message, Request

if TYPE_CHECKING:
    import socket

RETRY_SECONDS = 0.05


async def dial(reactor: Reactor, path: str, seconds: float = 10.0) -> socket.socket:
    """Connect to a back end that listens at `path`, waiting for it to come up. Raises WorkerLost after `seconds`."""
    import socket

    waited = 0.0
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            sock.close()
            if waited >= seconds:
                raise WorkerLost(
                    f"vhost-user socket {path}: {os.strerror(error.errno or 0)}", "is its back end running?"
                ) from error
        except BaseException:
            sock.close()
            raise
        await sleep(reactor, RETRY_SECONDS)
        waited += RETRY_SECONDS


class Answer(StrEnum):
    """What a request is answered with."""

    REPLY = "reply"  # the same request with a payload
    ACK = "ack"  # REPLY_ACK: an integer, 0 is success
    NONE = "none"


class Link:
    """Requests over one socket. `on_lost` is called once when the back end goes away, not after close()."""

    def __init__(
        self, reactor: Reactor, sock: socket.socket, name: str, on_lost: Callable[[Link, Exception | None], None]
    ) -> None:
        self._name = name
        self.on_lost = on_lost
        self._waiting: deque[tuple[int, Answer, Future[Message]]] = deque()
        self._connection = Connection(reactor, sock, self._on_message, self._lost)
        self.acks = False  # REPLY_ACK is negotiated

    def call(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Future[Message]:
        """A request that always has a reply. The future fails with WorkerLost or ProtocolError."""
        return self._send(request, payload, fds, Answer.REPLY)

    def tell(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Future[Message]:
        """A request without a reply of its own: done when it is acknowledged, at once where that is not negotiated."""
        return self._send(request, payload, fds, Answer.ACK if self.acks else Answer.NONE)

    def _send(self, request: Request, payload: bytes, fds: tuple[int, ...], answer: Answer) -> Future[Message]:
        future: Future[Message] = Future()
        if self._connection.closed:
            future.set_exception(WorkerLost(f"{self._name}: the vhost-user connection is closed"))
            return future
        message = Message(request, payload, vu.VERSION | (vu.NEED_REPLY if answer is Answer.ACK else 0))
        if answer is Answer.NONE:
            future.set_result(message)
        else:
            self._waiting.append((request, answer, future))
        self._connection.send(message, fds)
        return future

    def _on_message(self, message: Message) -> None:
        if not self._waiting or not message.flags & vu.REPLY or message.request != self._waiting[0][0]:
            message.close_fds()
            self.fail(ProtocolError(f"{self._name}: unexpected vhost-user message {vu.name(message.request)}"))
            return
        request, answer, future = self._waiting.popleft()
        if request != Request.GET_INFLIGHT_FD:
            message.close_fds()  # no other reply has descriptors that anybody would take
        if future.done():  # nobody waits any more
            message.close_fds()
        elif answer is Answer.REPLY:
            future.set_result(message)
        else:
            try:
                code = vu.unpack_u64(message.payload)
            except ProtocolError as error:
                self.fail(error)
                future.set_exception(error)
                return
            if code:
                future.set_exception(ProtocolError(f"{self._name}: the back end refused {vu.name(request)} ({code})"))
            else:
                future.set_result(message)

    def fail(self, error: Exception) -> None:
        """Give the back end up: it is hung or talks nonsense."""
        if not self._connection.closed:
            self._connection.close()
            self._lost(error)

    def _lost(self, error: Exception | None) -> None:
        self.on_lost(self, error)
        self._abandon(error)

    def _abandon(self, error: Exception | None) -> None:
        waiting, self._waiting = self._waiting, deque()
        for request, _, future in waiting:
            lost = WorkerLost(f"{self._name}: the back end went away before it answered {vu.name(request)}")
            lost.__cause__ = error
            future.set_exception(lost)

    def close(self) -> None:
        """Hang up. What still waits fails with WorkerLost. Idempotent."""
        self._connection.close()
        self._abandon(None)
