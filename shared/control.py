"""ZeroMQ on the reactor: requests with answers in both directions, and events.

Both ends are a `Channel`: a DEALER on an ipc:// endpoint (or one client of a ROUTER, for the API). The worker
binds, the controller connects; the socket's name is unlinked as soon as both hold it, so a killed VM leaves no
name behind.

The peer may have been taken over. What it can cost is bounded by `Limits`, and a turn of the reactor by a burst. A
channel without handlers expects an answer to each of its calls, and events once somebody listens; anything else is
nonsense, of which `on_nonsense` hears, and is not answered.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

import zmq

from shared import log, messages
from shared.errors import FlotillaError, HostError, ProtocolError, StateError, WorkerLost
from shared.reactor import Future, Reactor, sleep, within
from shared.records import Record
from shared.typed import Any, Final

# A handler returns the answer's fields, at once or as an awaitable.
Handler = Callable[[dict[str, Any]], "dict[str, Any] | Awaitable[dict[str, Any]]"]
CONNECTING_SECONDS = 0.002  # its descriptor is our reader's, and edge-triggered
Peer = bytes  # routing id of a ROUTER's client; b"" on a DEALER
# Taken in by one turn of the reactor: so many messages, and none after so many bytes.
BURST: Final = 64
BURST_BYTES: Final = 1 << 20
UNREAD: Final = "the peer does not read its messages"


class Limits(Record):
    """What a peer can make this process hold."""

    message: int = messages.MAX_MESSAGE  # bytes of one that comes
    arrived: int = 8  # messages that have come and wait to be read
    unread: int = 1000  # messages for the peer that it has not read
    requests: int = 64  # of the peer's, under way


OPEN: Final = Limits()
# The longest is a console's answer to `save`: MiBs of what was printed and is not yet delivered (shared/chardev.py).
WORKER: Final = Limits(message=4 << 20, arrived=16)
API: Final = Limits(unread=256)
# Its requests are empty, their answers are not.
EXPORTER: Final = Limits(message=64 << 10, arrived=64, unread=16, requests=4)
_context: zmq.Context[Any] | None = None


def context() -> zmq.Context[Any]:
    """The process's zmq context, made at first use: never before a fork (a context has threads)."""
    global _context
    if _context is None:
        _context = zmq.Context()
        _context.set(zmq.BLOCKY, 0)
    return _context


def endpoint_path(endpoint: str) -> str:
    return endpoint.removeprefix("ipc://")


