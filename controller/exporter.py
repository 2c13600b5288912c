"""The metrics exporter, seen from the controller: a process of its own, started again whenever it dies.

It gets the listening socket, dials a control endpoint that serves one verb, and has one end of a socket pair for
descriptors. So whoever takes it over learns figures and can ask for nothing else.

    start ─▶ running ──(killed, crashed)──▶ waits ──▶ running        stop() at any time: killed, it holds nothing
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping

from controller.fleet import Fleet, Process, ProcessState, WorkerSpec
from controller.leavings import Leavings
from shared import log
from shared.errors import FlotillaError
from shared.messages import Verb
from shared.reactor import Lock, Reactor, describe
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

    from controller.api_socket import ApiSocket
    from shared.control import Channel

STEADY_SECONDS, FIRST_DELAY, LAST_DELAY = 10.0, 0.1, 5.0
NAME = "metrics"
FDS_PER_MESSAGE = 60  # below shared.linux.SCM_MAX_FDS

# Figures, as a message, and the files that go with them, by pid. The files are the receiver's to close.
Collect = Callable[[], Awaitable[tuple[dict[str, Any], dict[int, int]]]]


class Exporter:
    """`listening` stays open between two processes, and is closed by stop()."""

    def __init__(
        self,
        reactor: Reactor,
        fleet: Fleet,
        runtime_dir: str,
        leavings: Leavings,
        listening: ApiSocket,
        collect: Collect,
    ) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._runtime_dir = runtime_dir
        self._listening = listening
        self._collect = collect
        self._process: Process | None = None
        self._channel: Channel | None = None
        self._sidecar: socket.socket | None = None
        self._incarnation = 0
        self._endpoint = ""
        self._began = 0.0
        self._delay = FIRST_DELAY
        self._stopping = False
        self._launching = Lock()
        for path in listening.paths:
            leavings.path(path, True)

    def start(self) -> None:
        """A failure is logged and tried again: nothing depends on it."""
        self._reactor.spawn(self._try(), "metrics exporter")

    async def _try(self) -> None:
        import zmq

        try:
            async with self._launching:
                if not self._stopping:
                    await self._launch()
        except (FlotillaError, OSError, zmq.ZMQError) as error:
            self._hang_up()
            log.warn(f"no metrics exporter: {describe(error)}; trying again")
            self._reactor.call_later(LAST_DELAY, self.start)

    async def _launch(self) -> None:
        import socket

        from shared.control import Channel

        self._incarnation += 1
        self._began = time.monotonic()
        endpoint = self._endpoint = f"ipc://{self._runtime_dir}/{NAME}.{self._incarnation}"
        self._channel = Channel(self._reactor, endpoint, bind=True, router=True)
        self._channel.handlers[Verb.METRICS] = lambda _: self._answer()
        self._channel.on_event = lambda name, _: self._ready(endpoint) if name == "ready" else None
        self._sidecar, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sidecar.setblocking(False)
        spec = WorkerSpec(
            NAME, NAME, "metrics_exporter.__main__", "exporter", {"controller": endpoint}, control=False
        )
        with theirs:
            fds = {"listening": self._listening.sock.fileno(), "sidecar": theirs.fileno()}
            self._process = await self._fleet.fork(spec, fds, self._ended, self._incarnation - 1)
        self._process.state = ProcessState.RUNNING

    def _ready(self, endpoint: str) -> None:
        from shared.control import unlink_endpoint

        unlink_endpoint(endpoint)
        self._reactor.spawn(self._restored(), "metrics exporter")

    async def _restored(self) -> None:
        async with self._launching:  # the zygote's answer may come after its child's word
            if self._process is not None:
                self._fleet.supervision.restored(NAME, NAME, self._process.pid)

    async def _answer(self) -> dict[str, Any]:
        figures, files = await self._collect()
        try:
            self._send(files)
        finally:
            for fd in files.values():
                os.close(fd)
        return figures

    def _send(self, files: Mapping[int, int]) -> None:
        """Before the answer, so that they are there when it is. An exporter that does not take them goes without."""
        import msgpack

        from shared.linux import send_fds

        pids = list(files)
        for start in range(0, len(pids), FDS_PER_MESSAGE):
            part = pids[start : start + FDS_PER_MESSAGE]
            if self._sidecar is None:
                return
            try:
                send_fds(self._sidecar, msgpack.packb({"pids": part}), [files[pid] for pid in part])
            except OSError as error:
                log.debug(f"metrics exporter: {error}")
                return

    def _hang_up(self) -> None:
        if self._channel is not None:
            from shared.control import unlink_endpoint

            self._channel.close()
            self._channel = None
            unlink_endpoint(self._endpoint)  # it may have died before it was ready
        if self._sidecar is not None:
            self._sidecar.close()
            self._sidecar = None

    def _ended(self, process: Process) -> None:
        self._hang_up()
        self._process = None
        if not self._stopping:
            loss = process.loss
            self._fleet.supervision.lost(NAME, NAME, process.pid, loss.cause, loss.reason, since=loss.since)
            lived = time.monotonic() - self._began
            self._delay = FIRST_DELAY if lived > STEADY_SECONDS else min(self._delay * 2, LAST_DELAY)
            self._reactor.call_later(self._delay, self.start)

    async def stop(self) -> None:
        """Remove the socket and end the process, whatever it is at."""
        self._stopping = True
        async with self._launching:
            self._listening.close()
        if self._process is not None:
            ended = self._process.ended
            self._fleet.kill(self._process)
            await ended.wait()
