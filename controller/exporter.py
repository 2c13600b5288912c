"""The metrics exporter, seen from the controller: a process of its own, started again whenever it dies.

It gets the listening socket, dials a control endpoint that serves one verb, and has one end of a socket pair for
descriptors. So whoever takes it over learns figures and can ask for nothing else. At the end it is killed: it holds
nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import msgpack

from controller.fleet import Fleet
from controller.leavings import Leavings
from controller.service_process import Service, ServiceProcess
from shared import log
from shared.linux import close_fds, send_fds
from shared.messages import Verb
from shared.reactor import Reactor
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.api_socket import ApiSocket

NAME = "metrics"
FDS_PER_MESSAGE = 60  # below shared.linux.SCM_MAX_FDS

# Figures, as a message; into what it is given, the files that go with them, by pid.
Collect = Callable[[dict[int, int]], Awaitable[dict[str, Any]]]


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
        self._fleet = fleet
        self._listening = listening
        self._collect = collect
        self._sidecar: socket.socket | None = None
        service = Service(
            NAME, "metrics exporter", "metrics_exporter.__main__", "exporter", Verb.METRICS, self._answer,
            self._descriptors, self._hang_up,
        )  # fmt: skip
        self._service = ServiceProcess(reactor, fleet, runtime_dir, service)
        for path in listening.paths:
            leavings.path(path, True)

    def start(self) -> None:
        """A failure is logged and tried again: nothing depends on it."""
        self._service.start()

    @contextmanager
    def _descriptors(self) -> Iterator[Mapping[str, int]]:
        self._sidecar, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sidecar.setblocking(False)
        with theirs:
            yield {"listening": self._listening.sock.fileno(), "sidecar": theirs.fileno()}

    async def _answer(self, _: dict[str, Any]) -> dict[str, Any]:
        files: dict[int, int] = {}
        try:
            figures = await self._collect(files)
            self._send(files)
        finally:
            close_fds(list(files.values()))
        return figures

    def _send(self, files: Mapping[int, int]) -> None:
        """Before the answer, so that they are there when it is. An exporter that does not take them goes without."""
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
        if self._sidecar is not None:
            self._sidecar.close()
            self._sidecar = None

    async def stop(self) -> None:
        """Remove the socket and end the process, whatever it is at."""
        await self._service.close()
        self._listening.close()
        if (process := self._service.process) is not None:
            self._fleet.kill(process)
            await process.ended.wait()
