"""The destination's side of a migration. What the source says first makes it a local or a remote one (arrival.py).

Local: it builds everything beside the running guest and touches nothing of it.

With the complete state in hand and loaded it claims the guest by one compare-and-swap. Won: the guest runs here,
whatever has become of the source and the agents. Lost: the source has taken it back, and what was built is thrown away.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from controller.events import EventMonitor
from controller.fleet import Fleet
from controller.migration import codec
from controller.migration.arguments import Url, parse_url
from controller.migration.arrival import Arrival
from controller.migration.descriptors import check_eventfd, check_ram, pidfd_pid
from controller.migration.link import AgentLink, Delivery, Settings
from controller.migration.listener import Listener, TcpListener, listen
from controller.migration.migratable import Accept, Build, Migratable
from controller.migration.outcome import Outcome, answer
from controller.migration.ownership import Owner, Ownership, destination_may_abort
from controller.migration.progress import Direction, Phase, Progress, elapsed_ms, figures
from shared import log
from shared.errors import FlotillaError, MigrationCancelled, MigrationError, ProtocolError
from shared.handover import Message
from shared.linux import close_fds, process_ended
from shared.reactor import Cancelled, Event, Reactor, describe

OURS = (Phase.CLAIMED, Phase.COMMITTED, Phase.RUNNING)  # the source can't go on with it, whatever we do
GRACE_SECONDS = 5.0  # for a dead source's last words, which are still on their way


class Incoming:
    """One attempt to receive a VM.

    `vm` is None until the guest is ours. After run() has returned, `running` is False when the guest was paused at the
    source. When run() raises and `vm` is not None, the guest is ours and loaded but could not be started: its owner
    must keep it. `ended` is set when nothing of the migration is left.
    """

    def __init__(
        self,
        reactor: Reactor,
        fleet: Fleet,
        events: EventMonitor,
        build: Build,
        accept: Accept,
        on_path: Callable[[str, bool], None] = lambda _path, _exists: None,
        *,
        settings: Settings | None = None,
    ) -> None:
        """`on_path(path, exists)` hears of the listening socket's name, for whoever removes it after a kill."""
        self._reactor = reactor
        self._fleet = fleet
        self._events = events
        self._build = build
        self._accept = accept
        self._on_path = on_path
        self._settings = settings or Settings()
        self._progress = Progress(events, Direction.RECEIVE)
        self._link = AgentLink(reactor, fleet, self._settings, self._progress)
        self._listener: Listener | TcpListener | None = None
        self._arrival: Arrival | None = None
        self._outcome: Outcome | None = None
        self._ownership: Ownership | None = None
        self._eventfd = -1
        self._source = -1  # pidfd of the source's controller
        self._built: Migratable | None = None
        self._paused = False
        self._cancelled = False
        self.vm: Migratable | None = None
        self.running = False
        self.ended = Event()

    def progress(self) -> dict[str, Any]:
        return self._progress.report()

    def cancel(self) -> str:
        """Give up, as long as the source can still go on; run() tells the outcome. Why it is too late for that, "" as
        long as it is not."""
        if self._cancelled or not self._progress.ongoing:
            return ""
        if self._progress.phase in OURS:
            return "the guest is this VMM's by now"
        self._cancelled = True
        if self._arrival is None or not self._arrival.cancel():
            self._link.cancel()
        return ""

    async def run(self, url: str) -> Migratable:
        """Listen, receive and start one VM. Raises ConfigError (the URL or its path), MigrationError and its children.

        Whatever it raised, another Incoming may try again at once.
        """
        task = self._reactor.spawn(self._run(parse_url(url)), "incoming migration")
        try:
            return await task
        except Cancelled:
            self.cancel()
            raise

    async def _run(self, url: Url) -> Migratable:
        try:
            try:
                first = await self._first(url)
                if first.type is Message.MACHINE:
                    await self._arrive(first)
                else:
                    await self._prepare(first)
                    await self._take_over()
            except Exception as error:
                await self._give_up(url.text, error)
            assert self.vm is not None
            self._progress.succeed()
            return self.vm
        finally:
            if self._arrival is not None:
                self._keep_outcome(url, self._arrival)
                self._arrival.close()
            await self._link.close()
            self._let_go()
            self.ended.set()

    async def _arrive(self, machine: Delivery) -> None:
        """From another host."""
        self._arrival = arrival = Arrival(
            self._reactor, self._link, self._progress, self._settings, self._build, self._accept
        )
        try:
            await arrival.run(machine)
        finally:
            self.vm, self._built, self.running = arrival.vm, arrival.built, arrival.running

    def _keep_outcome(self, url: Url, arrival: Arrival) -> None:
        if (known := arrival.outcome()) is not None:
            ticket, heard, line = known
            self._outcome = Outcome(self._reactor, self._fleet, self._events, self._settings, url)
            self._outcome.start(ticket, heard, line, self._on_path)

    async def forget(self) -> None:
        """After the end: a source that is in doubt about this one gets no answer any more, and its URL is free."""
        if self._outcome is not None:
            await self._outcome.close()

    # The straight way --------------------------------------------------------------------------------------------

    async def _first(self, url: Url) -> Delivery:
        """A source's first message. One that only asks for another migration's outcome is told that it is not known."""
        while True:
            await self._meet(url)
            first = await self._link.receive((Message.BUILD, Message.MACHINE, Message.ASK), self._settings.build)
            if first.type is not Message.ASK:
                return first
            try:
                await answer(self._link, self._settings, first)
            except FlotillaError as error:
                log.debug(f"migration: somebody asked for another one: {describe(error)}")
            await self._link.close()
            if self._cancelled:
                raise MigrationCancelled("it was cancelled")
            self._link = AgentLink(self._reactor, self._fleet, self._settings, self._progress)

    async def _meet(self, url: Url) -> None:
        self._progress.to(Phase.LISTENING)
        self._listener = listen(url)
        if self._listener.path:
            self._on_path(self._listener.path, True)
        self._link.on_accepted = self._accepted
        await self._link.start(self._listener.sock)
        self._progress.emit("migration-receive-ready")
        await self._link.accept(url.text)
        self._progress.to(Phase.READY)
        self._progress.emit("migration-receive-started")

    def _accepted(self) -> None:
        self._remove_name()
        self._progress.to(Phase.GREETING)

    async def _prepare(self, delivery: Delivery) -> None:
        """Build everything that the source describes."""
        self._progress.to(Phase.BUILDING)
        began = time.monotonic()
        self._built = await self._build_from(delivery)
        self._link.check()
        self._progress.breakdown["build_ms"] = elapsed_ms(began)
        ourselves = os.pidfd_open(os.getpid())
        try:
            timing = {"destination_ms": elapsed_ms(began)}
            await self._link.send(Message.BUILT, {"timing": timing}, [ourselves])
        finally:
            os.close(ourselves)
        self._progress.to(Phase.BUILT)

    async def _build_from(self, delivery: Delivery) -> Migratable:
        body, fds = delivery.body, delivery.take_fds()
        try:
            parts, disks, taps = codec.parts_of(body), codec.disks_of(body), codec.taps_of(body)
            if len(fds) != 3 + len(parts) + len(disks) + sum(taps.values()):
                what = f"{len(parts)} regions, {len(disks)} disks, {sum(taps.values())} TAP queues"
                raise ProtocolError(f"BUILD has {what} and {len(fds)} descriptors")
            self._ownership = Ownership.attach(fds[0])
            fds.pop(0)
            check_eventfd(fds[0])
            self._eventfd = fds.pop(0)
            pidfd_pid(fds[0])
            self._source = fds.pop(0)
            for (_, size, offset, _), fd in zip(parts, fds, strict=False):
                check_ram(fd, offset + size)
        except BaseException:
            close_fds(fds)
            raise
        self._reactor.add_reader(self._source, self._source_ended)
        self._paused = body["paused"]
        rest = iter(fds)
        ram = list(islice(rest, len(parts)))
        images = dict(zip(disks, islice(rest, len(disks)), strict=True))
        queues = {name: list(islice(rest, count)) for name, count in taps.items()}
        return await self._build(body["config"], parts, ram, images, queues, body["info"])

    def _source_ended(self) -> None:
        """Not at once an error: its state may be complete and on its way through the agents."""
        self._reactor.remove_reader(self._source)
        died = MigrationError("the source died before it had handed the guest over")
        self._reactor.call_later(GRACE_SECONDS, lambda: self._link.post(died))

    async def _take_over(self) -> None:
        """Load, claim, start. After STATE has arrived the link does not matter any more."""
        progress, ownership, vm = self._progress, self._ownership, self._built
        assert ownership is not None and vm is not None
        delivery = await self._link.receive(Message.STATE, self._settings.state)
        progress.breakdown["source"] = figures(delivery.body.get("source"))
        progress.to(Phase.LOADING)
        began = time.monotonic()
        timing: dict[str, Any] = {"load": dict(await vm.load(delivery.body["state"]) or {})}
        timing["load_ms"] = elapsed_ms(began)
        if destination_may_abort(self._cancelled, load_failed=False, source_ended=process_ended(self._source)):
            raise MigrationCancelled("it was cancelled")
        if not ownership.move(Owner.OFFERED, Owner.CLAIMED):
            self._link.check()  # its reason, if that has arrived
            raise MigrationError("the source took the guest back")
        progress.to(Phase.CLAIMED)
        if not ownership.move(Owner.CLAIMED, Owner.RUNNING):
            raise MigrationError("the source took the guest back")  # it must believe us dead
        self.vm, self._built = vm, None
        self._signal()
        progress.to(Phase.RUNNING)
        if not self._paused:
            began = time.monotonic()
            timing["start"] = dict(await vm.start_loaded() or {})
            timing["start_ms"] = elapsed_ms(began)
            self.running = True
        progress.breakdown.update(timing)
        running_at = time.monotonic()
        if self.running and isinstance(paused_at := delivery.body.get("paused_at"), float):
            progress.downtime_ms = elapsed_ms(paused_at, running_at)
        await self._report({"timing": timing, "running_at": running_at})

    def _signal(self) -> None:
        try:
            os.eventfd_write(self._eventfd, 1)
        except OSError as error:  # the word is what counts, and the source will look at it
            log.warn(f"migration: the source could not be signalled: {error.strerror}")

    async def _report(self, started: dict[str, Any]) -> None:
        """Figures for the source; the guest runs with or without them."""
        try:
            await self._link.send(Message.STARTED, started)
        except FlotillaError as error:
            log.info(f"migration: the source was not told: {describe(error)}")

    # Ends --------------------------------------------------------------------------------------------------------

    async def _give_up(self, url: str, problem: Exception) -> None:
        """Always raises. The source hears first: its guest may be waiting for it."""
        if self._ownership is not None and self._ownership.move(Owner.CLAIMED, Owner.OFFERED):
            self._signal()  # nothing was touched yet, so it is the source's to take back
        if self._arrival is not None:
            await self._arrival.refuse(problem)
        else:
            await self._link.give_up(Message.REFUSED, problem)
        if self._built is not None:
            try:
                await self._built.destroy()
            except Exception as failure:
                log.error(f"migration: what was built could not be taken down: {describe(failure)}")
            self._built = None
        if self.vm is not None:
            error: MigrationError = MigrationError(f"the guest from {url} is here and could not be started")
        elif isinstance(problem, MigrationCancelled):
            error = MigrationCancelled(f"receiving from {url} was cancelled")
        else:
            error = MigrationError(f"receiving from {url} failed")
        error.__cause__ = problem if isinstance(problem, FlotillaError) else FlotillaError(describe(problem))
        self._progress.fail(error)
        raise error

    def _remove_name(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            if listener.path:
                self._on_path(listener.path, False)

    def _let_go(self) -> None:
        self._remove_name()
        for fd in (self._eventfd, self._source):
            if fd >= 0:
                self._reactor.remove_reader(fd)
                os.close(fd)
        self._eventfd = self._source = -1
        if self._ownership is not None:
            self._ownership.close()
            self._ownership = None
