"""A controller's line to its agent: messages with descriptors to the peer and back, and the one place for trouble.

Whatever can go wrong (the agent dies, the peer says no, the connection breaks, somebody cancels) becomes an error in
the same inbox as the messages, in the order in which it happened, and is raised by the next receive() or check().
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from controller.fleet import Fleet, Process, ProcessState, WorkerSpec
from controller.migration import codec
from controller.migration.migratable import Parts
from controller.migration.progress import Progress
from shared import log
from shared.errors import (
    FlotillaError,
    MigrationCancelled,
    MigrationError,
    PeerRefused,
    ProtocolError,
    WorkerLost,
)
from shared.handover import MAX_FDS, Message
from shared.linux import close_fds, recv_fds, send_fds
from shared.messages import Verb, error_from_wire, error_to_wire
from shared.pages import Bitmap
from shared.reactor import Event, Reactor, describe, within

T = TypeVar("T")
GOODBYE_SECONDS = 1.0
MAX_INBOX = 64  # a migration has a dozen messages, and hardly two at once


@dataclass(frozen=True, slots=True)
class Settings:
    """Deadlines in seconds; `fault` is for tests (migration_agent/agent.py)."""

    hello: float = 10.0  # for the connection, and again for the peer's first words
    call: float = 10.0  # for our own agent to take a message and see it off
    idle: float = 30.0  # silence after that
    build: float = 60.0  # for BUILD at the destination, BUILT at the source
    state: float = 300.0  # for STATE at the destination: a source may have to wait long for its workers
    started: float = 30.0  # for STARTED at the source, whose guest is paused
    relay: float = 30.0  # for our own agent to see off a message of a remote migration, over a network as slow as it is
    prepared: float = 60.0  # for PREPARED at the source, whose guest is paused, and COMMIT at the destination
    copied: float = 60.0  # for the destination to take what the kernel has of a round
    heard: float = 30.0  # for HEARD at the destination; then it also listens for a source that asks
    answer: float = 600.0  # for a source that asks, at the destination
    ask: float = 600.0  # for an answer, at a source in doubt, which asks every `ask_again`
    ask_again: float = 3.0
    report: float = 2.0  # for STARTED once the ownership word says RUNNING: only the figures are missing
    dying: float = 2.0  # for the end of a destination that runs the guest and fell silent instead of reporting
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the peer's controller. The descriptors belong to whoever takes it."""

    type: Message
    body: dict[str, Any]
    fds: list[int] = field(default_factory=list)

    def take_fds(self) -> list[int]:
        fds = list(self.fds)
        self.fds.clear()
        return fds


