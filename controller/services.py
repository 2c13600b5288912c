"""What the VMM needs beside the VM and after the first KVM_RUN: the API process and the janitor.

Both are replaceable: the API process is started again when it dies (the listening socket stays here, so clients wait
instead of being refused), the janitor too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

from controller import requests
from controller.api_socket import ApiSocket
from controller.fleet import Fleet, Process, ProcessState, WorkerSpec
from controller.leavings import Leavings
from controller.service_process import LAST_DELAY, Service, ServiceProcess
from controller.watchdog import Watchdog
from shared import log
from shared.errors import FlotillaError, Timeout, WorkerLost
from shared.linux import close_fds, pidfd_getfd
from shared.messages import Verb
from shared.reactor import Reactor, describe, within
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.exporter import Exporter

GOODBYE_SECONDS = 3.0


class Services:
    """`verbs`: the API's handlers by request name."""

    def __init__(
        self,
        reactor: Reactor,
        fleet: Fleet,
        runtime_dir: str,
        leavings: Leavings,
        api_socket: ApiSocket | None,
        verbs: dict[str, Callable[[Any], Awaitable[Any]]],
    ) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._api_socket = api_socket
        self._verbs = verbs
        self._api: ServiceProcess | None = None
        if api_socket is not None:
            service = Service(
                "api", "API process", "controller.api.entry", "api", Verb.API, self._answer,
                lambda: nullcontext({"listening": api_socket.sock.fileno()}),
            )  # fmt: skip
            self._api = ServiceProcess(reactor, fleet, runtime_dir, service)
        self._stopping = False
        self._janitor: Process | None = None
        self._janitors = 0  # so many have been started
        self._updates: socket.socket | None = None
        self._leavings = leavings
        self._watchdog = Watchdog(reactor, fleet)
        self.exporter: Exporter | None = None
        for path in (*(api_socket.paths if api_socket else ()), fleet.cgroups.path):
            if path:
                leavings.path(path, True)
        leavings.on_path, leavings.on_terminal = self._path_changed, self._terminal_changed

    async def start(self) -> None:
        """Failures are logged and tried again: the guest runs on without either."""
        self._watchdog.start()
        if self._api is not None:
            self._api.start()
        if self.exporter is not None:
            self.exporter.start()
        await self._start_janitor()

    # The API process ---------------------------------------------------------------------------------------------

    def _answer(self, request: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        assert self._api is not None
        service, start, numbers = self._api, self._api.starts, request.get("fds") or []

        async def fetch() -> list[int]:
            """Ours are duplicates; the API process closes its own when it has the answer. All or none."""
            api = await service.present(start) if numbers else None
            fds: list[int] = []
            try:
                for number in numbers:
                    if api is None:  # its pidfd is closed, and maybe another file's
                        raise WorkerLost("the API process that had the request's descriptors has ended")
                    fds.append(pidfd_getfd(api.pidfd, number))
            except BaseException:
                close_fds(fds)
                raise
            return fds

        return requests.answer(self._verbs, request["method"], request["path"], request.get("body") or b"", fetch)

    async def _say_goodbye(self, api: ServiceProcess) -> None:
        """Whoever is there answers what it has under way."""
        process, channel = api.process, api.channel  # forgotten when it ends, be it at the very end of its time
        if process is None or channel is None:
            return
        process.state = ProcessState.STOPPING
        channel.broadcast("goodbye")
        try:
            await within(self._reactor, GOODBYE_SECONDS, process.ended.wait(), "the API process's end")
        except Timeout:
            self._fleet.kill(process)
            await process.ended.wait()

    # The janitor -------------------------------------------------------------------------------------------------

    async def _start_janitor(self) -> None:
        try:
            await self._launch_janitor()
        except (FlotillaError, OSError) as error:
            log.warn(f"no janitor: {describe(error)}; trying again")
            self._reactor.call_later(LAST_DELAY, self._restart_janitor)

    async def _launch_janitor(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)  # a janitor that is stopped keeps nobody
        self_fd = os.pidfd_open(os.getpid())
        terminal = self._leavings.terminal
        known: dict[str, Any] = {"paths": list(self._leavings.paths)}
        fds = {"controller": self_fd, "updates": theirs.fileno()}
        if terminal is not None:
            fds["tty"], known["termios"] = terminal
        spec = WorkerSpec("janitor", "janitor", "controller.janitor", "janitor", known, orphan=True, control=False)
        self._updates = ours  # what changes before it reads waits there
        try:
            self._janitor = await self._fleet.start(spec, fds, self._janitor_ended, self._janitors)
        except BaseException:
            self._hang_up()
            raise
        finally:
            theirs.close()
            os.close(self_fd)
        self._fleet.cgroups.send_home(self._janitor.pid)  # it removes the others'
        self._janitors += 1
        self._fleet.supervision.restored("janitor", "janitor", self._janitor.pid)
        if self._leavings.terminal is not terminal:
            self._terminal_changed()

    def _hang_up(self) -> None:
        if self._updates is not None:
            self._updates.close()
            self._updates = None

    def _janitor_ended(self, process: Process) -> None:
        self._janitor = None
        self._hang_up()
        if not self._stopping:
            self._fleet.report_loss(process)
            self._reactor.call_later(0.1, self._restart_janitor)

    def _restart_janitor(self) -> None:
        if not self._stopping:
            self._reactor.spawn(self._start_janitor(), "janitor")

    def _tell(self, update: dict[str, Any]) -> None:
        import msgpack

        if self._updates is not None:
            try:
                self._updates.send(msgpack.packb(update))
            except OSError as error:
                log.warn(f"janitor: {error}")

    def _path_changed(self, path: str, exists: bool) -> None:
        self._tell({"add" if exists else "remove": path})

    def _terminal_changed(self) -> None:
        if self._janitor is not None and self._leavings.terminal is not None:
            # The descriptor can't follow a running janitor: a fresh one gets it.
            self._fleet.kill(self._janitor)
        else:
            self._tell({"termios": None})

    async def stop(self) -> None:
        """Let requests under way be answered, end both processes, remove the API socket."""
        self._stopping = True
        self._watchdog.stop()
        if self._api is not None:
            await self._api.close()
        if self._api_socket is not None:
            self._api_socket.close()
        if self.exporter is not None:
            await self.exporter.stop()
        if self._api is not None:
            await self._say_goodbye(self._api)
        if self._janitor is not None:
            self._janitor.state = ProcessState.STOPPING
            ended = self._janitor.ended
            if self._fleet.cgroups.path:  # we are in it still
                self._leavings.path(self._fleet.cgroups.path, False)
            # The end of the line tells it nothing; "done" makes it tidy up and leave.
            self._tell({"done": True})
            try:
                await within(self._reactor, GOODBYE_SECONDS, ended.wait(), "the janitor's end")
            except Timeout:
                log.warn("the janitor did not end")
