"""A process beside the VM that dials the controller: started, and started again whenever it dies.

    start ─▶ launching ─▶ running ──(killed, crashed)──▶ waits ──▶ launching       close(): no other comes up
                 └──(no process can be made)──▶ waits ──▶ launching
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from controller.fleet import Fleet, Process, ProcessState, WorkerSpec
from shared import log
from shared.control import API, EXPORTER, Channel, Handler, unlink_endpoint
from shared.errors import FlotillaError
from shared.messages import Verb
from shared.reactor import Lock, Reactor, describe
from shared.records import Record

# A process that dies again and again is started again and again, but not in a busy loop.
STEADY_SECONDS, FIRST_DELAY, LAST_DELAY = 10.0, 0.1, 5.0
LIMITS = {Verb.API: API, Verb.METRICS: EXPORTER}


class Service(Record):
    """`what`: for the log. `verb`: the only one that it may ask. `descriptors`: what a new process is given, open until
    it has been forked."""

    name: str
    what: str
    module: str
    sandbox: str
    verb: Verb
    handler: Handler
    descriptors: Callable[[], AbstractContextManager[Mapping[str, int]]]
    on_hang_up: Callable[[], None] = lambda: None


class ServiceProcess:
    """`process` and `channel` are the present ones, None between two; `starts`: so many have been begun. It says
    `ready` when it serves."""

    def __init__(self, reactor: Reactor, fleet: Fleet, runtime_dir: str, service: Service) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._runtime_dir = runtime_dir
        self._service = service
        self.process: Process | None = None
        self.channel: Channel | None = None
        self._endpoint = ""
        self.starts = 0
        self._began = 0.0
        self._delay = FIRST_DELAY
        self._closing = False
        self._launching = Lock()

    def start(self) -> None:
        """A failure is logged and tried again: the guest does without."""
        self._reactor.spawn(self._try(), self._service.what)

    async def close(self) -> None:
        """None is on its way up when this returns, and none will be. One that lives is the caller's to end."""
        self._closing = True
        async with self._launching:
            pass

    async def _try(self) -> None:
        try:
            async with self._launching:
                if not self._closing:
                    await self._launch()
        except (FlotillaError, OSError) as error:
            self._hang_up()
            log.warn(f"no {self._service.what}: {describe(error)}; trying again")
            self._reactor.call_later(LAST_DELAY, self.start)

    async def _launch(self) -> None:
        service = self._service
        self.starts += 1
        self._began = time.monotonic()
        endpoint = self._endpoint = f"ipc://{self._runtime_dir}/{service.name}.{self.starts}"
        self.channel = Channel(self._reactor, endpoint, bind=True, router=True, limits=LIMITS[service.verb])
        self.channel.handlers[service.verb] = service.handler
        self.channel.on_event = lambda event, _: self._ready(endpoint) if event == "ready" else None
        spec = WorkerSpec(
            service.name, service.name, service.module, service.sandbox, {"controller": endpoint}, control=False
        )
        with service.descriptors() as fds:
            process = await self._fleet.fork(spec, fds, self._ended, self.starts - 1)
        self.process = process
        process.state = ProcessState.RUNNING

    def _ready(self, endpoint: str) -> None:
        unlink_endpoint(endpoint)
        self._reactor.spawn(self._restored(), self._service.what)

    async def present(self, start: int) -> Process | None:
        """The process of that start, which has said something; None: it has ended."""
        async with self._launching:  # the zygote's answer may come after its child's word
            return self.process if self.starts == start else None

    async def _restored(self) -> None:
        if (process := await self.present(self.starts)) is not None:
            self._fleet.supervision.restored(process.kind, process.name, process.pid)

    def _hang_up(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None
            unlink_endpoint(self._endpoint)  # it may have died before it was ready
        self._service.on_hang_up()

    def _ended(self, process: Process) -> None:
        self._hang_up()
        self.process = None
        if self._closing:
            return
        self._fleet.report_loss(process)
        lived = time.monotonic() - self._began
        self._delay = FIRST_DELAY if lived > STEADY_SECONDS else min(self._delay * 2, LAST_DELAY)
        self._reactor.call_later(self._delay, self.start)
