"""The agent: connects or accepts, relays messages between its controller and the peer's, keeps time.

    controller ──SEND/RECEIVE/DELIVER/CANCEL (zmq)──▶ agent ══ stream ══ agent ──"deliver" (zmq event)──▶ controller
               ──────── fds: one datagram on the sidecar, before the DELIVER or event that counts them ────────

Events to the controller, in the order in which things happened: `state` {before, why, after}, `accepted` {} (the
listening path has served its purpose), `deliver` {type, body, fds}, `lost` {error} (no more messages will come, and
why). Bodies are opaque here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import msgpack

from migration_agent.states import Event, Machine, Role, State, event_of
from migration_agent.stream import Stream
from migration_agent.wire import VERSION, Frame, Hello, encode, encode_hello
from shared import log
from shared.control import Channel
from shared.errors import (
    ConfigError,
    FlotillaError,
    MigrationCancelled,
    MigrationError,
    ProtocolError,
    Timeout,
)
from shared.handover import MAX_FDS, Message
from shared.linux import recv_fds, send_fds
from shared.messages import error_to_wire
from shared.reactor import Future, Reactor, Timer, describe, readable, sleep, within
from shared.worker import Start

HELLO_SECONDS = 10.0
IDLE_SECONDS = 30.0
RETRY_SECONDS = 0.05  # between two attempts at a listener whose backlog is full


def unix_path(url: str) -> str:
    """Path of a unix: URL. Raises ConfigError for another one."""
    scheme, _, path = url.partition(":")
    if scheme != "unix" or not path:
        raise ConfigError(f"migration URL {url}: only unix:<path> is available yet")
    return path


class Agent:
    """`spec` of the Start: hello_seconds, idle_seconds, fault (all optional). One migration, then the process ends."""

    def __init__(self, reactor: Reactor, start: Start) -> None:
        self._reactor = reactor
        self._sidecar = socket.socket(fileno=start.fds["sidecar"])
        self._sidecar.setblocking(False)
        self._listener = socket.socket(fileno=start.fds["listen"]) if "listen" in start.fds else None
        self._hello_seconds = float(start.spec.get("hello_seconds", HELLO_SECONDS))
        self._idle_seconds = float(start.spec.get("idle_seconds", IDLE_SECONDS))
        self._fault: tuple[int, str] | None = None
        if what := start.spec.get("fault"):
            self.fault(what)
        self._machine = Machine(self._changed)
        self._stream: Stream | None = None
        self._greeting: Future[Hello] = Future()
        self._opening: Future[None] = Future()  # fails when connecting or accepting is to end
        self._heard = 0.0
        self._pulse: Timer | None = None
        self._beats = 0
        self._relayed = {"messages": 0, "bytes": 0, "fds": 0}
        self.emit: Callable[..., None] = lambda _name, **_arguments: None

    def serve(self, channel: Channel) -> None:
        """Add this agent's verbs to its control channel."""
        self.emit = channel.emit
        channel.handlers["send"] = self._send
        channel.handlers["receive"] = self._receive
        channel.handlers["deliver"] = self._deliver
        channel.handlers["cancel"] = self._cancel

    def stats(self) -> dict[str, int]:
        return dict(self._relayed)

    def epoch(self) -> int:
        return self._beats

    def fault(self, what: str) -> None:
        """Fault injection: "KILL@offered" sends this process SIGKILL the moment it enters that state."""
        name, _, state = what.partition("@")
        self._fault = (signal.Signals[f"SIG{name}"], str(State(state)))

    def close(self) -> None:
        if self._pulse is not None:
            self._pulse.cancel()
        if self._stream is not None:
            self._stream.close()
        if self._listener is not None:
            self._listener.close()
        self._sidecar.close()

    # Verbs of the controller -------------------------------------------------------------------------------------

    async def _send(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """SEND: connect and greet. The answer names the peer's version."""
        url = arguments["url"]
        if not arguments["local"]:
            raise ConfigError(f"{url}: remote migration is not available yet", "use local=on with a unix: URL")
        path = unix_path(url)
        self._machine.role = Role.SOURCE
        self._machine.to(Event.CONNECT)
        try:
            sock = await within(self._reactor, self._hello_seconds, self._connect(path), f"connection to {path}")
            self._machine.to(Event.CONNECTED)
            self._open(sock)
            assert self._stream is not None
            self._stream.send(encode_hello())
            return await self._greeted()
        except FlotillaError as error:
            self._fail(error)
            raise

    async def _connect(self, path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            while True:
                if self._opening.done():
                    self._opening.result()
                try:
                    sock.connect(path)
                    return sock
                except BlockingIOError:
                    await sleep(self._reactor, RETRY_SECONDS)
        except OSError as error:
            sock.close()
            nobody = error.errno in (errno.ENOENT, errno.ECONNREFUSED)
            reason = error.strerror or str(error)
            raise MigrationError(
                f"nobody listens on {path}: {reason}" if nobody else f"cannot connect to {path}: {reason}",
                "start receive-migration at the destination first" if nobody else "",
            ) from None
        except BaseException:
            sock.close()
            raise

    async def _receive(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """RECEIVE: accept one connection on the descriptor "listen", however long that takes, and greet."""
        if self._listener is None:
            raise ProtocolError(f"receive {arguments['url']}: no listening socket came with this agent")
        self._machine.role = Role.DESTINATION
        self._machine.to(Event.LISTEN)
        try:
            sock = await self._accept(self._listener)
            self._machine.to(Event.ACCEPTED)
            self._listener.close()
            self._listener = None
            self.emit("accepted")
            self._open(sock)
            return await self._greeted()
        except FlotillaError as error:
            self._fail(error)
            raise

    async def _accept(self, listener: socket.socket) -> socket.socket:
        listener.setblocking(False)
        ready = self._reactor.spawn(readable(self._reactor, listener.fileno()), "accept")
        ready.add_done_callback(lambda _: self._opening.set_result(None))
        try:
            await self._opening
            return listener.accept()[0]
        except OSError as error:
            raise MigrationError(f"accept: {error.strerror}") from None
        finally:
            ready.cancel()

    async def _greeted(self) -> dict[str, Any]:
        try:
            hello = await within(self._reactor, self._hello_seconds, self._greeting, "the peer's hello")
        except Timeout as error:
            raise MigrationError(f"the peer said nothing for {self._hello_seconds:g} s") from error
        return {"version": hello.version}

    async def _deliver(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """DELIVER: one message for the peer. Answered when the kernel has all of it."""
        fds = self._take_fds(arguments["fds"])
        try:
            message = Message(arguments["type"])
            data = encode(message, arguments["body"], fds)
            if self._stream is None:
                raise MigrationError(f"{message.name}: there is no connection")
            self._machine.to(event_of(message, sent=True))
        except BaseException:
            _close_all(fds)
            raise
        self._count(data, fds)
        await self._stream.send(data, fds)
        return {}

    def _take_fds(self, count: int) -> list[int]:
        if not count:
            return []
        _, fds = recv_fds(self._sidecar, 16, MAX_FDS)
        if len(fds) != count:
            _close_all(fds)
            raise ProtocolError(f"the sidecar brought {len(fds)} file descriptors, not {count}")
        return fds

    def _cancel(self, _: dict[str, Any]) -> dict[str, Any]:
        self._fail(MigrationCancelled("the migration was cancelled"))
        return {}

    # The peer ----------------------------------------------------------------------------------------------------

    def _open(self, sock: socket.socket) -> None:
        self._heard = time.monotonic()
        self._stream = Stream(self._reactor, sock, self._item, self._fail)

    def _item(self, item: Hello | Frame) -> None:
        self._heard = time.monotonic()
        if isinstance(item, Hello):
            self._hello(item)
        elif item.type is not Message.HEARTBEAT and not self._machine.over:
            self._frame(item)
        else:
            _close_all(item.fds)

    def _hello(self, hello: Hello) -> None:
        assert self._stream is not None
        if self._machine.role is Role.DESTINATION:
            self._stream.send(encode_hello())  # of another version too: the source can then say what is wrong
        if hello.version != VERSION:
            raise ProtocolError(
                f"the peer's migration protocol has version {hello.version}, ours {VERSION}",
                "both sides must run releases that have a version in common",
            )
        self._machine.to(Event.HELLO)
        self._greeting.set_result(hello)
        self._beat()

    def _frame(self, frame: Frame) -> None:
        count = len(frame.fds)
        try:
            self._machine.to(event_of(frame.type, sent=False))
            self._count(frame.body, frame.fds)
            if count:
                send_fds(self._sidecar, b"fds", frame.fds)
        except OSError as error:
            raise ProtocolError(f"the controller does not take descriptors: {error.strerror}") from error
        finally:
            _close_all(frame.fds)
        self.emit("deliver", type=int(frame.type), body=frame.body, fds=count)

    def _beat(self) -> None:
        """Say that we live, and see whether the peer does."""
        self._beats += 1
        if self._machine.over or self._stream is None:
            return
        silence = time.monotonic() - self._heard
        if silence > self._idle_seconds:
            self._fail(Timeout(f"the peer has been silent for {self._idle_seconds:g} s"))
            return
        if not self._stream.congested:
            self._stream.send(encode(Message.HEARTBEAT))
        self._pulse = self._reactor.call_later(self._idle_seconds / 6, self._beat)

    # Ends --------------------------------------------------------------------------------------------------------

    def _fail(self, error: FlotillaError) -> None:
        """No more messages will come; the peer (its stream may be fine), the controller and whoever waits hear why."""
        if self._machine.over:
            if self._stream is not None:
                self._stream.close()
            return
        state = self._machine.state
        if self._stream is not None and self._greeting.done():
            self._tell_peer(error)
        self._machine.to(Event.FAILED)
        log.info(f"migration {self._machine.role!s} in state {state!s}: {describe(error)}")
        greeted = self._greeting.done()
        self._opening.set_exception(error)
        self._greeting.set_exception(error)
        if greeted:
            self.emit("lost", error=error_to_wire(error))
        if self._stream is not None:
            self._stream.close()

    def _tell_peer(self, error: FlotillaError) -> None:
        kind = Message.WITHDRAWN if self._machine.role is Role.SOURCE else Message.REFUSED
        body = msgpack.packb({"error": error_to_wire(error)}, use_bin_type=True)
        assert self._stream is not None
        with contextlib.suppress(ProtocolError):  # an overlong reason: the end of the stream has to do
            self._stream.send(encode(kind, body))

    def _changed(self, before: State, event: Event, after: State) -> None:
        if self._fault is not None and self._fault[1] == after:
            os.kill(os.getpid(), self._fault[0])
        self.emit("state", before=str(before), why=str(event), after=str(after))

    def _count(self, data: bytes, fds: list[int]) -> None:
        self._relayed["messages"] += 1
        self._relayed["bytes"] += len(data)
        self._relayed["fds"] += len(fds)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
