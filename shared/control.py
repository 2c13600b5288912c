"""ZeroMQ on the reactor: requests with answers in both directions, and events.

Both ends are a `Channel`: a DEALER on an ipc:// endpoint (or one client of a ROUTER, for the API). The worker
binds, the controller connects; the socket's name is unlinked as soon as both hold it, so a killed VM leaves no
name behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

import zmq

from shared import log, messages
from shared.errors import FlotillaError, HostError, ProtocolError, WorkerLost
from shared.reactor import Future, Reactor, sleep, within
from shared.typed import Any

# A handler returns the answer's fields, at once or as an awaitable.
Handler = Callable[[dict[str, Any]], "dict[str, Any] | Awaitable[dict[str, Any]]"]
CONNECTING_SECONDS = 0.002  # its descriptor is our reader's, and edge-triggered
Peer = bytes  # routing id of a ROUTER's client; b"" on a DEALER
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
        self, reactor: Reactor, endpoint: str, *, bind: bool, router: bool = False, once: bool = False
    ) -> None:
        """`once`: connect a single time and never again; connected() says when."""
        self._reactor = reactor
        self._router = router
        try:
            self._socket = context().socket(zmq.ROUTER if router else zmq.DEALER)
        except zmq.ZMQError as error:
            raise HostError(f"no socket for the control channel: {error}") from error
        self._socket.set(zmq.LINGER, 200)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.MAXMSGSIZE, messages.MAX_MESSAGE)
        if once:
            self._socket.set(zmq.RECONNECT_IVL, -1)
            self._socket.set(zmq.IMMEDIATE, 1)  # writable means connected
        self._fd: int = self._socket.get(zmq.FD)
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._closed = False
        self._peers: set[Peer] = set()
        self.handlers: dict[str, Handler] = {}
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda _name, _args: None
        self.on_nonsense: Callable[[ProtocolError], None] = lambda _error: None  # the peer sent what is no message
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
        self._reactor.call_soon(self._drain)  # asking has eaten the edge of what came meanwhile

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
        """Ask the peer. Raises what it answered, WorkerLost when the channel closes first, Timeout."""
        if self._closed:
            raise WorkerLost(f"{verb}: the channel is closed")
        self._next_id += 1
        number = self._next_id
        future: Future[dict[str, Any]] = Future()
        self._pending[number] = future
        self._send(b"", {"id": number, "verb": verb, "args": arguments})
        try:
            return await within(self._reactor, timeout, future, verb)
        finally:
            self._pending.pop(number, None)

    def emit(self, event: str, **arguments: Any) -> None:
        """Tell the peer something; nobody answers."""
        if not self._closed:
            self._send(b"", {"event": event, "args": arguments})

    def broadcast(self, event: str, **arguments: Any) -> None:
        """emit() to every client of a ROUTER that has said something."""
        for peer in self._peers:
            if not self._closed:
                self._send(peer, {"event": event, "args": arguments})

    def garble(self, data: bytes) -> None:
        """A rehearsed fault: send the peer what is no message."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(data, zmq.NOBLOCK)

    def _send(self, peer: Peer, message: dict[str, Any]) -> None:
        frames = [peer, messages.encode(message)] if self._router else [messages.encode(message)]
        with contextlib.suppress(zmq.ZMQError):  # a vanished peer is noticed by its pidfd, not here
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        # zmq's fd is edge-triggered and a send may have eaten the edge of a message that came in.
        self._reactor.call_soon(self._drain)

    def _drain(self) -> None:
        while not self._closed and self._socket.get(zmq.EVENTS) & zmq.POLLIN:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            peer = frames[0] if self._router else b""
            self._peers.add(peer)
            try:
                self._dispatch(peer, messages.decode(frames[-1]))
            except ProtocolError as error:
                self._send(peer, {"id": 0, "error": messages.error_to_wire(error)})
                self.on_nonsense(error)

    def _dispatch(self, peer: Peer, message: dict[str, Any]) -> None:
        number = message.get("id", 0)
        if type(number) is not int:
            raise ProtocolError("a control message's id is no number")
        if "verb" in message:
            self._reactor.spawn(self._serve(peer, number, message), f"control {message['verb']}")
        elif "event" in message:
            self.on_event(str(message["event"]), _map_of(message, "args"))
        elif future := self._pending.get(number):
            try:
                answer = _map_of(message, "ok")
            except ProtocolError as error:
                future.set_exception(error)
            else:
                if "error" in message:
                    future.set_exception(messages.error_from_wire(message["error"]))
                else:
                    future.set_result(answer)

    async def _serve(self, peer: Peer, number: int, message: dict[str, Any]) -> None:
        try:
            verb = str(message["verb"])
            arguments = messages.check_arguments(verb, message.get("args", {}))
            handler = self.handlers.get(verb)
            if handler is None:
                raise ProtocolError(f"this process does not serve {verb!r}")
            answer = handler(arguments)
            result = answer if isinstance(answer, dict) else await answer
        except (FlotillaError, OSError) as error:
            self._answer(peer, {"id": number, "error": messages.error_to_wire(error)})
        except Exception as error:
            # A bug in a handler is the requester's error: it must neither wait for ever nor take the process with it.
            log.error(f"{message['verb']}: {type(error).__name__}: {error}")
            self._answer(peer, {"id": number, "error": messages.error_to_wire(error)})
        else:
            self._answer(peer, {"id": number, "ok": result})

    def _answer(self, peer: Peer, message: dict[str, Any]) -> None:
        if not self._closed:
            self._send(peer, message)


def _map_of(message: dict[str, Any], key: str) -> dict[str, Any]:
    """The map under a key, empty where there is none. Raises ProtocolError for anything else."""
    value = message.get(key)
    if value is not None and not isinstance(value, dict):
        raise ProtocolError(f"a control message's {key} is no map")
    return value or {}


def unlink_endpoint(endpoint: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(endpoint_path(endpoint))