class Channel:
    """Requests, answers and events over one zmq socket. All methods belong to the reactor's thread.

    Raises HostError without a descriptor for the socket, or when the endpoint can't be had.
    """

    def __init__(
        self,
        reactor: Reactor,
        endpoint: str,
        *,
        bind: bool,
        router: bool = False,
        once: bool = False,
        limits: Limits = OPEN,
    ) -> None:
        """`once`: connect a single time and never again; connected() says when."""
        self._reactor = reactor
        self._router = router
        self._limits = limits
        try:
            self._socket = context().socket(zmq.ROUTER if router else zmq.DEALER)
        except zmq.ZMQError as error:
            raise HostError(f"no socket for the control channel: {error}") from error
        self._socket.set(zmq.LINGER, 200)
        self._socket.set(zmq.SNDHWM, limits.unread)
        self._socket.set(zmq.RCVHWM, limits.arrived)
        self._socket.set(zmq.MAXMSGSIZE, limits.message)
        if once:
            self._socket.set(zmq.RECONNECT_IVL, -1)
            self._socket.set(zmq.IMMEDIATE, 1)  # writable means connected
        self._fd: int = self._socket.get(zmq.FD)
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._under_way = 0  # requests of the peer's
        self._draining_soon = False
        self._closed = False
        self._peers: set[Peer] = set()
        self.handlers: dict[str, Handler] = {}
        self.on_event: Callable[[str, dict[str, Any]], None] | None = None
        # The peer sent what is no message, or what nobody asked it, or reads nothing.
        self.on_nonsense: Callable[[ProtocolError], None] = lambda _error: None
        try:
            if bind:
                self._socket.bind(endpoint)
            else:
                self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise HostError(f"{endpoint}: {zmq.strerror(error.errno or 0)}") from error
        reactor.add_reader(self._fd, self._drain)

    async def connected(self, timeout: float) -> None:
        """Of a channel that connects `once`. Raises Timeout."""

        async def there() -> None:
            while not self._socket.get(zmq.EVENTS) & zmq.POLLOUT:
                await sleep(self._reactor, CONNECTING_SECONDS)

        await within(self._reactor, timeout, there(), "the control channel")
        self._drain_soon()  # asking has eaten the edge of what came meanwhile

    def close(self, reason: str = "closed") -> None:
        """Fail what waits for an answer and let go of the socket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reactor.remove_reader(self._fd)
        self._socket.close()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(WorkerLost(reason))

    async def call(self, verb: str, timeout: float | None = 10.0, **arguments: Any) -> dict[str, Any]:
        """Ask the peer. Raises what it answered, WorkerLost when the channel closes first, Timeout, ProtocolError when
        it reads nothing."""
        if self._closed:
            raise WorkerLost(f"{verb}: the channel is closed")
        self._next_id += 1
        number = self._next_id
        future: Future[dict[str, Any]] = Future()
        if not self._send(b"", messages.encode({"id": number, "verb": verb, "args": arguments})):
            raise ProtocolError(f"{verb}: {UNREAD}")
        self._pending[number] = future
        try:
            return await within(self._reactor, timeout, future, verb)
        finally:
            if self.handlers:  # otherwise an answer that comes too late is still one to what was asked
                self._pending.pop(number, None)

    def emit(self, event: str, **arguments: Any) -> None:
        """Tell the peer something; nobody answers."""
        if not self._closed:
            self._send(b"", messages.encode({"event": event, "args": arguments}))

    def broadcast(self, event: str, **arguments: Any) -> None:
        """emit() to every client of a ROUTER that has said something."""
        for peer in self._peers:
            if not self._closed:
                self._send(peer, messages.encode({"event": event, "args": arguments}))

    def garble(self, data: bytes) -> None:
        """A rehearsed fault: send the peer what is no message."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(data, zmq.NOBLOCK)

    def _send(self, peer: Peer, message: bytes) -> bool:
        """False: it can't be sent, as the peer has not read those before it. A ROUTER drops it then, and says nothing:
        whoever reads no answers goes without, and its other clients notice nothing."""
        sent = True
        try:
            self._socket.send_multipart([peer, message] if self._router else [message], zmq.NOBLOCK)
        except zmq.Again:
            sent = False
            self.on_nonsense(ProtocolError(UNREAD))
        except zmq.ZMQError:
            pass  # a vanished peer is noticed by its pidfd, not here
        # zmq's fd is edge-triggered and a send may have eaten the edge of a message that came in.
        self._drain_soon()
        return sent

    def _drain_soon(self) -> None:
        if not self._draining_soon:
            self._draining_soon = True
            self._reactor.call_soon(self._drain_now)

    def _drain_now(self) -> None:
        self._draining_soon = False
        self._drain()

    def _drain(self) -> None:
        """A burst; the next one after everybody else's turn, as a peer may send without end."""
        number = size = 0
        while not self._closed and self._socket.get(zmq.EVENTS) & zmq.POLLIN:
            if number >= BURST or size >= BURST_BYTES:
                self._drain_soon()
                return
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            number, size = number + 1, size + sum(map(len, frames))
            self._take(frames)

    def _take(self, frames: list[bytes]) -> None:
        peer = frames[0] if self._router else b""
        self._peers.add(peer)
        try:
            if len(frames) != (2 if self._router else 1):
                raise ProtocolError(f"a control message of {len(frames)} frames")
            self._dispatch(peer, messages.decode(frames[-1]))
        except ProtocolError as error:
            if self.handlers:
                self._send(peer, _error(0, error))
            self.on_nonsense(error)

    def _dispatch(self, peer: Peer, message: dict[str, Any]) -> None:
        number = message.get("id", 0)
        if type(number) is not int:
            raise ProtocolError("a control message's id is no number")
        if "verb" in message:
            self._request(peer, number, message)
        elif "event" in message:
            name, arguments = str(message["event"]), _map_of(message, "args")
            if self.on_event is not None:
                self.on_event(name, arguments)
            elif not self.handlers:
                raise ProtocolError(f"event {name[:messages.SHOWN]!r}, which nobody waits for")
        elif future := self._pending.pop(number, None):
            try:
                answer = _map_of(message, "ok")
            except ProtocolError as error:
                future.set_exception(error)
            else:
                if "error" in message:
                    future.set_exception(messages.error_from_wire(message["error"]))
                else:
                    future.set_result(answer)
        elif not self.handlers:
            raise ProtocolError("an answer to what nobody asked")

    def _request(self, peer: Peer, number: int, message: dict[str, Any]) -> None:
        verb = str(message["verb"])
        if not self.handlers:
            raise ProtocolError(f"request {verb[:messages.SHOWN]!r} of one that has nothing to ask")
        if self._under_way >= self._limits.requests:
            self._send(peer, _error(number, StateError("too many requests under way")))
            return
        self._under_way += 1
        self._reactor.spawn(self._serve(peer, number, message), f"control {verb[:messages.SHOWN]}")

    async def _serve(self, peer: Peer, number: int, message: dict[str, Any]) -> None:
        verb = str(message["verb"])
        try:
            arguments = messages.check_arguments(verb, message.get("args", {}))
            handler = self.handlers.get(verb)
            if handler is None:
                raise ProtocolError(f"this process does not serve {verb!r}")
            answer = handler(arguments)
            result = answer if isinstance(answer, dict) else await answer
            data = messages.encode({"id": number, "ok": result})
        except (FlotillaError, OSError) as error:
            data = _error(number, error)
        except Exception as error:
            # A bug in a handler, or an answer that msgpack has no form for, is the requester's error: it must neither
            # wait for ever nor take the process with it.
            log.error(f"{verb[:messages.SHOWN]}: {type(error).__name__}: {error}")
            data = _error(number, error)
        finally:
            self._under_way -= 1
        if not self._closed:
            self._send(peer, data)


def _error(number: int, error: BaseException) -> bytes:
    return messages.encode({"id": number, "error": messages.error_to_wire(error)})


def _map_of(message: dict[str, Any], key: str) -> dict[str, Any]:
    """The map under a key, empty where there is none. Raises ProtocolError for anything else."""
    value = message.get(key)
    if value is not None and not isinstance(value, dict):
        raise ProtocolError(f"a control message's {key} is no map")
    return value or {}


def unlink_endpoint(endpoint: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(endpoint_path(endpoint))
