"""A worker that serves one or more vhost-user devices, and its successors.

    start ──▶ STARTING ──▶ SERVING ──(ended, disconnected, hung, refused)──▶ RESTARTING
                  │         ▲   ▲                                              │  │
                  │         │   └──────────────── replayed ────────────────────┘  │
                  └───── START_DELAYS are used up ──▶ QUARANTINED ◀───────────────┘
                            └─────────── replayed ──────┘ tried again every LAST_DELAY, as long as the VM lives

`degraded` in `vmm.fleet` is SERVING by a worker that had to be replaced OFTEN within the last minute
(controller/supervision.py). How each loss is noticed: docs/fault-isolation.md.

The guest sees nothing of it: kicks stay in the eventfds, requests that were in flight are in the inflight region. The
pidfd has been waited for before a successor is forked, so nothing of the dead process can still write (DESIGN, fence).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from enum import StrEnum

from controller.fleet import Fleet, Process, ProcessState, WorkerSpec, row
from controller.statistics import checked, merge
from controller.supervision import OFTEN, RECENT_SECONDS, Cause, cause_of, process_state
from controller.vhost_frontend import Frontend
from controller.warmup import warm_up
from shared import log
from shared.errors import FlotillaError, HostError, ProtocolError, Timeout, WorkerError, WorkerLost
from shared.reactor import Event, Reactor, describe, sleep, within
from shared.records import replace
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

# A worker that lived this long has earned an immediate restart.
STEADY_SECONDS = 1.0
FIRST_DELAY, LAST_DELAY = 0.02, 2.0
CALL_ATTEMPTS = 200
START_DELAYS = (0.02, 0.1, 0.5)


class BackendState(StrEnum):
    """As `vmm.fleet` tells it."""

    STARTING = "starting"
    SERVING = "running"
    RESTARTING = "restarting"
    QUARANTINED = "quarantined"


DEGRADED = "degraded"


class Backend:
    """`frontends`: by the name under which the worker gets the other end of its socket."""

    def __init__(
        self,
        reactor: Reactor,
        fleet: Fleet,
        spec: WorkerSpec,
        frontends: Mapping[str, Frontend],
        fds: Mapping[str, int],
    ) -> None:
        """Duplicates of `fds` are kept and given to every incarnation. Raises HostError."""
        self._reactor = reactor
        self._fleet = fleet
        self._spec = spec
        self._frontends = dict(frontends)
        self._fds: dict[str, int] = {}
        self._closing = False
        self._starting = False
        self._settled = Event()  # the state is SERVING or QUARANTINED
        self._idle = Event()  # no process is on its way up
        self._idle.set()
        self._undisturbed = Event()  # no upgrade is under way (controller/upgrade.py)
        self._undisturbed.set()
        self._standby: Process | None = None  # the process of one
        self.vet: Callable[[Process], None] = lambda _process: None  # raises WorkerError for one that may not serve
        self._restarts = 0
        self._delay = 0.0
        self._began = 0.0
        self.state = BackendState.STARTING
        self.reason = ""  # why the last attempt came to nothing
        self.process: Process | None = None
        self.preload: dict[str, Any] | None = None  # a save's answer that every incarnation loads before it serves
        self._past: dict[str, int] = {}  # what the processes before this one have counted
        self._failed_requests = 0  # of this process, as far as they have been reported
        self._blamed = -RECENT_SECONDS  # when a worker last died by its own work
        self._suspect = False  # … the last one did
        try:
            for name, fd in fds.items():
                self._fds[name] = os.dup(fd)
        except OSError as error:
            self._close_fds()
            raise HostError(f"{self.name}: {error.strerror}") from error
        for frontend in self._frontends.values():
            frontend.on_lost = self._hung_up
        fleet.supervision.runs(spec.kind, spec.name, spec.program)

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def kind(self) -> str:
        return self._spec.kind

    @property
    def program(self) -> str:
        """What the worker and its successors exec; "" for this release's own worker."""
        return self._spec.program

    @property
    def frontends(self) -> dict[str, Frontend]:
        return dict(self._frontends)

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def devices(self) -> str:
        """Who suffers when there is no worker."""
        return ", ".join(frontend.name for frontend in self._frontends.values()) or self.name

    def _to(self, state: BackendState) -> None:
        self.state = state
        if state in (BackendState.SERVING, BackendState.QUARANTINED):
            self._settled.set()
        else:
            self._settled.clear()

    # Coming up ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Fork the worker and connect every front end, several times if it dies meanwhile. Raises FlotillaError."""
        self._starting = True
        try:
            await warm_up(self._reactor)
            for delay in (*START_DELAYS, None):
                try:
                    await self._attempt()
                    self._serves()
                    return
                except FlotillaError as error:
                    self.reason = describe(error)
                    if self._closing:
                        raise
                    if delay is None and self._spec.program:
                        self._give_program_up()
                        await self.start()
                        return
                    if delay is None:
                        self._to(BackendState.QUARANTINED)
                        self._fleet.supervision.quarantined(self._spec.kind, self.name, self.reason)
                        raise self.absence() from None
                    log.warn(f"{self.absence()}; trying again")
                    await sleep(self._reactor, delay)
                    self._restarts += 1
        finally:
            self._starting = False

    async def start_for_good(self) -> None:
        """start(), again and again until it succeeds: the guest runs, and waits for its devices."""
        while not self._closing:
            try:
                await self.start()
                return
            except FlotillaError as error:
                if not self._closing:
                    log.error(f"{describe(error)}; trying again every {LAST_DELAY:g} s")
                    await sleep(self._reactor, LAST_DELAY)
                    self._restarts += 1

    def _give_program_up(self) -> None:
        """What an upgrade brought in does not start any more: the guest is to have its device all the same."""
        log.error(f"{self.name}: {self.program} does not start: {self.reason}; going back to this release's worker")
        self._run("", lambda _process: None)

    def _run(self, program: str, vet: Callable[[Process], None]) -> None:
        self._spec, self.vet = replace(self._spec, program=program), vet
        self._fleet.supervision.runs(self.kind, self.name, program)

    async def _attempt(self) -> None:
        self._idle.clear()
        try:
            await self._start_once()
        except FlotillaError:
            await self._clear()
            raise
        finally:
            self._idle.set()

    async def _start_once(self) -> None:
        if self._closing:
            raise WorkerLost(f"{self.devices}: the VM has ended")
        self._began = time.monotonic()
        self.process, sockets = await self._fork(self._task())
        try:
            await self._connect(self.process, sockets)
        except OSError as error:
            raise WorkerError(f"{self.name}: {error.strerror}") from error
        finally:
            for ours in sockets.values():
                ours.close()

    async def _fork(self, task: WorkerSpec) -> tuple[Process, dict[str, socket.socket]]:
        """A process on its way up, and our ends of its devices' connections. Raises WorkerError."""
        import socket

        pairs: dict[str, tuple[socket.socket, socket.socket]] = {}
        try:
            for name in self._frontends:
                pairs[name] = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            fds = {**self._fds, **{name: theirs.fileno() for name, (_, theirs) in pairs.items()}}
            process = await self._fleet.fork(task, fds, self._ended, self._restarts)
        except BaseException as error:
            for ours, _ in pairs.values():
                ours.close()
            if isinstance(error, OSError):
                raise WorkerError(f"{self.name}: {error.strerror}") from error
            raise
        finally:
            for _, theirs in pairs.values():
                theirs.close()  # so that the worker's end is the connection's, also while it is being replayed
        return process, {name: ours for name, (ours, _) in pairs.items()}

    def _task(self) -> WorkerSpec:
        """What to fork, with what the worker has to know about its predecessor's end (shared/vring_recovery.h)."""
        if time.monotonic() - self._blamed > RECENT_SECONDS:
            return self._spec
        return replace(self._spec, spec={**self._spec.spec, "trial": True, "blame": self._suspect})

    async def _connect(self, process: Process, sockets: Mapping[str, socket.socket]) -> None:
        if not self._closing:
            await self._fleet.greet(process)
            self.vet(process)
        if self.preload is not None:
            await process.call("load", **self.preload)
        for name, frontend in self._frontends.items():
            if self._closing:
                raise WorkerLost(f"{self.devices}: the VM has ended")
            ours = sockets[name].dup()
            ours.setblocking(False)
            await frontend.replay(ours)
        if process.state is ProcessState.ENDED:  # _ended() has left this to us
            raise WorkerLost(process.obituary)

    async def _clear(self) -> None:
        """A worker that did not get as far as serving must be gone before its successor is forked."""
        process, self.process = self.process, None
        if process is not None:
            # Who is dying already dies of something else: a loss, and not an end that we wanted.
            if not process_state(process.pid)[1]:
                self._fleet.kill(process)
            await process.ended.wait()

    # Replacing a process that serves (controller/upgrade.py) -----------------------------------------------------

    @property
    def disturbed(self) -> bool:
        return not self._undisturbed.is_set()

    def disturb(self) -> None:
        """An upgrade begins: no successor is started until settle()."""
        self._undisturbed.clear()

    async def fork_standby(self, program: str) -> tuple[Process, dict[str, socket.socket]]:
        """A process beside the one that serves, and our ends of its devices' connections. Raises WorkerError."""
        process, sockets = await self._fork(replace(self._task(), program=program, standby=True))
        self._standby = process
        if self._closing:  # close() found none to kill
            self._fleet.kill(process)
        return process, sockets

    def hand_over(self, process: Process, before: Process, program: str, vet: Callable[[Process], None]) -> None:
        """`process` serves from now on, and `before` does not. One step: nothing is awaited."""
        if before.serving:  # otherwise it has died meanwhile
            self._past = merge(self._past, before.stats)
        before.serving, before.aside, process.aside, self._standby = False, True, False, None
        self._fleet.exchange(process, before, self.name)
        self._run(program, vet)
        self._began, self.process = time.monotonic(), process
        self._serves()

    def settle(self) -> None:
        """The upgrade has ended, one way or the other."""
        self._standby = None
        self._undisturbed.set()

    # Serving -----------------------------------------------------------------------------------------------------

    def _serves(self) -> None:
        process = self.process
        assert process is not None
        self._failed_requests = 0
        process.occupied = lambda: self._starting or any(frontend.busy for frontend in self._frontends.values())
        process.on_heartbeat = self._heard
        process.serving = True
        self._to(BackendState.SERVING)
        self._fleet.supervision.restored(self._spec.kind, self.name, process.pid)

    def _heard(self) -> None:
        """New statistics of our process."""
        stats = self.process.stats if self.process is not None else {}
        if (failed := stats.get("poisoned", 0)) > self._failed_requests:
            nowhere = "frames" if self._spec.kind == "net" else "no sector of theirs could be read"
            what = f"the last one at sector {stats['poisoned_sector']}" if "poisoned_sector" in stats else nowhere
            new, self._failed_requests = failed - self._failed_requests, failed
            self._fleet.supervision.failed_request(self._spec.kind, self.name, new, what)

    async def stats(self) -> dict[str, int]:
        """Counters of the worker and of all before it. A worker that is not there has told its last ones."""
        process = self.process
        if process is not None and process.serving:
            try:
                process.stats = checked(await process.call("stats"))
            except WorkerLost:
                log.debug(f"{self.name} died before it told its counters")
            except ProtocolError as error:
                self._fleet.condemn(process, Cause.REFUSED, describe(error))
            if process is self.process:
                return merge(self._past, process.stats)
        return dict(self._past)

    async def wait_serving(self, seconds: float) -> None:
        """Until the worker is up. Raises WorkerError, which names devices and reason: at once if it has failed for
        now, after `seconds` if it neither comes up nor fails."""
        try:
            await within(self._reactor, seconds, self._settled.wait(), f"{self.devices}: a worker")
        except Timeout as error:
            raise self.absence() from error
        if self.state is BackendState.QUARANTINED:
            raise self.absence()

    def absence(self) -> WorkerError:
        """What to tell who needs the worker while there is none."""
        reason = self.reason or f"{self.name} is still {self.state}"
        return WorkerError(f"{self.devices}: no worker serves it: {reason}")

    def row(self) -> dict[str, Any] | None:
        """A row of `vmm.fleet` while the worker is not serving as it should; None while its process's own row tells
        everything."""
        state = str(self.state)
        if self.state is BackendState.SERVING:
            if self._fleet.supervision.often(self._spec.kind, self.name) < OFTEN:
                return None
            state = DEGRADED
        pid = self.process.pid if self.process is not None else 0
        return row(self._spec.kind, self.name, pid, state, self._restarts)

    async def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """A control request; if the worker dies under it, its successor is asked. Raises WorkerError, Timeout."""
        for _ in range(CALL_ATTEMPTS):
            process = self.process
            if process is not None and not self._starting:
                try:
                    return await process.call(verb, **arguments)
                except WorkerLost:
                    log.warn(f"{self.name} died before it answered {verb}; asking its successor")
            await sleep(self._reactor, FIRST_DELAY)
        raise WorkerLost(f"{self.name}: no worker lives long enough to answer {verb}") from self.absence()

    async def resume(self) -> None:
        """Let a quiesced worker go on. Raises FlotillaError when it does not: it is ended then, and its successor was
        never quiesced."""
        process = self.process
        if process is None or not process.serving or process.state is not ProcessState.RUNNING:
            return
        try:
            await process.call("resume")
        except FlotillaError as error:
            cause = Cause.HUNG if isinstance(error, Timeout) else Cause.REFUSED
            self._fleet.condemn(process, cause, f"resume: {describe(error)}")
            raise

    def signal(self, number: int) -> None:
        """Tell the worker something that has no verb (SIGWINCH)."""
        if self.process is not None:
            signal.pidfd_send_signal(self.process.pidfd, number)

    def _hung_up(self, error: Exception | None) -> None:
        """The connection broke. A worker that lives on is of no use: end it, its end brings the successor."""
        if self.process is not None and not self._closing:
            reason = f"vhost-user connection lost: {describe(error) if error else 'closed'}"
            self._fleet.hung_up(self.process, cause_of(error), reason)

    def _ended(self, process: Process) -> None:
        if process.aside:
            return
        if process.serving:
            self._past = merge(self._past, process.stats)
            process.serving = False
        self._suspect = process.blameable
        self._blamed = time.monotonic() if self._suspect else self._blamed
        if self._closing:
            return
        if not process.wanted and (not self._starting or process.killed_by):  # a refusal to start is told as such
            loss, kind = process.loss, self._spec.kind
            self._fleet.supervision.lost(kind, self.name, process.pid, loss.cause, loss.reason, since=loss.since)
        if self._starting or process is not self.process:
            return  # start() sees to it itself
        self.process = None
        self.reason = process.obituary
        self._to(BackendState.RESTARTING)
        lived = time.monotonic() - self._began
        self._delay = 0.0 if lived > STEADY_SECONDS else min(max(self._delay * 2, FIRST_DELAY), LAST_DELAY)
        self._restarts += 1
        self._reactor.spawn(self._restart(), f"restart {self.name}")

    async def _restart(self) -> None:
        if self._delay:
            await sleep(self._reactor, self._delay)
        await self._undisturbed.wait()
        if self.process is None:  # otherwise the upgrade under which the last one died has brought another
            await self.start_for_good()

    # End ---------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the worker and wait for it, also if it is only coming up."""
        self._closing = True
        for frontend in self._frontends.values():
            frontend.close()
        if self._standby is not None:
            self._fleet.kill(self._standby)
        process = self.process
        if process is not None and process.state is ProcessState.STARTING:
            self._fleet.kill(process)  # it answers nothing yet, and has nothing to put in order
        elif process is not None:
            await self._fleet.stop(process)
        await self._undisturbed.wait()
        await self._idle.wait()
        await self._clear()
        self._close_fds()

    def abandon(self) -> None:
        """close() without waiting: no worker was started, or the fleet ends it with everything else."""
        self._closing = True
        self._close_fds()

    def _close_fds(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
