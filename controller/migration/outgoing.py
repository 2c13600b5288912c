"""The source's side of a local migration. The guest is here until the ownership word says otherwise.

Until OFFERED every failure is simply the end of it. From OFFERED on nobody's message and nobody's death but the two
controllers' counts: `_settle` reads the word and, by the rule in ownership.py, takes the guest back, waits, or lets go.
"""

from __future__ import annotations

import contextlib
import os
import time
from enum import StrEnum
from typing import Any

from controller.config.version import BUILD_VERSION
from controller.events import EventMonitor
from controller.fleet import Fleet
from controller.migration.arguments import unix_path
from controller.migration.descriptors import pidfd_pid
from controller.migration.link import AgentLink, Settings
from controller.migration.migratable import Migratable
from controller.migration.ownership import Action, Owner, Ownership, source_action
from controller.migration.progress import Direction, Phase, Progress, elapsed_ms, figures
from shared import log
from shared.errors import (
    FlotillaError,
    GuestLost,
    MigrationCancelled,
    MigrationError,
    ProtocolError,
    Timeout,
)
from shared.handover import Message
from shared.linux import process_ended
from shared.reactor import Cancelled, Event, Reactor, describe, drain_eventfd, within


class Fate(StrEnum):
    """Where the guest is once run() has ended."""

    HERE = "here"
    THERE = "there"
    LOST = "lost"


