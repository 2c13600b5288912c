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

from controller.spawn import LAST_WORDS, LAST_WORDS_BYTES, Zygote
from shared import log
from shared.errors import FlotillaError, WorkerError, WorkerLost
from shared.reactor import Event, Reactor
from shared.records import Record, field
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.control import Channel

STOP_SECONDS = 5.0
HELLO_SECONDS = 30.0
LOOK_SECONDS = 1.0


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
        self.reason = ""  # its last words, once it has ended
        self.last_words = -1  # where they come from
        self.channel: Channel | None = None
        self.endpoint = ""
        self.ended = Event()

    @property
    def obituary(self) -> str:
        """How it ended, for a message."""
        said = f": {self.reason}" if self.reason else ""
        return f"{self.name} (pid {self.pid}) ended with {self.exit_status}{said}"

    async def call(self, verb: str, timeout: float | None = 10.0, **arguments: Any) -> dict[str, Any]:
        """One request to the worker. Raises WorkerLost when it is dead or dies meanwhile."""
        if self.channel is None:
            raise WorkerLost(f"{self.name} (pid {self.pid}) has ended")
        return await self.channel.call(verb, timeout, **arguments)


def _read_words(fd: int) -> str:
    """One line, whatever the worker wrote: it may have been taken over."""
    try:
        words = os.read(fd, LAST_WORDS_BYTES)
    except OSError:  # EAGAIN: it said nothing, and somebody else still holds the other end
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in words.decode(errors="replace")).strip()


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


def row(kind: str, device: str, pid: int, state: str, restarts: int, pss: bool = True) -> dict[str, Any]:
    """Of `vmm.fleet`. PSS in KiB; 0 where it is not wanted."""
    return {
        "kind": kind,
        "device": device,
        "pid": pid,
        "state": str(state),
        "restarts": restarts,
        "pss_kib": pss_kib(pid) if pss else 0,
    }


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
        """fork() and greet()."""
        process = await self.fork(spec, fds, on_end, restarts)
        await self.greet(process)
        return process

    async def fork(
        self, spec: WorkerSpec, fds: Mapping[str, int], on_end: Callable[[Process], None], restarts: int = 0
    ) -> Process:
        """A worker that is on its way up. The fds stay the caller's. Raises WorkerError."""
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
        try:
            last_words, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise WorkerError(f"{spec.name}: {error.strerror}") from error
        try:
            pid = await self.zygote.fork(self._reactor, request, {**fds, LAST_WORDS: theirs})
        except BaseException:
            os.close(last_words)
            raise
        finally:
            os.close(theirs)
        process = self.adopt(spec.kind, spec.name, pid, on_end, restarts)
        process.last_words, process.endpoint = last_words, endpoint
        return process

    async def greet(self, process: Process) -> None:
        """Wait for its hello. Raises WorkerLost; the process has been waited for then."""
        if process.endpoint and process.state is not ProcessState.ENDED:
            await self._hello(process)
        if process.state is ProcessState.STARTING:
            process.state = ProcessState.RUNNING
        log.info(f"{process.kind} {process.name} runs as pid {process.pid}")

    async def _hello(self, process: Process) -> None:
        from shared.control import Channel, unlink_endpoint

        try:
            process.channel = Channel(self._reactor, process.endpoint, bind=False)
            self._reactor.call_later(LOOK_SECONDS, lambda: self._watch_descriptors(process))
            await process.call("hello", HELLO_SECONDS)
        except FlotillaError as error:
            # A second one may only be started when nothing of this one can still write.
            self.kill(process)
            await process.ended.wait()
            what = f"{process.name} (pid {process.pid}) did not come up"
            if process.reason:
                raise WorkerLost(f"{what}: {process.reason}") from None
            raise WorkerLost(f"{what}: {error}") from error
        except BaseException:
            self.kill(process)
            raise
        finally:
            # Both ends hold the socket now (or never will): a killed VM then leaves no name behind.
            unlink_endpoint(process.endpoint)

    def _watch_descriptors(self, process: Process) -> None:
        """While its hello is late: zmq, which has no descriptor for a connection, tries for ever and says nothing."""
        if process.state is not ProcessState.STARTING or process.channel is None:
            return
        try:
            os.close(os.dup(process.pidfd))
        except OSError as error:
            process.channel.close(error.strerror or str(error))
        else:
            self._reactor.call_later(LOOK_SECONDS, lambda: self._watch_descriptors(process))

    def _reap(self, process: Process, on_end: Callable[[Process], None]) -> None:
        self._reactor.remove_reader(process.pidfd)
        try:
            result = os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
            process.exit_status = result.si_status if result else None
        except ChildProcessError:
            process.exit_status = None
        os.close(process.pidfd)
        if process.last_words >= 0:
            process.reason = _read_words(process.last_words)
            os.close(process.last_words)
        wanted = process.state is ProcessState.STOPPING
        process.state = ProcessState.ENDED
        self.processes.remove(process)
        if process.channel is not None:
            process.channel.close(process.obituary)
            process.channel = None
        level = log.info if wanted else log.warn
        level(f"{process.kind} {process.obituary}")
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

    def describe(self, pss: bool = True) -> list[dict[str, Any]]:
        """Rows for `vmm.fleet`: this process, its zygote, and every other process but the vCPUs.

        The controller's PSS is that of the address space which the vCPU processes share; their rows say 0.
        """
        rows = [row("controller", "controller", os.getpid(), ProcessState.RUNNING, 0, pss)]
        if self.zygote.running:
            rows.append(row("zygote", "zygote", self.zygote.pid, ProcessState.RUNNING, self.zygote.starts - 1, pss))
        return rows + [row(p.kind, p.name, p.pid, p.state, p.restarts, pss) for p in self.processes]
