"""After a stream that broke around COMMIT: the source asks what has become of the guest, and the destination answers.

    source, in doubt                                        destination, its part over, STARTED or REFUSED not confirmed
    Inquiry                                                 Outcome
    connects to the same URL ───────── ASK name ─────────▶  listens there again
    the secret is the one of PREPARED ◀── OUTCOME ────────  started or refused, and the secret
    gone, or back ─────────────────── HEARD ─────────────▶  listens no more

Both give up after some minutes, and the doubt is what it was. The ticket (a name and a secret) travels with PREPARED: a
stranger who has come to listen at that address knows neither, and whatever it says is no answer. The destination says
only what will never change again (commit.outcome), so it does not matter how old an answer is.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from controller.events import EventMonitor
from controller.fleet import Fleet
from controller.migration.arguments import Url
from controller.migration.commit import Heard, Line
from controller.migration.link import AgentLink, Delivery, Settings
from controller.migration.listener import Listener, TcpListener, listen
from controller.migration.progress import Direction, Progress
from shared import log
from shared.errors import FlotillaError, MigrationError, ProtocolError, Timeout
from shared.handover import Message
from shared.linux import close_fds
from shared.reactor import Event, Reactor, describe, within

ANSWERS = (Heard.STARTED, Heard.REFUSED)
NO_ANSWER = {"outcome": str(Heard.NOTHING), "secret": ""}
LAST_SECONDS = 5.0  # for the end of a question that is under way
AGAIN_SECONDS = 0.1  # until it listens again after a peer that was no good


class Ticket(NamedTuple):
    name: str
    secret: str

    @classmethod
    def fresh(cls) -> Ticket:
        return cls(secrets.token_hex(16), secrets.token_hex(16))

    @classmethod
    def of(cls, given: object) -> Ticket | None:
        """From PREPARED; None for what is none."""
        if isinstance(given, list) and len(given) == 2 and all(isinstance(text, str) and text for text in given):
            return cls(*given)
        return None


class _Links:
    """The agents of one side, one after the other, until stop()."""

    def __init__(self, reactor: Reactor, fleet: Fleet, events: EventMonitor, settings: Settings, url: Url) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._events = events
        self._settings = settings
        self._url = url
        self._link: AgentLink | None = None
        self._stopped = Event()
        self.ended = Event()

    def _fresh(self, direction: Direction) -> AgentLink:
        self._link = AgentLink(self._reactor, self._fleet, self._settings, Progress(self._events, direction))
        return self._link

    async def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def _pause(self, seconds: float) -> None:
        """Or until stop()."""
        try:
            await within(self._reactor, seconds, self._stopped.wait(), "the end")
        except Timeout:
            pass

    async def close(self) -> None:
        """Ends whatever is under way, and waits for that. Idempotent."""
        self._stopped.set()
        if self._link is not None:
            self._link.cancel()
        await self.ended.wait()


class Inquiry(_Links):
    """At the source. `on_answer` hears the answer, if one comes."""

    def start(self, ticket: Ticket, on_answer: Callable[[Heard], None]) -> None:
        self._reactor.spawn(self._run(ticket, on_answer), "inquiry")

    async def close(self) -> None:
        """No more questions. One that is under way is asked to its end, if that comes soon: a VMM that waits for a
        guest at this address would take a cut for that guest's, and wait no more."""
        self._stopped.set()
        try:
            await within(self._reactor, LAST_SECONDS, self.ended.wait(), "the end of the last question")
        except Timeout:
            await super().close()

    async def _run(self, ticket: Ticket, on_answer: Callable[[Heard], None]) -> None:
        settings = self._settings
        deadline = time.monotonic() + settings.ask
        try:
            while not self._stopped.is_set() and time.monotonic() < deadline:
                try:
                    heard = await self._ask(ticket)
                except FlotillaError as error:
                    log.debug(f"migration in doubt, and no answer from {self._url.text}: {describe(error)}")
                    await self._pause(settings.ask_again)
                else:
                    log.info(f"migration in doubt: {self._url.text} answers that the guest is {heard}")
                    on_answer(heard)
                    return
        finally:
            self.ended.set()

    async def _ask(self, ticket: Ticket) -> Heard:
        link = self._fresh(Direction.SEND)
        try:
            await link.start()
            await link.connect(self._url.text, local=False)
            await link.send(Message.ASK, {"name": ticket.name})
            answer = (await link.receive(Message.OUTCOME, self._settings.hello)).body
            if not hmac.compare_digest(answer["secret"].encode(), ticket.secret.encode()):
                raise ProtocolError("whoever listens there is not the destination of this migration")
            if answer["outcome"] not in ANSWERS:
                raise ProtocolError(f"the destination's answer is {answer['outcome']!r}")
            await self._say_heard(link)
            return Heard(answer["outcome"])
        finally:
            await self._close_link()

    async def _say_heard(self, link: AgentLink) -> None:
        try:
            await link.send(Message.HEARD, {})
        except FlotillaError as error:  # the answer counts all the same; the destination goes on listening
            log.debug(f"the destination could not be told that it was heard: {describe(error)}")