class AgentLink:
    """One agent process, one migration."""

    def __init__(self, reactor: Reactor, fleet: Fleet, settings: Settings, progress: Progress) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._settings = settings
        self._progress = progress
        self._process: Process | None = None
        self._sidecar: socket.socket | None = None
        self._inbox: deque[Delivery | FlotillaError] = deque()
        self._arrived = Event()
        self._handed: tuple[socket.socket, bytes] | None = None
        self._opening = False
        self._closed = False
        self._remote = False
        self.connected = False
        self.on_moved: Callable[[dict[str, Any]], None] = lambda _: None
        self.on_accepted: Callable[[], None] = lambda: None

    async def start(self, listener: socket.socket | None = None) -> None:
        """Fork the agent; a destination's gets the listening socket. Raises WorkerError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._sidecar = ours
        settings = self._settings
        spec = WorkerSpec(
            "migration_agent",
            "migration",
            "migration_agent.__main__",
            "agent",
            {"hello_seconds": settings.hello, "idle_seconds": settings.idle, "fault": settings.fault},
        )
        fds = {"sidecar": theirs.fileno()}
        if listener is not None:
            fds["listen"] = listener.fileno()
        try:
            self._process = await self._fleet.start(spec, fds, self._ended)
        finally:
            theirs.close()
        if self._process.channel is not None:
            self._process.channel.on_event = self._event
        self.check()

    # Opening -----------------------------------------------------------------------------------------------------

    async def connect(self, url: str, *, local: bool = True) -> None:
        """Reach the peer's agent and exchange hellos. Raises what went wrong."""
        await self._open(Verb.SEND, 2 * self._settings.hello + self._settings.call, url=url, local=local)

    async def accept(self, url: str) -> None:
        """Wait for a peer, for as long as it takes, and exchange hellos."""
        await self._open(Verb.RECEIVE, None, url=url)

    async def _open(self, verb: Verb, seconds: float | None, **arguments: Any) -> None:
        assert self._process is not None
        self.check()
        self._opening = True
        try:
            await self._call(verb, seconds, **arguments)
        except FlotillaError:
            self.check()  # a cancel comes first, however the agent took it
            raise
        finally:
            self._opening = False
        self.connected = True
        self.check()

    async def _call(self, verb: Verb, seconds: float | None, **arguments: Any) -> dict[str, Any]:
        assert self._process is not None
        try:
            return await self._process.call(verb, seconds, **arguments)
        except WorkerLost as error:
            raise WorkerLost(f"the migration agent is gone: {error.message}") from None

    def cancel(self) -> None:
        """Make whatever waits here fail with MigrationCancelled."""
        self.post(MigrationCancelled("it was cancelled"))
        if self._opening and self._process is not None:
            self._reactor.spawn(self._interrupt(self._process), "cancel migration")

    async def _interrupt(self, process: Process) -> None:
        try:
            await process.call(Verb.CANCEL, GOODBYE_SECONDS)
        except FlotillaError:  # one that hangs is ended the hard way, which fails its calls too
            self._fleet.kill(process)

    # Messages ----------------------------------------------------------------------------------------------------

    async def send(self, kind: Message, body: dict[str, Any], fds: list[int] | None = None) -> None:
        """Returns when the kernel has the whole message. The descriptors stay the caller's."""
        fds = fds or []
        if self._process is None or self._sidecar is None:
            raise WorkerLost(f"{kind.name}: the migration agent has ended")
        data = codec.encode(kind, body)
        if len(fds) > MAX_FDS:
            raise MigrationError(f"{kind.name} has {len(fds)} file descriptors (limit {MAX_FDS})")
        if fds:
            try:
                send_fds(self._sidecar, b"fds", fds)
            except OSError as error:
                raise WorkerLost(f"{kind.name}: the migration agent takes no descriptors: {error.strerror}") from error
        seconds = self._settings.relay if self._remote else self._settings.call
        try:
            await self._call(Verb.DELIVER, seconds, type=int(kind), body=data, fds=len(fds))
        except FlotillaError:
            self.check()  # why the agent could not, rather than that it could not
            raise
        self._progress.bytes_transferred += len(data)
        self._progress.fds_passed += len(fds)

    # Pages of a remote migration

    async def map_memory(self, parts: Parts, fds: list[int], bitmap: Bitmap | None = None) -> None:
        """Give the agent guest RAM: to send what `bitmap` marks or, without one, to write. The descriptors stay
        ours."""
        self._remote = True
        regions = [[gpa, size, offset] for gpa, size, offset, _ in parts]
        with_bitmap = [*fds, bitmap.fd] if bitmap is not None else fds
        assert self._sidecar is not None
        try:
            send_fds(self._sidecar, b"fds", with_bitmap)
        except OSError as error:
            raise WorkerLost(f"the migration agent takes no descriptors: {error.strerror}") from error
        size = bitmap.size if bitmap is not None else 0
        await self._call(Verb.MAP, self._settings.call, regions=regions, bitmap=size)

    async def pump(self, *, sync: bool) -> dict[str, Any]:
        """Send what the bitmap marks; how much it was and how long it took. With `sync` until the destination has it.

        Raises at once whatever trouble comes meanwhile; the round is then over or about to be.
        """
        return await self.watching(self._call(Verb.PUMP, None, sync=sync), "pump")

    async def watching(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """What the work gives. Raises at once whatever trouble comes meanwhile; nobody waits for the work then."""
        task = self._reactor.spawn(work, name)
        task.add_done_callback(lambda _: self._arrived.set())
        try:
            while not task.done():
                self.check()
                self._arrived.clear()
                if not task.done():
                    await self._arrived.wait()
            self.check()
            return task.result()
        finally:
            task.cancel()

    def poll(self, wanted: Message) -> Delivery | None:
        """The next message if it is there already and is `wanted`. Raises what check() raises."""
        self.check()
        item = self._inbox[0] if self._inbox else None
        if not isinstance(item, Delivery) or item.type is not wanted:
            return None
        self._inbox.popleft()
        return item

    async def take_stream(self, seconds: float) -> tuple[socket.socket, bytes]:
        """After END_OF_RAM: the stream itself, the caller's from now on, and what was read of a message that is not
        whole. The agent's end means nothing any more."""
        deadline = time.monotonic() + seconds
        while self._handed is None:
            self.check()
            self._arrived.clear()
            left = max(0.0, deadline - time.monotonic())
            await within(self._reactor, left, self._arrived.wait(), "the stream from our own agent")
        handed, self._handed = self._handed, None
        self._closed = True  # nothing that comes by the agent counts any more
        return handed

    async def receive(self, wanted: Message | tuple[Message, ...], seconds: float | None) -> Delivery:
        """The next message, which must be (one of) `wanted`. Raises what was posted, the peer's reason, Timeout.

        None waits for as long as the peer's agent shows that it lives.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        names = " or ".join(kind.name for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))
        while not self._inbox:
            self._arrived.clear()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            await within(self._reactor, left, self._arrived.wait(), f"{names} from the peer")
        item = self._inbox.popleft()
        if isinstance(item, FlotillaError):
            raise item
        if (reason := reason_of(item)) is not None:
            raise reason
        if item.type not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            close_fds(item.fds)
            raise ProtocolError(f"the peer sent {item.type.name}, not {names}")
        return item

    def post(self, error: FlotillaError) -> None:
        """Let the next receive() or check() raise this."""
        self._inbox.append(error)
        self._arrived.set()

    def check(self) -> None:
        """Raise the first trouble that has arrived, and leave it there."""
        for item in self._inbox:
            error = item if isinstance(item, FlotillaError) else reason_of(item)
            if error is not None:
                raise error

    def _event(self, name: str, arguments: dict[str, Any]) -> None:
        if self._closed or len(self._inbox) > MAX_INBOX:
            return
        if name == "accepted":
            self.on_accepted()
        elif name == "lost":
            self.connected = False
            self.post(error_from_wire(arguments.get("error")))
        try:
            self._take(name, arguments)
        # Of KeyError and TypeError only an agent that has been taken over is capable: it may end its migration, not us.
        except (FlotillaError, OSError, ValueError, KeyError, TypeError) as error:
            self.post(ProtocolError(f"a message from the peer is unusable: {describe(error)}"))

    def _take(self, name: str, arguments: dict[str, Any]) -> None:
        if len(self._inbox) == MAX_INBOX:
            raise ProtocolError(f"{MAX_INBOX} messages came that nobody waits for")
        if name == "moved":
            self.on_moved({key: int(arguments[key]) for key in ("pages", "zeros", "bytes")})
        elif name == "deliver":
            self._deliver(arguments["type"], arguments["body"], arguments["fds"])
        elif name == "handed":
            self._take_handed(arguments["residue"])

    def _deliver(self, kind: int, data: bytes, count: int) -> None:
        fds: list[int] = []
        if count:
            assert self._sidecar is not None
            _, fds = recv_fds(self._sidecar, 16, MAX_FDS)
        try:
            if len(fds) != count:
                raise ProtocolError(f"{count} file descriptors announced, {len(fds)} came")
            message = Message(kind)
            body = codec.decode(message, data)
        except BaseException:
            close_fds(fds)
            raise
        self._progress.bytes_transferred += len(data)
        self._progress.fds_passed += len(fds)
        self._inbox.append(Delivery(message, body, fds))
        self._arrived.set()

    def _take_handed(self, residue: bytes) -> None:
        assert self._sidecar is not None
        _, fds = recv_fds(self._sidecar, 16, 1)
        if len(fds) != 1:
            raise ProtocolError("the stream did not come with its announcement")
        if not isinstance(residue, bytes):
            close_fds(fds)
            raise ProtocolError("the stream came without what was read of it")
        self._handed = socket.socket(fileno=fds[0]), residue
        self.connected = False  # the agent can deliver nothing any more
        self._arrived.set()

    def _ended(self, process: Process) -> None:
        self.connected = False
        if not self._closed:
            self.post(WorkerLost(f"the migration agent is gone: pid {process.pid} ended with {process.exit_status}"))

    # End ---------------------------------------------------------------------------------------------------------

    async def give_up(self, kind: Message, error: BaseException) -> None:
        """Tell the peer's controller why (REFUSED or WITHDRAWN), if it can still be told."""
        if self.connected:
            try:
                await within(
                    self._reactor, GOODBYE_SECONDS, self.send(kind, {"error": error_to_wire(error)}), kind.name
                )
            except FlotillaError as failure:
                log.debug(f"the peer could not be told: {describe(failure)}")

    async def close(self) -> None:
        """End the agent and drop what nobody took. Idempotent."""
        self._closed = True
        self.connected = False
        process, self._process = self._process, None
        if process is not None and process.state is not ProcessState.ENDED:
            try:
                await within(self._reactor, GOODBYE_SECONDS, self._fleet.stop(process), "the migration agent's end")
            except FlotillaError:
                self._fleet.kill(process)
                await process.ended.wait()
        if self._sidecar is not None:
            self._sidecar.close()
            self._sidecar = None
        if self._handed is not None:
            self._handed[0].close()
            self._handed = None
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Delivery):
                close_fds(item.fds)


def reason_of(delivery: Delivery) -> FlotillaError | None:
    """The error inside a REFUSED or WITHDRAWN."""
    if delivery.type is Message.REFUSED:
        error: MigrationError = PeerRefused("the destination refused it")
    elif delivery.type is Message.WITHDRAWN:
        error = MigrationError("the source gave up")
    else:
        return None
    error.__cause__ = error_from_wire(delivery.body["error"])
    return error
