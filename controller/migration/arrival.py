"""The destination's side of a remote migration, from MACHINE on: check, take RAM, build, load, and start at COMMIT.

Until COMMIT it touches no disk (none of its locks is ours yet) and starts no ring; its RAM and processes are its own,
and whatever goes wrong throws them away. REFUSED after COMMIT is still true: what could not be started has done
nothing.
"""

from __future__ import annotations

import time
from typing import Any

from controller.migration import codec
from controller.migration.commit import Heard, Line, destination_may_start, outcome
from controller.migration.link import AgentLink, Delivery, Settings
from controller.migration.migratable import Accept, Build, RemoteMigratable
from controller.migration.outcome import Ticket
from controller.migration.progress import Phase, Progress, Transfer, elapsed_ms, figures
from shared import log
from shared.errors import FlotillaError, MigrationCancelled, MigrationError
from shared.handover import Message
from shared.linux import close_fds
from shared.messages import error_to_wire
from shared.reactor import Reactor, describe


class Arrival:
    """One VM that comes from another host.

    `built` exists and is not ours; `vm` is ours for good. When run() raises and `vm` is not None it could not be
    started.
    """

    def __init__(
        self, reactor: Reactor, link: AgentLink, progress: Progress, settings: Settings, build: Build, accept: Accept
    ) -> None:
        self._reactor = reactor
        self._link = link
        self._progress = progress
        self._settings = settings
        self._build = build
        self._accept = accept
        self._line: Line | None = None
        self._refused = False
        self._cancelled = False
        self._ticket: Ticket | None = None  # the source has one since PREPARED, and may come to be in doubt
        self.built: RemoteMigratable | None = None
        self.vm: RemoteMigratable | None = None
        self.running = False

    async def run(self, delivery: Delivery) -> RemoteMigratable:
        """From MACHINE to STARTED. Raises FlotillaError."""
        vm = await self._prepare(delivery.body)
        state = await self._receive_all()
        timing = await self._load(vm, state)
        paused_ms = await self._wait_for_commit(timing)
        await self._start(vm, delivery.body["paused"], paused_ms, timing)
        return vm

    async def _prepare(self, machine: dict[str, Any]) -> RemoteMigratable:
        """Say whether it can run here, then build it while its RAM arrives."""
        link, progress = self._link, self._progress
        progress.to(Phase.CHECKING)
        began = time.monotonic()
        parts = codec.parts_of(machine)
        ram, images = self._accept(machine["config"], parts, machine["info"])
        try:
            progress.transfer = Transfer(ram_bytes=sum(size for _, size, _, _ in parts))
            link.on_moved = self._moved
            await link.map_memory(parts, ram)
            await link.send(Message.ACCEPTED, {"took_ms": elapsed_ms(began)})
            progress.to(Phase.BUILDING)
        except BaseException:
            close_fds([*ram, *images.values()])
            raise
        began = time.monotonic()
        vm = self.built = await self._build(machine["config"], parts, ram, images, {}, machine["info"])
        link.check()
        progress.breakdown["build_ms"] = elapsed_ms(began)
        await link.send(Message.BUILT, {"timing": {"destination_ms": elapsed_ms(began)}})
        progress.to(Phase.BUILT)
        return vm

    def _moved(self, moved: dict[str, Any]) -> None:
        transfer = self._progress.transfer
        assert transfer is not None
        transfer.pages, transfer.zero_pages, transfer.page_bytes = moved["pages"], moved["zeros"], moved["bytes"]

    async def _receive_all(self) -> dict[str, Any]:
        """As long as the source's agent shows that it lives: a guest may take hours to copy."""
        delivery = await self._link.receive(Message.STATE, None)
        end = await self._link.receive(Message.END_OF_RAM, None)
        if isinstance(copied := end.body.get("copied"), dict):
            self._progress.breakdown["copied"] = copied
        self._line = Line(self._reactor, *await self._link.take_stream(self._settings.call))
        state: dict[str, Any] = delivery.body["state"]
        return state

    async def _load(self, vm: RemoteMigratable, state: dict[str, Any]) -> dict[str, Any]:
        self._progress.to(Phase.LOADING)
        began = time.monotonic()
        timing: dict[str, Any] = {"load": dict(await vm.load(state) or {})}
        vm.drop_caches()  # the source has flushed what it wrote before it sent STATE
        timing["load_ms"] = elapsed_ms(began)
        return timing

    async def _wait_for_commit(self, timing: dict[str, Any]) -> float | None:
        """How long the guest has been paused. The source may count on it that a COMMIT which comes later than
        `prepared` seconds is refused: so a stopped process looks at the clock when it goes on."""
        line = self._line
        assert line is not None
        self._check_cancelled()
        line.check()
        deadline = time.monotonic() + self._settings.prepared  # from before PREPARED is said: never too late
        self._progress.to(Phase.PREPARED)
        self._ticket = Ticket.fresh()
        await line.send(Message.PREPARED, {"timing": timing, "ticket": list(self._ticket)}, self._settings.call)
        commit = await line.receive((Message.COMMIT,), self._settings.prepared)
        self._check_cancelled()  # which may have come after it, and before we have looked
        if time.monotonic() > deadline:
            raise MigrationError(f"COMMIT came later than {self._settings.prepared:g} s after PREPARED")
        self._progress.breakdown["source"] = figures(commit.body.get("source"))
        paused_ms = commit.body.get("paused_ms")
        return float(paused_ms) if isinstance(paused_ms, (int, float)) else None

    async def _start(
        self, vm: RemoteMigratable, paused: bool, paused_ms: float | None, timing: dict[str, Any]
    ) -> None:
        """COMMIT was heard: ours, once its disks are."""
        progress, line = self._progress, self._line
        assert line is not None and destination_may_start(commit_heard=True, refused=self._refused)
        began = time.monotonic()
        progress.to(Phase.COMMITTED)
        vm.lock_disks()
        self.vm, self.built = vm, None  # from here on REFUSED would be a lie
        progress.to(Phase.RUNNING)
        try:
            if not paused:
                timing["start"] = dict(await vm.start_loaded() or {})
                self.running = True
        finally:
            timing["start_ms"] = elapsed_ms(began)
            progress.breakdown.update(timing)
            await self._report(line, {"timing": timing, "running_at": time.monotonic()})
        if paused_ms is not None and self.running:
            progress.downtime_ms = round(paused_ms + timing["start_ms"], 3)

    async def _report(self, line: Line, started: dict[str, Any]) -> None:
        try:
            await line.send(Message.STARTED, started, self._settings.call)
        except FlotillaError as error:
            log.error(f"migration: the guest runs here and its source could not be told: {describe(error)}")

    # Ends

    def cancel(self) -> bool:
        """Whether it was the line's business; run() tells the outcome. Only before COMMIT has been heard."""
        self._cancelled = True
        if self._line is None:
            return False
        self._line.post(MigrationCancelled("it was cancelled"))
        return True

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise MigrationCancelled("it was cancelled")

    async def refuse(self, problem: Exception) -> None:
        """Tell the source why, if the guest has not become ours."""
        if self.vm is not None:
            return
        self._refused = True
        if self._line is not None:
            await self._line.tell(Message.REFUSED, {"error": error_to_wire(problem)})
        else:
            await self._link.give_up(Message.REFUSED, problem)

    def outcome(self) -> tuple[Ticket, Heard, Line] | None:
        """After the end: what a source in doubt is to be told, and the stream on which it may say that it knows. The
        stream is the caller's then. None when the source can't be in doubt."""
        heard = outcome(ours=self.vm is not None, refused=self._refused)
        if self._ticket is None or self._line is None or heard is Heard.NOTHING:
            return None
        line, self._line = self._line, None
        return self._ticket, heard, line

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
