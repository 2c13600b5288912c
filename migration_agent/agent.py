"""The agent: connects or accepts, relays messages between its controller and the peer's, moves pages, keeps time.

    controller ──verbs (zmq)──▶ agent ══ stream ══ agent ──"deliver" (zmq event)──▶ controller
               ── fds: one datagram on the sidecar, before the verb or event that counts them ──

Verbs: SEND or RECEIVE, then DELIVER, for a remote migration MAP and PUMP, CANCEL (shared/messages.py).

Events to the controller, in the order in which things happened: `state` {before, why, after}, `accepted` {} (the
listening path has served its purpose), `deliver` {type, body, fds}, `moved` {pages, zeros, bytes} (so far, of a round
or, at the destination, of all), `handed` {residue} (the stream itself comes on the sidecar: the agent's part is over),
`lost` {error} (no more messages will come, and why). Bodies are opaque here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import msgpack

from migration_agent.dial import connect, tune
from migration_agent.pages import Pump, Sink
from migration_agent.states import Event, Machine, Role, State, event_of
from migration_agent.stream import Stream
from shared import log
from shared.control import Channel
from shared.errors import (
    FlotillaError,
    MigrationCancelled,
    MigrationError,
    ProtocolError,
    Timeout,
)
from shared.handover import MAX_FDS, Message
from shared.linux import close_fds, recv_fds, send_fds
from shared.messages import error_to_wire
from shared.pages import Bitmap, Regions
from shared.reactor import Future, Reactor, Timer, describe, readable, within
from shared.rehearsal import KILLED, stand_still
from shared.wire import VERSION, Frame, Hello, Item, PageList, encode, encode_hello
from shared.worker import Start

HELLO_SECONDS = 10.0
IDLE_SECONDS = 30.0
REPORT_SECONDS = 0.5


class Agent:
    """`spec` of the Start: hello_seconds, idle_seconds, fault (all optional). One migration, then the process ends."""

    def __init__(self, reactor: Reactor, start: Start) -> None:
        self._reactor = reactor
        self._sandbox = start.sandbox
        self._sidecar = socket.socket(fileno=start.fds["sidecar"])
        self._sidecar.setblocking(False)
        self._listener = socket.socket(fileno=start.fds["listen"]) if "listen" in start.fds else None
        self._hello_seconds = float(start.spec.get("hello_seconds", HELLO_SECONDS))
        self._idle_seconds = float(start.spec.get("idle_seconds", IDLE_SECONDS))
        self._fault: tuple[Callable[[], None], str] | None = None
        if what := start.spec.get("fault"):
            self.fault(what)
        self._machine = Machine(self._changed)
        self._stream: Stream | None = None
        self._greeting: Future[Hello] = Future()
        self._opening: Future[None] = Future()  # fails when connecting or accepting is to end
        self._pump: Pump | None = None
        self._sink: Sink | None = None
        self._synced: Future[None] = Future()
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
        channel.handlers["map"] = self._map
        channel.handlers["pump"] = self._send_round
        channel.handlers["cancel"] = self._cancel

    def stats(self) -> dict[str, int]:
        return dict(self._relayed)

    def epoch(self) -> int:
        return self._beats

    def fault(self, what: str) -> None:
        """Fault injection: "kill@offered" ends this process the moment it enters that state, "hang@offered" has it do
        nothing any more."""
        name, _, state = what.partition("@")
        self._fault = ({"kill": lambda: os._exit(KILLED), "hang": lambda: stand_still(0)}[name], str(State(state)))

    def close(self) -> None:
        if self._pulse is not None:
            self._pulse.cancel()
        if self._stream is not None:
            self._stream.close()
        for mapped in (self._pump, self._sink):
            if mapped is not None:
                mapped.close()
        if self._listener is not None:
            self._listener.close()
        self._sidecar.close()

    # Verbs of the controller -------------------------------------------------------------------------------------

    async def _send(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """SEND: connect and greet. The answer names the peer's version."""
        url = arguments["url"]
        self._machine.role = Role.SOURCE
        self._machine.to(Event.CONNECT)
        try:
            opening = connect(self._reactor, url, self._check_opening)
            sock = await within(self._reactor, self._hello_seconds, opening, f"connection to {url}")
            self._machine.to(Event.CONNECTED)
            self._open(sock)
            assert self._stream is not None
            self._stream.send(encode_hello())
            return await self._greeted()
        except FlotillaError as error:
            self._fail(error)
            raise

    def _check_opening(self) -> None:
        if self._opening.done():
            self._opening.result()

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
            tune(sock)
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
            close_fds(fds)
            raise
        self._count(data, fds)
        if self._machine.over and self._pump is not None:  # WITHDRAWN: no more pages, but the frame's end
            self._pump.halt(MigrationCancelled("the source gave up"))
        if message is Message.END_OF_RAM:
            self._stream.stop_reading()  # what comes after it is the controller's
        await self._stream.send(data, fds)
        if message is Message.END_OF_RAM:
            self._hand_over()
        return {}

    def _take_fds(self, count: int) -> list[int]:
        if not count:
            return []
        _, fds = recv_fds(self._sidecar, 16, MAX_FDS)
        if len(fds) != count:
            close_fds(fds)
            raise ProtocolError(f"the sidecar brought {len(fds)} file descriptors, not {count}")
        return fds

    def _map(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """MAP: guest RAM, `regions` [[gpa, size, offset]…] and a descriptor for each; with `bitmap` (bytes) one more,
        of what a PUMP is to send. At the destination RAM is written."""
        regions, size = arguments["regions"], arguments["bitmap"]
        fds = self._take_fds(len(regions) + (1 if size else 0))
        try:
            parts = [(gpa, length, offset, fd) for (gpa, length, offset), fd in zip(regions, fds, strict=False)]
            mapped = Regions(parts, writable=not size)
        except BaseException:
            close_fds(fds)
            raise
        if size:
            self._pump = Pump(mapped, Bitmap(fds[-1], size))
        else:
            self._sink = Sink(mapped)
            if self._stream is not None:
                self._stream.sink = self._sink
        return {}

    async def _send_round(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """PUMP: send every page that is set in the bitmap. Answered when the kernel has all of them or, with `sync`,
        the peer. `seconds` is how long that took, `sync_seconds` how much of it the peer's answer did."""
        if self._pump is None or self._stream is None:
            raise ProtocolError("PUMP before MAP, or without a connection")
        self._machine.check_pages(Message.PAGES)
        pump = self._pump
        done = self._stream.pump(pump)
        report = self._reactor.call_later(REPORT_SECONDS, lambda: self._report_round(pump))
        try:
            await done
        finally:
            report.cancel()
        written = time.monotonic()
        if arguments["sync"] and not self._machine.over:
            self._synced = Future()
            self._stream.send(encode(Message.SYNC))
            await self._synced
        ended = time.monotonic()
        return {**pump.moved.wire(), "seconds": ended - pump.began, "sync_seconds": ended - written}

    def _report_round(self, pump: Pump) -> None:
        if not pump.done.done():
            self.emit("moved", **pump.moved.wire())
            self._reactor.call_later(REPORT_SECONDS, lambda: self._report_round(pump))

    def _hand_over(self) -> None:
        """Everything has been said that agents say: the stream is the controller's."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        sock, residue = stream.detach()
        try:
            send_fds(self._sidecar, b"stream", [sock.fileno()])
        except OSError as error:
            log.error(f"the controller does not take the stream: {error.strerror}")
            return
        finally:
            sock.close()
        self.emit("handed", residue=residue)

    def _cancel(self, _: dict[str, Any]) -> dict[str, Any]:
        self._fail(MigrationCancelled("the migration was cancelled"))
        return {}

    # The peer ----------------------------------------------------------------------------------------------------

    def _open(self, sock: socket.socket) -> None:
        self._sandbox.seal()  # names, addresses and files were for reaching the peer; now its bytes come
        self._stream = Stream(self._reactor, sock, self._item, self._fail)

    def _item(self, item: Item) -> None:
        if isinstance(item, Hello):
            self._hello(item)
        elif isinstance(item, PageList):
            self._expect(Message.PAGES, Role.DESTINATION)
        elif item.type is Message.SYNC:
            self._expect(Message.SYNC, Role.DESTINATION)
            self._report_all()
            assert self._stream is not None
            self._stream.send(encode(Message.SYNCED))
        elif item.type is Message.SYNCED:
            self._expect(Message.SYNCED, Role.SOURCE)
            self._synced.set_result(None)
        elif item.type is not Message.HEARTBEAT and not self._machine.over:
            self._frame(item)
        else:
            close_fds(item.fds)

    def _expect(self, message: Message, role: Role) -> None:
        """An agents' message of the peer's. Raises ProtocolError when it has no place here."""
        if self._machine.role is not role:
            raise ProtocolError(f"{message.name} is not for a migration's {self._machine.role!s}")
        if not self._machine.over:
            self._machine.check_pages(message)

    def _report_all(self) -> None:
        if self._sink is not None:
            self.emit("moved", **self._sink.moved.wire())

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
            close_fds(frame.fds)
        self.emit("deliver", type=int(frame.type), body=frame.body, fds=count)
        if self._machine.over and self._pump is not None:  # REFUSED
            self._pump.halt(MigrationError("the destination refused it"))
            self._synced.set_exception(MigrationError("the destination refused it"))
        if frame.type is Message.END_OF_RAM:
            self._report_all()
            assert self._stream is not None
            self._stream.stop_reading()
            self._stream.send(b"").add_done_callback(lambda _: self._hand_over())  # behind what is still to go out

    def _beat(self) -> None:
        """Say that we live, and see whether the peer does."""
        self._beats += 1
        if self._machine.over or self._stream is None:
            return
        silence = time.monotonic() - self._stream.heard
        if silence > self._idle_seconds:
            self._fail(Timeout(f"the peer has been silent for {self._idle_seconds:g} s"))
            return
        if not self._stream.congested:
            self._stream.send(encode(Message.HEARTBEAT))
        self._report_all()
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
        self._synced.set_exception(error)
        if self._pump is not None:
            self._pump.halt(error)
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
            self._fault[0]()
        self.emit("state", before=str(before), why=str(event), after=str(after))

    def _count(self, data: bytes, fds: list[int]) -> None:
        self._relayed["messages"] += 1
        self._relayed["bytes"] += len(data)
        self._relayed["fds"] += len(fds)
