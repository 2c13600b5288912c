"""The commit of a remote migration: its rules, and the line on which the controllers follow them.

    source                                                  destination
    PREPARING     ◀─────────────── PREPARED ──────────────  everything is here and loaded; nothing has been touched
    locks let go
    COMMITTED     ──────────────── COMMIT ───────────────▶  takes its locks, starts rings and vCPUs
    gone          ◀─────────────── STARTED ───────────────  or REFUSED, if it could not: then it has started nothing
                  ──────────────── HEARD ────────────────▶  (WITHDRAWN after REFUSED)

The stream is ordered and the only channel, so each side knows only what it has said and heard. The destination runs the
guest if and only if it has heard COMMIT (and could start). The source may run it only if that can't be: COMMIT was
never said, or REFUSED was heard after it. In between it is in doubt: no protocol over a lone stream can know. It stays
paused and says so until the answer comes after all, by this stream or by another on which it asks (outcome.py), or
somebody who can look at the other host says which it is.
tests/controller/migration/test_remote_model.py enumerates every kill and every cut.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from enum import StrEnum
from typing import Any

from controller.migration import codec
from controller.migration.link import GOODBYE_SECONDS, Delivery, reason_of
from shared import log, wire
from shared.errors import FlotillaError, MigrationCancelled, MigrationError, ProtocolError
from shared.handover import Message
from shared.messages import error_to_wire
from shared.reactor import Event, Reactor, describe, within, writable
from shared.wire import Decoder, Frame

READ_BYTES = 1 << 16


class Heard(StrEnum):
    """The destination's last word at the source."""

    NOTHING = "nothing"
    STARTED = "started"
    REFUSED = "refused"
    END = "end"  # the stream is over or unusable, or somebody gave up: nothing will be heard


class Decision(StrEnum):
    WAIT = "wait"
    RESUME = "resume"
    GONE = "gone"
    IN_DOUBT = "in doubt"


def source_decision(committed: bool, heard: Heard) -> Decision:
    """`committed`: at least one byte of COMMIT is the kernel's."""
    if not committed:
        return Decision.WAIT if heard is Heard.NOTHING else Decision.RESUME
    return {
        Heard.NOTHING: Decision.WAIT,
        Heard.STARTED: Decision.GONE,
        Heard.REFUSED: Decision.RESUME,
        Heard.END: Decision.IN_DOUBT,
    }[heard]


def destination_may_start(commit_heard: bool, refused: bool) -> bool:
    """`refused`: REFUSED has been said, or tried to be."""
    return commit_heard and not refused


def outcome(ours: bool, refused: bool) -> Heard:
    """What the destination may tell a source that asks, now or later: only what will never change again. `ours`: the
    guest is the destination's; `refused`: REFUSED has been said, or tried to be."""
    if ours:
        return Heard.STARTED
    return Heard.REFUSED if refused else Heard.NOTHING


class Line:
    """The stream, between the two controllers themselves. Messages are small and few; heartbeats are passed over.

    close() is the end of it, at the peer too: nobody else holds the socket any more.
    """

    def __init__(self, reactor: Reactor, sock: socket.socket, residue: bytes) -> None:
        self._reactor = reactor
        self._sock = sock
        self._decoder = Decoder.resumed(residue)
        self._inbox: deque[Delivery | FlotillaError] = deque()
        self._arrived = Event()
        self._closed = False
        self._ended = False  # nothing more will be read
        sock.setblocking(False)
        reactor.add_reader(sock.fileno(), self._read)

    async def send(self, kind: Message, body: dict[str, Any], seconds: float) -> None:
        """Returns when the kernel has all of it. Raises NothingSent when it has none of it, MigrationError
        otherwise."""
        data = memoryview(wire.encode(kind, codec.encode(kind, body)))
        whole = len(data)
        deadline = time.monotonic() + seconds
        while data:
            if self._closed:
                error: OSError | FlotillaError = MigrationError("the connection is closed")
            else:
                try:
                    data = data[self._sock.send(data) :]
                    continue
                except BlockingIOError:
                    await writable(self._reactor, self._sock.fileno(), max(0.0, deadline - time.monotonic()))
                    continue
                except OSError as broken:
                    error = broken
            text = f"{kind.name} could not be sent: {getattr(error, 'strerror', None) or error}"
            raise (NothingSent if len(data) == whole else MigrationError)(text)

    async def receive(self, wanted: tuple[Message, ...], seconds: float | None) -> Delivery:
        """Raises the peer's reason, what was posted, MigrationError at the end of the stream, Timeout."""
        names = " or ".join(kind.name for kind in wanted)
        if not self._inbox:
            self._arrived.clear()
            await within(self._reactor, seconds, self._arrived.wait(), f"{names} from the peer")
        item = self._inbox.popleft()
        if isinstance(item, FlotillaError):
            raise item
        if (reason := reason_of(item)) is not None:
            raise reason
        if item.type not in wanted:
            raise ProtocolError(f"the peer sent {item.type.name}, not {names}")
        return item

    async def heard(self, seconds: float) -> bool:
        """Whether the source has said that it knows the outcome; False at the end of the stream. Raises Timeout."""
        deadline = time.monotonic() + seconds
        while True:
            if not self._inbox:
                if self._ended:  # somebody has taken the error already
                    return False
                self._arrived.clear()
                left = max(0.0, deadline - time.monotonic())
                await within(self._reactor, left, self._arrived.wait(), "HEARD from the peer")
            item = self._inbox.popleft()
            if isinstance(item, Delivery):
                if item.type in (Message.HEARD, Message.WITHDRAWN):
                    return True
            elif not isinstance(item, MigrationCancelled):  # that one is ours
                return False

    def post(self, error: FlotillaError) -> None:
        """Let the next receive() or check() raise this."""
        self._inbox.append(error)
        self._arrived.set()

    async def give_up(self, kind: Message, error: BaseException) -> None:
        """Tell the peer why (REFUSED or WITHDRAWN), if it can still be told, and end the stream."""
        await self.tell(kind, {"error": error_to_wire(error)})
        self.close()

    async def tell(self, kind: Message, body: dict[str, Any]) -> None:
        """Say something, if it can still be said."""
        try:
            await self.send(kind, body, GOODBYE_SECONDS)
        except FlotillaError as failure:
            log.debug(f"the peer could not be told: {describe(failure)}")

    def check(self) -> None:
        """Raise the first trouble that has arrived, and leave it there."""
        for item in self._inbox:
            error = item if isinstance(item, FlotillaError) else reason_of(item)
            if error is not None:
                raise error

    def _read(self) -> None:
        try:
            while not self._closed:
                data = self._sock.recv(min(READ_BYTES, self._decoder.wants))
                if not data:
                    raise MigrationError("the peer closed the connection")
                item = self._decoder.feed(data)
                if isinstance(item, Frame):
                    if item.type is not Message.HEARTBEAT:
                        self._inbox.append(Delivery(item.type, codec.decode(item.type, item.body)))
                        self._arrived.set()
                elif item is not None:
                    raise ProtocolError("the peer sends pages after the end of RAM")
        except BlockingIOError:
            return
        except OSError as error:
            self._over(MigrationError(f"the connection to the peer broke: {error.strerror}"))
        except FlotillaError as error:
            self._over(error)

    def _over(self, error: FlotillaError) -> None:
        self._ended = True
        self._reactor.remove_reader(self._sock.fileno())
        self.post(error)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._reactor.remove_reader(self._sock.fileno())
            self._sock.close()


class NothingSent(MigrationError):
    """Not one byte of the message is the kernel's: the peer can't have heard it."""