class Outcome(_Links):
    """At the destination, from the end of its part on. `ended` once the source knows, or has had time enough.

    `line`, the stream, is closed at the end. `on_path(path, exists)` hears of the listening socket's name.
    """

    def start(self, ticket: Ticket, heard: Heard, line: Line, on_path: Callable[[str, bool], None]) -> None:
        assert heard in ANSWERS
        self._ticket, self._heard, self._line, self._on_path = ticket, heard, line, on_path
        self._reactor.spawn(self._run(), "outcome")

    async def close(self) -> None:
        self._line.post(MigrationError("nobody waits any more"))
        await super().close()

    async def _run(self) -> None:
        try:
            if not await self._known_by_stream(self._settings.heard) and not self._stopped.is_set():
                log.info(f"migration: its source may be in doubt, and can ask at {self._url.text}")
                self._reactor.spawn(self._watch_stream(), "watch stream")
                await self._answer_all()
        except FlotillaError as error:
            log.info(f"migration: a source that is in doubt can't ask: {describe(error)}")
        finally:
            self._line.post(MigrationError("it is over"))  # for _watch_stream()
            self._line.close()
            self.ended.set()

    async def _known_by_stream(self, seconds: float) -> bool:
        try:
            return await self._line.heard(seconds)
        except Timeout:
            return False

    async def _watch_stream(self) -> None:
        """A network that comes back may bring HEARD, late."""
        if await self._known_by_stream(self._settings.answer):
            self._stopped.set()
            if self._link is not None:
                self._link.cancel()

    async def _answer_all(self) -> None:
        deadline = time.monotonic() + self._settings.answer
        while not self._stopped.is_set() and (left := deadline - time.monotonic()) > 0:
            listener = listen(self._url)
            try:
                if await self._meet(listener, left):
                    return
            except FlotillaError as error:
                log.debug(f"migration: no source that asks: {describe(error)}")
                await self._pause(AGAIN_SECONDS)
            finally:
                listener.close()
                if listener.path:
                    self._on_path(listener.path, False)

    async def _meet(self, listener: Listener | TcpListener, left: float) -> bool:
        """Answer one peer, whoever it is; whether it was the source, and knows now. Raises FlotillaError."""
        link = self._fresh(Direction.RECEIVE)
        if listener.path:
            self._on_path(listener.path, True)
        try:
            await link.start(listener.sock)
            await within(self._reactor, left, link.accept(self._url.text), "a source that asks")
            first = await link.receive((Message.ASK, Message.MACHINE, Message.BUILD), self._settings.hello)
            if first.type is Message.ASK:
                return await answer(link, self._settings, first, self._ticket, self._heard)
            close_fds(first.fds)
            await link.give_up(Message.REFUSED, MigrationError("nobody receives here now", "receive-migration first"))
            return False
        finally:
            await self._close_link()


async def answer(
    link: AgentLink, settings: Settings, ask: Delivery, ticket: Ticket | None = None, heard: Heard = Heard.NOTHING
) -> bool:
    """Whether it was the source that `ticket` is of, and knows now. Raises FlotillaError."""
    known = ticket is not None and hmac.compare_digest(ask.body["name"].encode(), ticket.name.encode())
    told = {"outcome": str(heard), "secret": ticket.secret} if ticket is not None and known else NO_ANSWER
    await link.send(Message.OUTCOME, told)
    await link.receive(Message.HEARD, settings.hello)  # or the end: a peer that was told nothing hangs up
    return known