class Outgoing:
    """One attempt to send a VM away.

    After run(): `fate`; if it is HERE, `running` tells whether the guest runs (False: it was paused before, or resume()
    failed and can be tried again). `ended` is set when nothing of the migration is left.
    """

    def __init__(
        self,
        reactor: Reactor,
        fleet: Fleet,
        events: EventMonitor,
        vm: Migratable,
        *,
        was_running: bool = True,
        settings: Settings | None = None,
    ) -> None:
        self._reactor = reactor
        self._vm = vm
        self._was_running = was_running
        self._settings = settings or Settings()
        self._progress = Progress(events, Direction.SEND)
        self._link = AgentLink(reactor, fleet, self._settings, self._progress)
        self._ownership: Ownership | None = None
        self._eventfd = -1
        self._peer = -1  # pidfd of the destination's controller
        self._peer_pid = 0
        self._changed = Event()  # the word may have, or the destination ended
        self._peer_gone = Event()
        self._paused_at: float | None = None
        self._cancelled = False
        self.fate = Fate.HERE
        self.running = was_running
        self.ended = Event()

    def progress(self) -> dict[str, Any]:
        """`waits_for`: what nobody here can decide, and what to do about it; empty otherwise."""
        return {**self._progress.report(), "waits_for": self._waits_for()}

    def _waits_for(self) -> str:
        """A destination that has claimed the guest: it may run it at any moment, so neither time nor a cancel makes
        the guest ours again. Only its next step does, or its death."""
        if self._ownership is None or self._peer < 0:
            return ""
        ended = process_ended(self._peer)
        if source_action(self._ownership.word, ended) is not Action.WAIT:
            return ""
        pid = self._peer_pid
        return (
            f"the destination (pid {pid}) has claimed the guest and does not go on; the guest stays paused here until"
            f" it does or ends (if it is stopped: kill -CONT {pid}; to have the guest run on here: kill -KILL {pid})"
        )

    def cancel(self) -> str:
        """Ask for the guest back; run() tells the outcome. Why it is too late for that, "" as long as it is not: once
        the destination has claimed the guest only its own end changes anything."""
        if not self._progress.ongoing:
            return ""
        if self._ownership is not None and self._ownership.word is Owner.RUNNING:
            return f"the destination (pid {self._peer_pid}) runs the guest"
        if not self._cancelled:
            self._cancelled = True
            self._link.cancel()
        return self._waits_for()

    async def run(self, url: str) -> None:
        """Returns when the destination runs the guest (or has it, paused, if it was paused here).

        Raises ConfigError (a URL that won't do; nothing was tried), MigrationError and its children MigrationCancelled
        (the guest is back, its message says in which state) and GuestLost (the destination ran it and died).
        """
        path = unix_path(url)
        # In a task of its own: when the requester goes away the migration must still come to a clean end.
        task = self._reactor.spawn(self._run(f"unix:{path}"), "outgoing migration")
        try:
            await task
        except Cancelled:
            self.cancel()
            raise

    async def _run(self, url: str) -> None:
        problem: Exception | None = None
        try:
            try:
                await self._prepare(url)
                await self._hand_over()
            except Exception as error:
                problem = error
            self.fate = await self._settle(problem)
            if self.fate is Fate.HERE:
                await self._go_on(url, problem or ProtocolError("the destination said STARTED and has not claimed it"))
            self._gone(url)
        finally:
            await self._link.close()
            self._let_go()
            self.ended.set()

    # The straight way --------------------------------------------------------------------------------------------

    async def _prepare(self, url: str) -> None:
        """Until the destination has built everything."""
        began = time.monotonic()
        self._progress.to(Phase.CONNECTING)
        await self._link.start()
        await self._link.connect(url)
        self._progress.emit("migration-started")
        self._progress.breakdown["connect_ms"] = elapsed_ms(began)
        self._progress.to(Phase.BUILDING)
        began = time.monotonic()
        await self._send_build()
        built = await self._link.receive(Message.BUILT, self._settings.build)
        if len(built.fds) != 1:
            raise ProtocolError("BUILT came without the destination's pidfd")
        self._peer = built.take_fds()[0]
        self._peer_pid = pidfd_pid(self._peer)
        self._reactor.add_reader(self._peer, self._peer_ended)
        self._progress.breakdown["build"] = {"total_ms": elapsed_ms(began), **built.body["timing"]}

    async def _send_build(self) -> None:
        self._ownership = Ownership.create()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reactor.add_reader(self._eventfd, self._signalled)
        vm = self._vm
        parts, ram = vm.memory_parts()
        disks, taps = vm.disk_fds(), vm.tap_fds()
        body = {
            "release": BUILD_VERSION,
            "config": vm.config_json(),
            "parts": [list(part) for part in parts],
            "disks": list(disks),
            "taps": [[name, len(fds)] for name, fds in taps.items()],
            "info": vm.build_info(),
            "paused": not self._was_running,
        }
        ourselves = os.pidfd_open(os.getpid())
        try:
            fds = [self._ownership.fd, self._eventfd, ourselves, *ram, *disks.values()]
            fds += [fd for pairs in taps.values() for fd in pairs]
            await self._link.send(Message.BUILD, body, fds)
        finally:
            os.close(ourselves)

    async def _hand_over(self) -> None:
        """Pause, offer, and wait for what comes of it."""
        link, progress, breakdown = self._link, self._progress, self._progress.breakdown
        assert self._ownership is not None
        link.check()
        began = time.monotonic()
        if self._was_running:
            progress.to(Phase.PAUSING)
            timings = dict(await self._vm.pause())
            self._paused_at = began
            self.running = False
            breakdown["pause"] = {"total_ms": elapsed_ms(began), "workers": timings}
        progress.to(Phase.SAVING)
        began = time.monotonic()
        state = await self._vm.save()
        link.check()  # the last moment in which saying no needs nobody's consent
        breakdown["save_ms"] = elapsed_ms(began)
        # From this store on the destination may take the guest, also if this process dies before the next line.
        self._ownership.move(Owner.SOURCE, Owner.OFFERED)
        progress.to(Phase.OFFERED)
        began = time.monotonic()
        # The figures are for who asks after a success: only the destination is there then.
        body = {"state": state, "paused_at": self._paused_at, "source": figures(breakdown)}
        await link.send(Message.STATE, body)
        breakdown["transfer_ms"] = elapsed_ms(began)
        progress.to(Phase.HANDED_OVER)
        started = await link.receive(Message.STARTED, self._settings.started)
        breakdown["destination"] = started.body["timing"]
        self._downtime(float(started.body["running_at"]))

    def _downtime(self, ended: float) -> None:
        if self._paused_at is not None:
            self._progress.downtime_ms = elapsed_ms(self._paused_at, ended)

    # What the other controller does ------------------------------------------------------------------------------

    def _signalled(self) -> None:
        drain_eventfd(self._eventfd)
        self._changed.set()
        if self._ownership is not None and self._ownership.word is Owner.RUNNING:
            self._downtime(time.monotonic())  # until its own figure comes
            gone = MigrationError("the destination runs the guest and does not report")
            self._reactor.call_later(self._settings.report, lambda: self._link.post(gone))

    def _peer_ended(self) -> None:
        self._reactor.remove_reader(self._peer)
        self._peer_gone.set()
        self._changed.set()
        self._link.post(MigrationError(f"the destination (pid {self._peer_pid}) died"))

    # Whose is the guest? -----------------------------------------------------------------------------------------

    async def _settle(self, problem: Exception | None) -> Fate:
        """Blocks until the guest is one side's for good."""
        if problem is not None:
            log.info(f"migration: {describe(problem)}; the ownership word decides")
            self._progress.to(Phase.SETTLING)
        if self._ownership is None or self._peer < 0:
            return Fate.HERE  # never offered
        while True:
            self._changed.clear()
            ended = process_ended(self._peer)  # before the word: a dead destination's word is its last
            word = self._ownership.word
            action = source_action(word, ended)
            if action is Action.GONE:
                return Fate.LOST if problem is not None and await self._peer_dies() else Fate.THERE
            if action is Action.LOST:
                return Fate.LOST
            if action is Action.TAKE_BACK:
                if self._ownership.move(word, Owner.SOURCE):
                    return Fate.HERE
                continue
            log.warn(f"migration: {self._waits_for() or 'the destination goes on'}")
            await self._changed.wait()

    async def _peer_dies(self) -> bool:
        """A destination that runs the guest and could not say so may be about to end: what a killed process had open
        closes, its agent's socket among it, before its pidfd tells."""
        with contextlib.suppress(Timeout):
            await within(self._reactor, self._settings.dying, self._peer_gone.wait(), "the destination's end")
        return self._peer_gone.is_set()

    async def _go_on(self, url: str, problem: Exception) -> None:
        """The guest is ours: let it run and say why it could not go. Always raises."""
        if self._progress.phase is not Phase.SETTLING:
            self._progress.to(Phase.SETTLING)
        where = "runs on here" if self._was_running else "stays here, paused as it was"
        if self._paused_at is not None:
            self._progress.to(Phase.RESUMING)
            try:
                await self._vm.resume()
                self.running = True
                self._downtime(time.monotonic())
            except Exception as failure:
                log.error(f"migration: the guest could not be resumed: {describe(failure)}")
                where = f"is here and paused, for it could not be resumed ({describe(failure)})"
        await self._link.give_up(Message.WITHDRAWN, problem)
        error: MigrationError
        if isinstance(problem, MigrationCancelled):
            error = MigrationCancelled(f"migration to {url} was cancelled; the guest {where}")
        else:
            error = MigrationError(f"migration to {url} failed; the guest {where}")
        error.__cause__ = problem if isinstance(problem, FlotillaError) else FlotillaError(describe(problem))
        self._progress.fail(error)
        raise error

    def _gone(self, url: str) -> None:
        """The guest is not ours any more. Raises GuestLost when it is nobody's."""
        self.running = False
        if self.fate is Fate.LOST:
            error = GuestLost(
                f"migration to {url}: the guest died with its owner, the destination (pid {self._peer_pid}), which had"
                " taken it over"
            )
            if self._progress.phase is not Phase.SETTLING:
                self._progress.to(Phase.SETTLING)
            self._progress.fail(error, Phase.LOST)
            raise error
        self._progress.succeed()

    def _let_go(self) -> None:
        for fd in (self._eventfd, self._peer):
            if fd >= 0:
                self._reactor.remove_reader(fd)
                os.close(fd)
        self._eventfd = self._peer = -1
        if self._ownership is not None:
            self._ownership.close()
            self._ownership = None
