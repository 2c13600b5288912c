"""A worker that serves one or more vhost-user devices, and its successors.

    start ──▶ STARTING ──▶ SERVING ──(killed, crashed, hung up)──▶ RESTARTING
                  │         ▲   ▲                                    │  │
                  │         │   └────────────── replayed ────────────┘  │
                  └───── START_DELAYS are used up ──▶ FAILED ◀──────────┘
                            └─────────── replayed ──────┘ tried again every LAST_DELAY, as long as the VM lives

The guest sees nothing of it: kicks stay in the eventfds, requests that were in flight are in the inflight region. The
pidfd has been waited for before a successor is forked, so nothing of the dead process can still write (DESIGN, fence).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from enum import StrEnum

from controller.fleet import Fleet, Process, ProcessState, WorkerSpec
from controller.vhost_frontend import Frontend
from controller.warmup import warm_up
from shared import log
from shared.errors import FlotillaError, HostError, Timeout, WorkerError, WorkerLost
from shared.reactor import Event, Reactor, describe, sleep, within
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
    FAILED = "failed"


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
        self._settled = Event()  # the state is SERVING or FAILED
        self._idle = Event()  # no process is on its way up
        self._idle.set()
        self._restarts = 0
        self._delay = 0.0
        self._began = 0.0
        self.state = BackendState.STARTING
        self.reason = ""  # why the last attempt came to nothing
        self.process: Process | None = None
        self.preload: dict[str, Any] | None = None  # a save's answer that every incarnation loads before it serves
        try:
            for name, fd in fds.items():
                self._fds[name] = os.dup(fd)
        except OSError as error:
            self._close_fds()
            raise HostError(f"{self.name}: {error.strerror}") from error
        for frontend in self._frontends.values():
            frontend.on_lost = self._hung_up

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def kind(self) -> str:
        return self._spec.kind

    @property
    def devices(self) -> str:
        """Who suffers when there is no worker."""
        return ", ".join(frontend.name for frontend in self._frontends.values()) or self.name

    def _to(self, state: BackendState) -> None:
        self.state = state
        if state in (BackendState.SERVING, BackendState.FAILED):
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
                    self._to(BackendState.SERVING)
                    return
                except FlotillaError as error:
                    self.reason = describe(error)
                    if self._closing:
                        raise
                    if delay is None:
                        self._to(BackendState.FAILED)
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
        import socket

        pairs: dict[str, tuple[socket.socket, socket.socket]] = {}
        try:
            for name in self._frontends:
                pairs[name] = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            fds = {**self._fds, **{name: theirs.fileno() for name, (_, theirs) in pairs.items()}}
            process = await self._fleet.fork(self._spec, fds, self._ended, self._restarts)
            self.process = process
            await self._connect(process, {name: ours for name, (ours, _) in pairs.items()})
        except OSError as error:
            raise WorkerError(f"{self.name}: {error.strerror}") from error
        finally:
            for ours, theirs in pairs.values():
                ours.close()
                theirs.close()

    async def _connect(self, process: Process, sockets: Mapping[str, socket.socket]) -> None:
        if not self._closing:
            await self._fleet.greet(process)
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
            self._fleet.kill(process)
            await process.ended.wait()

    # Serving -----------------------------------------------------------------------------------------------------

    async def wait_serving(self, seconds: float) -> None:
        """Until the worker is up. Raises WorkerError, which names devices and reason: at once if it has failed for
        now, after `seconds` if it neither comes up nor fails."""
        try:
            await within(self._reactor, seconds, self._settled.wait(), f"{self.devices}: a worker")
        except Timeout as error:
            raise self.absence() from error
        if self.state is BackendState.FAILED:
            raise self.absence()

    def absence(self) -> WorkerError:
        """What to tell who needs the worker while there is none."""
        reason = self.reason or f"{self.name} is still {self.state}"
        return WorkerError(f"{self.devices}: no worker serves it: {reason}")

    def row(self) -> dict[str, Any] | None:
        """A row of `vmm.fleet` while the worker is not serving; None while its process's own row tells everything."""
        if self.state is BackendState.SERVING:
            return None
        return {
            "kind": self._spec.kind,
            "device": self.name,
            "pid": self.process.pid if self.process is not None else 0,
            "state": str(self.state),
            "restarts": self._restarts,
            "pss_kib": 0,
            "reason": self.reason,
        }

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

    def signal(self, number: int) -> None:
        """Tell the worker something that has no verb (SIGWINCH)."""
        if self.process is not None:
            signal.pidfd_send_signal(self.process.pidfd, number)

    def _hung_up(self, error: Exception | None) -> None:
        """The connection broke. A worker that lives on is of no use: end it, its end brings the successor."""
        if self.process is not None and not self._closing:
            log.warn(f"{self.name}: vhost-user connection lost: {describe(error) if error else 'closed'}")
            self._fleet.kill(self.process)

    def _ended(self, process: Process) -> None:
        if self._closing or self._starting or process is not self.process:
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
        await self.start_for_good()

    # End ---------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the worker and wait for it, also if it is only coming up."""
        self._closing = True
        for frontend in self._frontends.values():
            frontend.close()
        process = self.process
        if process is not None and process.state is ProcessState.STARTING:
            self._fleet.kill(process)  # it answers nothing yet, and has nothing to put in order
        elif process is not None:
            await self._fleet.stop(process)
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
