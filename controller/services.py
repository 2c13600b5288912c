"""What the VMM needs beside the VM and after the first KVM_RUN: the API process and the janitor.

Both are replaceable: the API process is started again when it dies (the listening socket stays here, so clients wait
instead of being refused), the janitor too.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable

from controller import requests
from controller.api_socket import ApiSocket
from controller.fleet import Fleet, Process, ProcessState, WorkerSpec
from controller.leavings import Leavings
from controller.watchdog import Watchdog
from shared import log
from shared.control import Channel, unlink_endpoint
from shared.errors import FlotillaError, Timeout, WorkerLost
from shared.linux import close_fds, pidfd_getfd
from shared.messages import Verb
from shared.reactor import Lock, Reactor, describe, within
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.exporter import Exporter

GOODBYE_SECONDS = 3.0
# A process that dies again and again is started again and again, but not in a busy loop.
STEADY_SECONDS, LAST_DELAY = 10.0, 5.0


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
        self._runtime_dir = runtime_dir
        self._api_socket = api_socket
        self._verbs = verbs
        self._api: Process | None = None
        self._channel: Channel | None = None
        self._api_endpoint = ""
        self._incarnation = 0
        self._api_began = 0.0
        self._api_delay = 0.1
        self._launching = Lock()  # of an API process
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
        self._start_api()
        if self.exporter is not None:
            self.exporter.start()
        await self._start_janitor()

    # The API process ---------------------------------------------------------------------------------------------

    def _start_api(self) -> None:
        self._reactor.spawn(self._try_api(), "API process")

    async def _try_api(self) -> None:
        try:
            async with self._launching:
                await self._launch_api()
        except (FlotillaError, OSError) as error:
            self._hang_up_api()
            log.warn(f"no API process: {describe(error)}; trying again")
            self._reactor.call_later(LAST_DELAY, self._start_api)

    async def _launch_api(self) -> None:
        if self._api_socket is None or self._stopping:
            return
        self._incarnation += 1
        self._api_began = time.monotonic()
        endpoint = f"ipc://{self._runtime_dir}/api.{self._incarnation}"
        channel = Channel(self._reactor, endpoint, bind=True, router=True)
        channel.handlers[Verb.API] = self._answer
        channel.on_event = lambda name, _: self._api_ready(endpoint) if name == "ready" else None
        self._channel, self._api_endpoint = channel, endpoint
        spec = WorkerSpec("api", "api", "controller.api.entry", "api", {"controller": endpoint}, control=False)
        fds = {"listening": self._api_socket.sock.fileno()}
        self._api = await self._fleet.fork(spec, fds, self._api_ended, self._incarnation - 1)
        self._api.state = ProcessState.RUNNING

    def _api_ready(self, endpoint: str) -> None:
        unlink_endpoint(endpoint)
        self._reactor.spawn(self._api_restored(), "API process")

    def _answer(self, request: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        api, numbers = self._api, request.get("fds") or []

        def fetch() -> list[int]:
            """Ours are duplicates; the API process closes its own when it has the answer. All or none."""
            fds: list[int] = []
            try:
                for number in numbers:
                    if api is None or api is not self._api:  # its pidfd is closed, and may be another file's by now
                        raise WorkerLost("the API process that had the request's descriptors has ended")
                    fds.append(pidfd_getfd(api.pidfd, number))
            except BaseException:
                close_fds(fds)
                raise
            return fds

        return requests.answer(self._verbs, request["method"], request["path"], request.get("body") or b"", fetch)

    async def _api_restored(self) -> None:
        async with self._launching:  # the zygote's answer may come after its child's word
            if self._api is not None:
                self._fleet.supervision.restored("api", "api", self._api.pid)

    def _hang_up_api(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            unlink_endpoint(self._api_endpoint)  # it may have died before it was ready

    def _api_ended(self, process: Process) -> None:
        self._hang_up_api()
        self._api = None
        if not self._stopping:
            self._lost(process)
            lived = time.monotonic() - self._api_began
            self._api_delay = 0.1 if lived > STEADY_SECONDS else min(self._api_delay * 2, LAST_DELAY)
            self._reactor.call_later(self._api_delay, self._start_api)

    def _lost(self, process: Process) -> None:
        if not process.wanted:
            loss = process.loss
            self._fleet.supervision.lost(process.kind, process.name, process.pid, loss.cause, loss.reason)

    # The janitor -------------------------------------------------------------------------------------------------

    async def _start_janitor(self) -> None:
        try:
            await self._launch_janitor()
        except (FlotillaError, OSError) as error:
            log.warn(f"no janitor: {describe(error)}; trying again")
            self._reactor.call_later(LAST_DELAY, self._restart_janitor)

    async def _launch_janitor(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self_fd = os.pidfd_open(os.getpid())
        known = {"paths": list(self._leavings.paths)}
        spec = WorkerSpec("janitor", "janitor", "controller.janitor", "janitor", known, orphan=True, control=False)
        fds = {"controller": self_fd, "updates": theirs.fileno()}
        terminal = self._leavings.terminal
        if terminal is not None:
            fds["tty"] = terminal[0]
        try:
            self._janitor = await self._fleet.start(spec, fds, self._janitor_ended, self._janitors)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(self_fd)
        ours.setblocking(False)  # a janitor that is stopped keeps nobody
        self._fleet.cgroups.send_home(self._janitor.pid)  # it removes the others'
        self._updates = ours
        self._janitors += 1
        self._fleet.supervision.restored("janitor", "janitor", self._janitor.pid)
        if terminal is not None:
            self._tell({"termios": terminal[1]})

    def _janitor_ended(self, process: Process) -> None:
        self._janitor = None
        if self._updates is not None:
            self._updates.close()
            self._updates = None
        if not self._stopping:
            self._lost(process)
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
        if self._api_socket is not None:
            self._api_socket.close()
        if self.exporter is not None:
            await self.exporter.stop()
        async with self._launching:
            pass  # nobody is on its way up behind our back
        api = self._api  # which is forgotten when it ends, be it at the very end of its time
        if api is not None and self._channel is not None:
            api.state = ProcessState.STOPPING
            self._channel.broadcast("goodbye")
            try:
                await within(self._reactor, GOODBYE_SECONDS, api.ended.wait(), "the API process's end")
            except Timeout:
                self._fleet.kill(api)
                await api.ended.wait()
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
