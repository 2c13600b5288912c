"""A worker that serves one or more vhost-user devices, and its successors.

    start ──▶ serving ──(killed, crashed, hung up)──▶ waiting ──fork──▶ replaying ──▶ serving
                                                         ▲                 │ fails
                                                         └──── back-off ◀──┘

The guest sees nothing of it: kicks stay in the eventfds, requests that were in flight are in the inflight region. The
pidfd has been waited for before a successor is forked, so nothing of the dead process can still write (DESIGN, fence).
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

from controller.fleet import Fleet, Process, WorkerSpec
from controller.vhost_frontend import Frontend
from shared import log
from shared.errors import FlotillaError, WorkerLost
from shared.reactor import Reactor, describe, sleep

# A worker that lived this long has earned an immediate restart.
STEADY_SECONDS = 1.0
FIRST_DELAY, LAST_DELAY = 0.02, 2.0
CALL_ATTEMPTS = 200
START_DELAYS = (0.02, 0.1, 0.5)


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
        """`fds` are given to every incarnation and belong to this object from now on."""
        self._reactor = reactor
        self._fleet = fleet
        self._spec = spec
        self._frontends = dict(frontends)
        self._fds = dict(fds)
        self._closing = False
        self._starting = False
        self._restarts = 0
        self._delay = 0.0
        self._began = 0.0
        self.process: Process | None = None
        self.state: dict[str, Any] | None = None  # a save's answer that every incarnation loads before it serves
        for frontend in self._frontends.values():
            frontend.on_lost = self._hung_up

    @property
    def name(self) -> str:
        return self._spec.name

    async def start(self) -> None:
        """Fork the worker and connect every front end, several times if it dies meanwhile. Raises FlotillaError."""
        self._starting = True
        try:
            for delay in (*START_DELAYS, None):
                try:
                    return await self._start_once()
                except FlotillaError as error:
                    await self._clear()
                    if delay is None or self._closing:
                        raise
                    log.warn(f"{self.name}: {describe(error)}; trying again")
                    await sleep(self._reactor, delay)
                    self._restarts += 1
        finally:
            self._starting = False

    async def _start_once(self) -> None:
        self._began = time.monotonic()
        pairs = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for name in self._frontends}
        try:
            fds = {**self._fds, **{name: theirs.fileno() for name, (_, theirs) in pairs.items()}}
            self.process = await self._fleet.start(self._spec, fds, self._ended, self._restarts)
            if self.state is not None:
                await self.process.call("load", **self.state)
            for name, frontend in self._frontends.items():
                ours = pairs[name][0].dup()
                ours.setblocking(False)
                await frontend.replay(ours)
        finally:
            for ours, theirs in pairs.values():
                ours.close()
                theirs.close()

    async def _clear(self) -> None:
        """A worker that did not get as far as serving must be gone before its successor is forked."""
        process, self.process = self.process, None
        if process is not None:
            self._fleet.kill(process)
            await process.ended.wait()

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
        raise WorkerLost(f"{self.name}: no worker lives long enough to answer {verb}")

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
        lived = time.monotonic() - self._began
        self._delay = 0.0 if lived > STEADY_SECONDS else min(max(self._delay * 2, FIRST_DELAY), LAST_DELAY)
        self._restarts += 1
        self._reactor.spawn(self._restart(), f"restart {self.name}")

    async def _restart(self) -> None:
        if self._delay:
            await sleep(self._reactor, self._delay)
        while not self._closing:
            try:
                await self.start()
                return
            except FlotillaError as error:
                log.error(f"{self.name}: no successor yet: {describe(error)}")
                await sleep(self._reactor, LAST_DELAY)

    async def close(self) -> None:
        """End the worker and wait for it."""
        self._closing = True
        for frontend in self._frontends.values():
            frontend.close()
        if self.process is not None:
            await self._fleet.stop(self.process)
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
