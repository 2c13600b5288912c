"""The fleet: every process of this VM, how it was started, whether it lives, and who hears of its end.

    STARTING ──hello──▶ RUNNING ──▶ STOPPING ──▶ ENDED
         └────────────────┴── killed, crashed ──▶ ENDED    (its supervisor then starts a successor with restarts + 1)

Ends are noticed by pidfd. A process is waited for before anybody is told, so that nothing of it can still write: plain
threads hold a process's exit until their I/O is done (docs/adr/0002-block-io-threads.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from enum import StrEnum

from controller.spawn import Zygote
from shared import log
from shared.errors import FlotillaError, WorkerLost
from shared.reactor import Event, Reactor
from shared.records import Record, field
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.control import Channel

STOP_SECONDS = 5.0


class ProcessState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


class WorkerSpec(Record):
    """How to start a worker, again and again."""

    kind: str  # what `vmm.fleet` calls it
    name: str
    module: str  # import name with a main(start)
    sandbox: str  # profile of shared/sandbox.py
    spec: Mapping[str, Any] = field(default_factory=dict)
    orphan: bool = False  # outlives the controller
    control: bool = True  # has a control channel


class Process:
    """One process of the fleet. `ended` is set once it has been waited for."""

    def __init__(self, kind: str, name: str, pid: int, pidfd: int, restarts: int = 0) -> None:
        self.kind = kind
        self.name = name
        self.pid = pid
        self.pidfd = pidfd
        self.restarts = restarts
        self.state = ProcessState.STARTING
        self.exit_status: int | None = None
        self.channel: Channel | None = None
        self.ended = Event()

    async def call(self, verb: str, timeout: float | None = 10.0, **arguments: Any) -> dict[str, Any]:
        """One request to the worker. Raises WorkerLost when it is dead or dies meanwhile."""
        if self.channel is None:
            raise WorkerLost(f"{self.name} (pid {self.pid}) has ended")
        return await self.channel.call(verb, timeout, **arguments)


def pss_kib(pid: int) -> int:
    """Proportional set size of a process in KiB, 0 when it is gone. Slow: walks its page tables."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


class Fleet:
    """Starts, lists and watches processes. Restarting is policy and belongs to whoever started them."""

    def __init__(self, reactor: Reactor, zygote: Zygote, runtime_dir: str) -> None:
        self._reactor = reactor
        self.zygote = zygote
        self._runtime_dir = runtime_dir
        self._incarnation = 0
        self.processes: list[Process] = []

    def adopt(self, kind: str, name: str, pid: int, on_end: Callable[[Process], None], restarts: int = 0) -> Process:
        """Watch a child of ours that exists already."""
        process = Process(kind, name, pid, os.pidfd_open(pid), restarts)
        self.processes.append(process)
        self._reactor.add_reader(process.pidfd, lambda: self._reap(process, on_end))
        return process

    async def start(
        self, spec: WorkerSpec, fds: Mapping[str, int], on_end: Callable[[Process], None], restarts: int = 0
    ) -> Process:
        """Fork a worker and wait for its hello. The fds stay the caller's. Raises WorkerError."""
        self._incarnation += 1
        endpoint = f"ipc://{self._runtime_dir}/{spec.name}.{self._incarnation}" if spec.control else ""
        request = {
            "kind": spec.kind,
            "name": spec.name,
            "module": spec.module,
            "sandbox": spec.sandbox,
            "spec": dict(spec.spec),
            "endpoint": endpoint,
            "orphan": spec.orphan,
        }
        pid = await self.zygote.fork(self._reactor, request, fds)
        process = self.adopt(spec.kind, spec.name, pid, on_end, restarts)
        if spec.control:
            await self._greet(process, endpoint)
        if process.state is ProcessState.STARTING:
            process.state = ProcessState.RUNNING
        log.info(f"{spec.kind} {spec.name} runs as pid {pid}")
        return process

    async def _greet(self, process: Process, endpoint: str) -> None:
        from shared.control import Channel, unlink_endpoint

        process.channel = Channel(self._reactor, endpoint, bind=False)
        try:
            await process.call("hello", 30.0)
        except FlotillaError as error:
            raise WorkerLost(f"{process.name} (pid {process.pid}) did not come up") from error
        finally:
            # Both ends hold the socket now (or never will): a killed VM then leaves no name behind.
            unlink_endpoint(endpoint)

    def _reap(self, process: Process, on_end: Callable[[Process], None]) -> None:
        self._reactor.remove_reader(process.pidfd)
        try:
            result = os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
            process.exit_status = result.si_status if result else None
        except ChildProcessError:
            process.exit_status = None
        os.close(process.pidfd)
        wanted = process.state is ProcessState.STOPPING
        process.state = ProcessState.ENDED
        self.processes.remove(process)
        if process.channel is not None:
            process.channel.close(f"{process.name} (pid {process.pid}) ended with {process.exit_status}")
            process.channel = None
        level = log.info if wanted else log.warn
        level(f"{process.kind} {process.name} (pid {process.pid}) ended with {process.exit_status}")
        process.ended.set()
        on_end(process)

    async def stop(self, process: Process) -> None:
        """Ask it to end; SIGKILL after a while. Returns when it has been waited for."""
        if process.state is ProcessState.ENDED:
            return
        process.state = ProcessState.STOPPING
        kill = self._reactor.call_later(STOP_SECONDS, lambda: self.kill(process))
        try:
            await process.call("shutdown", STOP_SECONDS)
        except FlotillaError:
            self.kill(process)
        await process.ended.wait()
        kill.cancel()

    def kill(self, process: Process) -> None:
        """SIGKILL, by pidfd: never a stranger who got the same pid."""
        if process.state is not ProcessState.ENDED:
            import signal

            process.state = ProcessState.STOPPING
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    def describe(self) -> list[dict[str, Any]]:
        """Rows for `vmm.fleet`: kind, device, pid, state, restarts, PSS in KiB."""
        return [
            {
                "kind": process.kind,
                "device": process.name,
                "pid": process.pid,
                "state": str(process.state),
                "restarts": process.restarts,
                "pss_kib": pss_kib(process.pid),
            }
            for process in self.processes
        ]
