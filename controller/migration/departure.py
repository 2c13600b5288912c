"""The source's side of a remote migration: copy RAM while the guest runs, pause it, and commit.

The guest is here until COMMIT has been said, and again if REFUSED answers it (controller/migration/commit.py). Until
then every failure is simply the end of it: dirty logs off, locks taken again, the guest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from controller.config.version import BUILD_VERSION
from controller.dirty import bitmap_for
from controller.events import EventMonitor
from controller.fleet import Fleet
from controller.migration.arguments import Bounds, Strategy, Url, parse_url
from controller.migration.commit import Decision, Heard, Line, NothingSent, source_decision
from controller.migration.link import AgentLink, Delivery, Settings
from controller.migration.migratable import DirtyPages, RemoteMigratable
from controller.migration.outcome import Inquiry, Ticket
from controller.migration.outgoing import Fate
from controller.migration.progress import Direction, Phase, Progress, Transfer, elapsed_ms, figures
from controller.migration.rounds import FRESH_SECONDS, Flushes, Next, Rounds
from shared import log
from shared.errors import (
    FlotillaError,
    MigrationCancelled,
    MigrationError,
    MigrationInDoubt,
    PeerRefused,
    ProtocolError,
    StateError,
    Timeout,
)
from shared.handover import Message
from shared.pages import PAGE_SIZE, Bitmap
from shared.reactor import Cancelled, Event, Future, Reactor, describe, gather

FLUSH_SECONDS = 10.0  # during the pause
LISTED_ROUNDS = 100  # the last ones, in the breakdown
BUILT_SECONDS = 0.05  # to wait for BUILT when there is nothing worth copying


class Departure:
    """One attempt to send a VM to another host.

    After run(): `fate`; if it is HERE, `running` tells whether the guest runs. When run() raises MigrationInDoubt the
    guest is here, paused, and may run there: resolve() or the destination's late answer settles it, then `on_resolved`
    is called. `ended` is set when nothing of the migration is left.
    """

    def __init__(
        self,
        reactor: Reactor,
        fleet: Fleet,
        events: EventMonitor,
        vm: RemoteMigratable,
        *,
        was_running: bool = True,
        settings: Settings | None = None,
    ) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._events = events
        self._vm = vm
        self._was_running = was_running
        self._settings = settings or Settings()
        self._progress = Progress(events, Direction.SEND)
        self._transfer = self._progress.transfer = Transfer()
        self._link = AgentLink(reactor, fleet, self._settings, self._progress)
        self._link.on_moved = self._moved
        self._line: Line | None = None
        self._dirty: DirtyPages | None = None
        self._bitmap: Bitmap | None = None
        self._sent = Transfer()  # by the rounds that are over
        # What the destination is told, too: the source's VMM is gone when somebody asks.
        self._copied: dict[str, Any] = {"rounds": []}
        self._progress.breakdown["copied"] = self._copied
        self._paused_at: float | None = None
        self._flushing = False  # while the guest runs
        self._unlocked = False
        self._committed_at: float | None = None
        self._heard = Heard.NOTHING
        self._ticket: Ticket | None = None
        self._inquiry: Inquiry | None = None
        self._cancelled = False
        self._answer: Future[None] = Future()
        self._verdict: Future[Heard] = Future()
        self.on_resolved: Callable[[], object] = lambda: None
        self.fate = Fate.HERE
        self.running = was_running
        self.ended = Event()

    def progress(self) -> dict[str, Any]:
        return self._progress.report()

    def cancel(self) -> str:
        """Ask for the guest back; run() tells the outcome. Why it is too late for that, "" as long as it is not."""
        if self._cancelled or not self._progress.ongoing:
            return ""
        if self._committed_at is not None:
            return "" if self._heard is Heard.REFUSED else "the destination has been told to run the guest"
        self._cancelled = True
        if self._line is None:
            self._link.cancel()
        else:
            self._line.post(MigrationCancelled("it was cancelled"))
        return ""

    async def run(self, url: str, bounds: Bounds) -> None:
        """Returns when the destination runs the guest (or has it, paused, if it was paused here).

        Raises ConfigError (the URL), MigrationError and its children MigrationCancelled and MigrationInDoubt.
        """
        parsed = parse_url(url)
        self._reactor.spawn(self._run(parsed, bounds), "departure")
        try:
            await self._answer
        except Cancelled:  # the requester went away; the migration must still come to a clean end
            self.cancel()
            raise

    async def _run(self, url: Url, bounds: Bounds) -> None:
        problem: Exception | None = None
        try:
            try:
                await self._propose(url)
                await self._copy(Rounds(bounds, self._vm.fixed_cost.total_ms))
                await self._pause_and_save()
                await self._commit()
            except Exception as error:
                problem = error
                self._heard = Heard.REFUSED if isinstance(error, PeerRefused) else Heard.END
            committed = self._committed_at is not None
            while (decision := source_decision(committed, self._heard)) is Decision.IN_DOUBT:
                self._heard = await self._doubt(url, problem)
            if decision is Decision.GONE:
                self.fate, self.running = Fate.THERE, False
                self._progress.succeed()
                if self._line is not None:
                    await self._line.tell(Message.HEARD, {})
            else:
                await self._go_on(url, problem or ProtocolError("the destination said STARTED before COMMIT"))
        except Exception as error:
            self._answer.set_exception(error)
        finally:
            await self._close()

    # The guest runs ----------------------------------------------------------------------------------------------

    async def _propose(self, url: Url) -> None:
        """Until the destination has said that the guest can run there."""
        began = time.monotonic()
        self._progress.to(Phase.CONNECTING)
        await self._link.start()
        await self._link.connect(url.text, local=False)
        self._progress.emit("migration-started")
        self._progress.breakdown["connect_ms"] = elapsed_ms(began)
        self._progress.to(Phase.PROPOSING)
        began = time.monotonic()
        vm = self._vm
        parts, _ = vm.memory_parts()
        self._transfer.ram_bytes = sum(size for _, size, _, _ in parts)
        body = {
            "release": BUILD_VERSION,
            "config": vm.config_json(),
            "parts": [list(part) for part in parts],
            "info": vm.machine_info(),
            "paused": not self._was_running,
        }
        await self._link.send(Message.MACHINE, body)
        accepted = await self._link.receive(Message.ACCEPTED, self._settings.build)
        self._progress.breakdown["propose"] = {
            "total_ms": elapsed_ms(began), "destination_ms": accepted.body["took_ms"]
        }  # fmt: skip

    async def _copy(self, rounds: Rounds) -> None:
        """Rounds, until the pause is short enough. Raises MigrationError when they take too long."""
        bounds, timer = rounds.bounds, None
        if bounds.strategy is Strategy.CANCEL:  # one round alone may take longer than that, on a bad network
            timer = self._reactor.call_later(bounds.timeout_s, lambda: self._link.post(self._time_is_up(rounds)))
        try:
            await self._rounds(rounds)
        finally:
            if timer is not None:
                timer.cancel()

    async def _rounds(self, rounds: Rounds) -> None:
        """Round after round until the pause is short enough and the destination is built."""
        self._progress.to(Phase.COPYING)
        began = time.monotonic()
        self._copied["fixed_ms"] = round(rounds.fixed_ms, 3)
        bitmap = await self._start_logs()
        built: Delivery | None = None
        flushes = Flushes(FRESH_SECONDS)
        looked = time.monotonic()
        while True:
            await self._round(rounds)
            built = built or self._link.poll(Message.BUILT)
            looked = self._look(rounds, bitmap, looked)
            step = rounds.next(looked - began, built is not None)
            if step is Next.GIVE_UP:
                raise _too_slow(rounds)
            if flushes.will_do(step, looked):
                break
            if step is Next.PAUSE:
                await self._flush_meanwhile()
                flushes.made(now := time.monotonic())
                if rounds.overdue(now - began):
                    break
            elif built is None and rounds.remaining < rounds.throughput * BUILT_SECONDS:
                if time.monotonic() - began > self._settings.build:
                    raise Timeout(f"no answer within {self._settings.build:g} s: BUILT from the peer")
                built = await self._wait_for_built()
        self._progress.breakdown["build"] = built.body["timing"] if built is not None else {}
        self._copied["copy_ms"] = elapsed_ms(began)

    async def _flush_meanwhile(self) -> None:
        """However long the disks take: the pause can't do without it either, and then the guest would wait for it."""
        self._flushing = True
        try:
            await self._link.watching(self._vm.flush_disks(None), "flush disks")
        finally:
            self._flushing = False

    def _time_is_up(self, rounds: Rounds) -> MigrationError:
        if not self._flushing:
            return _too_slow(rounds)
        return MigrationError(
            f"timeout_s={rounds.bounds.timeout_s} is over while what the guest has written was flushed to"
            f" {', '.join(self._vm.disk_fds())}",
            "raise timeout_s, or look at the disks",
        )

    async def _start_logs(self) -> Bitmap:
        parts, fds = self._vm.memory_parts()
        self._bitmap = bitmap = bitmap_for((gpa + size for gpa, size, _, _ in parts), "to-send")
        self._dirty = self._vm.dirty_pages()
        await self._dirty.start()
        self._dirty.mark_all(bitmap)  # after the start: what is written from now on is in a log
        self._transfer.remaining_bytes = bitmap.count() * PAGE_SIZE
        await self._link.map_memory(parts, fds, bitmap)
        return bitmap

    async def _round(self, rounds: Rounds) -> None:
        number = rounds.number
        self._transfer.round = number + 1
        moved = await self._link.pump(sync=True)
        rounds.sent(moved["bytes"], moved["seconds"], moved["sync_seconds"])
        self._count(moved)
        listed = self._copied["rounds"]
        listed.append({"bytes": moved["bytes"], "ms": round(moved["seconds"] * 1e3, 3)})
        del listed[:-LISTED_ROUNDS]
        self._progress.emit("migration-memory-iteration", {"id": str(number)})

    def _look(self, rounds: Rounds, bitmap: Bitmap, before: float) -> float:
        """Add what has been written meanwhile; when that was."""
        assert self._dirty is not None
        now = time.monotonic()
        self._dirty.harvest(bitmap)
        rounds.found(bitmap.count(), now - before)
        transfer = self._transfer
        transfer.remaining_bytes = rounds.remaining
        transfer.dirty_bytes_per_s = round(rounds.dirty_rate)
        transfer.throughput_bytes_per_s = round(rounds.throughput)
        transfer.estimated_downtime_ms = round(rounds.downtime_ms, 3)
        left = rounds.time_left_s
        transfer.time_left_s = None if left is None else round(left, 3)
        log.info(
            f"migration: round {rounds.number}: {rounds.remaining >> 10} KiB dirty, "
            f"{rounds.throughput / 1e6:.0f} MB/s, pause estimated at {rounds.downtime_ms:.0f} ms"
        )
        return now

    async def _wait_for_built(self) -> Delivery | None:
        try:
            return await self._link.receive(Message.BUILT, BUILT_SECONDS)
        except Timeout:
            return None

    def _moved(self, moved: dict[str, Any]) -> None:
        """Of the present round, so far."""
        transfer, sent = self._transfer, self._sent
        transfer.pages = sent.pages + moved["pages"]
        transfer.zero_pages = sent.zero_pages + moved["zeros"]
        transfer.page_bytes = sent.page_bytes + moved["bytes"]

    def _count(self, moved: dict[str, Any]) -> None:
        self._moved(moved)
        transfer = self._transfer
        self._sent = Transfer(pages=transfer.pages, zero_pages=transfer.zero_pages, page_bytes=transfer.page_bytes)

    # The guest is paused -----------------------------------------------------------------------------------------

    async def _pause_and_save(self) -> None:
        """Everything that is left goes out; the stream is ours then."""
        link, progress, breakdown = self._link, self._progress, self._progress.breakdown
        link.check()
        began = time.monotonic()
        if self._was_running:
            progress.to(Phase.PAUSING)
            timings = dict(await self._vm.pause())
            self._paused_at = began
            self.running = False
            breakdown["pause"] = {"total_ms": elapsed_ms(began), "workers": timings}
        if self._vm.ended_itself:
            raise MigrationError("the guest has ended itself meanwhile")
        progress.to(Phase.SAVING)
        began = time.monotonic()
        state, _ = await gather(self._reactor, self._vm.save(), self._flush())
        breakdown["save_ms"] = elapsed_ms(began)
        await link.send(Message.STATE, {"state": state})
        progress.to(Phase.FINAL_PASS)
        began = time.monotonic()
        assert self._dirty is not None and self._bitmap is not None
        self._dirty.harvest(self._bitmap)  # after the fence: nothing is written any more
        self._copied["final_pages"] = self._bitmap.count()
        self._count(await link.pump(sync=False))
        self._copied["final_pass_ms"] = elapsed_ms(began)
        await link.send(Message.END_OF_RAM, {"copied": self._copied})
        self._line = Line(self._reactor, *await link.take_stream(self._settings.call))

    async def _flush(self) -> dict[str, Any]:
        await self._vm.flush_disks(FLUSH_SECONDS)
        return {}

    async def _commit(self) -> None:
        line, progress = self._line, self._progress
        assert line is not None
        progress.to(Phase.PREPARING)
        if self._cancelled:
            raise MigrationCancelled("it was cancelled")
        began = time.monotonic()
        prepared = await line.receive((Message.PREPARED,), self._settings.prepared)
        progress.breakdown["prepare"] = {"total_ms": elapsed_ms(began), **prepared.body["timing"]}
        self._vm.fixed_cost.heard("load", prepared.body["timing"].get("load_ms"))  # for the next attempt
        self._ticket = Ticket.of(prepared.body.get("ticket"))
        line.check()  # the last moment in which saying no needs nobody's consent
        self._vm.unlock_disks()
        self._unlocked = True
        progress.to(Phase.COMMITTED)
        line.check()
        began = self._committed_at = time.monotonic()
        paused = None if self._paused_at is None else elapsed_ms(self._paused_at)
        try:
            await line.send(Message.COMMIT, {"paused_ms": paused, "source": self._figures()}, self._settings.call)
        except NothingSent:
            self._committed_at = None
            raise
        started = await line.receive((Message.STARTED,), self._settings.started)
        self._heard = Heard.STARTED
        if self._paused_at is not None:
            progress.downtime_ms = elapsed_ms(self._paused_at)
        progress.breakdown["commit_ms"] = elapsed_ms(began)
        progress.breakdown["destination"] = started.body["timing"]

    def _figures(self) -> dict[str, Any]:
        """For the destination: who asks after a success can ask only there."""
        own = {name: value for name, value in self._progress.breakdown.items() if value is not self._copied}
        # Also what the peer has told us is in there, and a COMMIT that is too long to be sent would be a doubt.
        return figures(own | {"final_pass_ms": self._copied["final_pass_ms"]})

    # Ends --------------------------------------------------------------------------------------------------------

    async def _doubt(self, url: Url, problem: Exception | None) -> Heard:
        """Paused, until an answer comes after all or resolve() is called. Whoever waits for run() waits no more."""
        error = MigrationInDoubt(
            f"migration to {url.text} is in doubt: the destination was told to run the guest and has not answered;"
            " the guest is here, paused, and may run there",
            "look at the destination, then ch-remote migration-resolve --there if it runs there, --here if it does not",
        )
        error.__cause__ = problem
        log.error(describe(error))
        self._progress.doubt(error)
        self._answer.set_exception(error)
        if self._line is not None:
            self._reactor.spawn(self._late_answer(self._line), "late answer")
        if self._ticket is not None:
            self._inquiry = Inquiry(self._reactor, self._fleet, self._events, self._settings, url)
            self._inquiry.start(self._ticket, self._verdict.set_result)
        heard = await self._verdict
        self._reactor.call_soon(self._tell_resolved)
        return heard

    async def _late_answer(self, line: Line) -> None:
        try:
            await line.receive((Message.STARTED,), None)
            self._verdict.set_result(Heard.STARTED)
        except PeerRefused:
            self._verdict.set_result(Heard.REFUSED)
        except FlotillaError as error:
            log.info(f"migration in doubt, and no answer any more: {describe(error)}")

    def _tell_resolved(self) -> None:
        """Once the guest is one side's for good."""

        async def wait() -> None:
            await self.ended.wait()
            self.on_resolved()

        self._reactor.spawn(wait(), "resolved")

    async def resolve(self, here: bool) -> None:
        """Somebody has looked at the destination. Raises StateError when there is no doubt, or when a disk's lock or
        the clock says that the guest may run there."""
        if self._progress.phase is not Phase.IN_DOUBT:
            raise StateError("No migration is in doubt")
        if self._verdict.done():
            raise StateError("The destination has just answered", "look at vm.migration-progress")
        if here:
            assert self._committed_at is not None
            left = self._committed_at + self._settings.prepared - time.monotonic()
            if left > 0:
                raise StateError(f"the destination may still take the guest, for {left:.0f} s", "wait that long")
            try:
                self._lock_again()
            except FlotillaError as error:
                raise StateError("the guest can't go on here: its destination seems to run it") from error
        self._verdict.set_result(Heard.REFUSED if here else Heard.STARTED)
        await self.ended.wait()

    def _lock_again(self) -> None:
        if self._unlocked:
            self._vm.lock_disks()
            self._unlocked = False

    async def _go_on(self, url: Url, problem: Exception) -> None:
        """The guest is ours: let it run and say why it could not go. Always raises."""
        progress = self._progress
        progress.to(Phase.SETTLING)
        await self._tell(problem)
        where = "runs on here" if self._was_running else "stays here, paused as it was"
        try:
            self._lock_again()
            if self._dirty is not None:
                await self._dirty.stop()
            if self._paused_at is not None:
                progress.to(Phase.RESUMING)
                await self._vm.resume()
                self.running = True
                progress.downtime_ms = elapsed_ms(self._paused_at)
        except Exception as failure:
            log.error(f"migration: the guest could not be resumed: {describe(failure)}")
            where = f"is here and paused, for it could not be resumed ({describe(failure)})"
            self.running = False
        error: MigrationError
        if isinstance(problem, MigrationCancelled):
            error = MigrationCancelled(f"migration to {url.text} was cancelled; the guest {where}")
        else:
            error = MigrationError(f"migration to {url.text} failed; the guest {where}")
        error.__cause__ = problem if isinstance(problem, FlotillaError) else FlotillaError(describe(problem))
        progress.fail(error)
        raise error

    async def _tell(self, problem: Exception) -> None:
        """The destination hears why, if it can still be told."""
        if self._line is not None:
            await self._line.give_up(Message.WITHDRAWN, problem)
        else:
            await self._link.give_up(Message.WITHDRAWN, problem)

    async def _close(self) -> None:
        if self._inquiry is not None:
            await self._inquiry.close()
        if self._line is not None:
            self._line.close()
        await self._link.close()
        if self._dirty is not None:
            self._dirty.close()
            self._dirty = None
        if self._bitmap is not None:
            self._bitmap.close()
            self._bitmap = None
        self.ended.set()
        self._answer.set_result(None)


def _too_slow(rounds: Rounds) -> MigrationError:
    bounds = rounds.bounds
    if not rounds.number:
        return MigrationError(
            f"timeout_s={bounds.timeout_s} is over before all of the guest's RAM was copied once",
            "raise timeout_s, or look at the network",
        )
    why = (
        f"the guest writes {rounds.dirty_rate / 1e6:.0f} MB/s and the network carries {rounds.throughput / 1e6:.0f}"
        if not rounds.converges
        else f"a pause now would take {rounds.downtime_ms:.0f} ms, {rounds.overhead_ms:.0f} of them whatever is copied"
    )
    return MigrationError(
        f"timeout_s={bounds.timeout_s} is over and downtime_ms={bounds.downtime_ms} was not reached: {why}",
        "raise downtime_ms or timeout_s, or use timeout_strategy=ignore",
    )
