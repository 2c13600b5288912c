"""The fleet: every process of this VM, how it was started, whether it lives, and who hears of its end.

    STARTING ──hello──▶ RUNNING ──▶ STOPPING ──▶ ENDED
         └────────────────┴── killed, crashed ──▶ ENDED    (its supervisor then starts a successor with restarts + 1)

Ends are noticed by pidfd. A process is waited for before anybody is told, so that nothing of it can still write: plain
threads hold a process's exit until their I/O is done (docs/adr/0002-block-io-threads.md).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from enum import StrEnum

from controller.cgroups import Cgroups
from controller.spawn import LAST_WORDS, LAST_WORDS_BYTES, Zygote, end_child
from controller.supervision import Cause, Supervision, process_state, thread_places
from controller.users import Users
from shared import log
from shared.errors import FlotillaError, WorkerError, WorkerLost
from shared.reactor import Event, Reactor, describe
from shared.records import Record, field
from shared.typed import TYPE_CHECKING, Any
from shared.visible import visible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from controller.watchdog import Patient
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
    program: str = ""  # to exec in the forked process, a path; "": none
    standby: bool = False  # another one serves: it is to do nothing until `resume`

    @property
    def label(self) -> str:
        """What `vmm.fleet` calls the process."""
        return f"{self.name}.new" if self.standby else self.name


class Verdict(Record):
    """Why a process was ended that lived. `since`: when it last did its work, CLOCK_MONOTONIC; None: until then."""

    cause: Cause
    reason: str
    since: float | None = None


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
        self.killed_by = 0  # the signal that ended it; 0: it exited
        self.wanted = False  # it was told to end
        self.aside = False  # another one serves its device, so its end is nobody's loss
        self.identity: dict[str, Any] = {}  # its answer to hello
        self.verdict: Verdict | None = None
        self.serving = False  # it has work to do, so the watchdog asks it for heartbeats
        self.occupied: Callable[[], bool] = lambda: False  # with something that may take as long as it likes
        self.on_heartbeat: Callable[[], None] = lambda: None
        self.stats: dict[str, int] = {}  # as last told
        self._calls = 0
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

    def stillborn(self, why: str) -> str:
        """That it did not come up, by its last words or else `why`."""
        return f"{self.name} (pid {self.pid}) did not come up: {self.reason or why}"

    @property
    def loss(self) -> Verdict:
        """What its end is to be reported as."""
        return self.verdict or Verdict(Cause.ENDED, self.obituary)

    @property
    def blameable(self) -> bool:
        """Whether its own work may have ended it: not if it was killed (137 is a shell's SIGKILL) or stopped."""
        if self.verdict is not None:
            return self.verdict.cause is Cause.HUNG and self.verdict.since is not None
        return self.killed_by != signal.SIGKILL and self.exit_status != 128 + signal.SIGKILL

    def busy(self) -> bool:
        """Somebody of ours waits for its answer, which may have to wait for a disk."""
        return self._calls > 0 or self.occupied()

    async def call(self, verb: str, timeout: float | None = 10.0, **arguments: Any) -> dict[str, Any]:
        """One request to the worker. Raises WorkerLost when it is dead or dies meanwhile."""
        if self.channel is None:
            raise WorkerLost(f"{self.name} (pid {self.pid}) has ended")
        counted = verb != "heartbeat"
        self._calls += counted
        try:
            return await self.channel.call(verb, timeout, **arguments)
        finally:
            self._calls -= counted


def _read_words(fd: int) -> str:
    """One line, whatever the worker wrote: it may have been taken over."""
    try:
        words = os.read(fd, LAST_WORDS_BYTES)
    except OSError:  # EAGAIN: it said nothing, and somebody else still holds the other end
        return ""
    return visible(words.decode(errors="replace").strip())


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


def row(kind: str, device: str, pid: int, state: str, restarts: int) -> dict[str, Any]:
    """Of `vmm.fleet`; `pss_kib` is for whoever wants it to fill in."""
    return {
        "kind": kind,
        "device": device,
        "pid": pid,
        "state": str(state),
        "restarts": restarts,
        "pss_kib": 0,
    }


def fill_in_pss(rows: Iterable[dict[str, Any]]) -> None:
    """The controller's is that of the address space which the vCPU processes share; theirs stays 0."""
    for each in rows:
        if each["pid"] and each["kind"] != "vcpu":
            each["pss_kib"] = pss_kib(each["pid"])


class Fleet:
    """Starts, lists and watches processes. Restarting is policy and belongs to whoever started them."""

    def __init__(
        self,
        reactor: Reactor,
        zygote: Zygote,
        runtime_dir: str,
        supervision: Supervision | None = None,
        seccomp: str = "true",
    ) -> None:
        """`seccomp`: the value of --seccomp, for every process that has a filter."""
        self._reactor = reactor
        self.supervision = supervision or Supervision()
        self.patients: list[Callable[[], Iterable[Patient]]] = []  # more processes for the watchdog
        self.zygote = zygote
        self._runtime_dir = runtime_dir
        self._incarnation = 0
        self._zygote_verdict = 0, Verdict(Cause.ENDED, "")  # the last one that was condemned, by its pid
        self.processes: list[Process] = []
        self.seccomp = seccomp
        self.cgroups = Cgroups()
        self.users = Users()

    def use(self, cgroups: Cgroups, users: Users) -> None:
        """Every process from now on has a cgroup of its own there, and runs as one of these users."""
        self.cgroups, self.users = cgroups, users
        self.zygote.on_start = lambda pid: cgroups.enter("zygote", pid)

    def adopt(self, kind: str, name: str, pid: int, on_end: Callable[[Process], None], restarts: int = 0) -> Process:
        """Watch a child of ours that exists already."""
        process = Process(kind, name, pid, os.pidfd_open(pid), restarts)
        self.processes.append(process)
        self.cgroups.enter(name, pid)
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
        endpoint = f"ipc://{self._runtime_dir}/{spec.label}.{self._incarnation}" if spec.control else ""
        request = {
            "kind": spec.kind,
            "name": spec.name,
            "module": spec.module,
            "sandbox": spec.sandbox,
            "spec": dict(spec.spec),
            "endpoint": endpoint,
            "orphan": spec.orphan,
            "seccomp": self.seccomp,
            "user": self.users.of(spec.name, {process.name for process in self.processes}),
            "program": spec.program,
            "standby": spec.standby,
        }
        try:
            last_words, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise WorkerError(f"{spec.name}: {error.strerror}") from error
        try:
            pid = await self.zygote.fork(self._reactor, request, {**fds, LAST_WORDS: theirs})
            process = self._adopt_worker(spec, pid, on_end, restarts)
        except BaseException:
            os.close(last_words)
            if endpoint:  # a process that was ended again may have bound it
                from shared.control import unlink_endpoint

                unlink_endpoint(endpoint)
            raise
        finally:
            os.close(theirs)
        process.last_words, process.endpoint, process.aside = last_words, endpoint, spec.standby
        return process

    def _adopt_worker(
        self, spec: WorkerSpec, pid: int, on_end: Callable[[Process], None], restarts: int
    ) -> Process:
        try:
            return self.adopt(spec.kind, spec.label, pid, on_end, restarts)
        except OSError as error:  # no descriptor is left: a process that can't be watched must not be
            end_child(pid)
            raise WorkerError(f"{spec.name}: {error.strerror}") from error

    def exchange(self, process: Process, before: Process, name: str) -> None:
        """`process` has the name from now on that `before` had."""
        stand_in, process.name = process.name, name
        before.name = f"{name}.old"
        self.cgroups.enter(name, process.pid)
        self.cgroups.leave(stand_in)

    async def greet(self, process: Process) -> None:
        """Wait for its hello. Raises WorkerLost; the process has been waited for then."""
        if process.state is ProcessState.ENDED:  # it was quicker than the caller's next step
            raise WorkerLost(process.stillborn(process.obituary))
        if process.endpoint:
            await self._hello(process)
        if process.state is ProcessState.STARTING:
            process.state = ProcessState.RUNNING
        log.info(f"{process.kind} {process.name} runs as pid {process.pid}")

    async def _hello(self, process: Process) -> None:
        from shared.control import OPEN, WORKER, Channel, unlink_endpoint

        try:
            limits = OPEN if process.kind == "migration_agent" else WORKER  # it passes whole bodies on
            process.channel = Channel(self._reactor, process.endpoint, bind=False, limits=limits)
            process.channel.on_nonsense = lambda error: self.condemn(process, Cause.REFUSED, describe(error))
            self._reactor.call_later(LOOK_SECONDS, lambda: self._watch_descriptors(process))
            process.identity = await process.call("hello", HELLO_SECONDS)
        except FlotillaError as error:
            # A second one may only be started when nothing of this one can still write.
            self.kill(process)
            await process.ended.wait()
            raise WorkerLost(process.stillborn(str(error))) from (None if process.reason else error)
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
        except ChildProcessError:
            result = None
        process.exit_status = result.si_status if result else None
        process.killed_by = result.si_status if result and result.si_code != os.CLD_EXITED else 0
        os.close(process.pidfd)
        if process.killed_by == signal.SIGSYS:  # it could say nothing itself
            process.reason = "ended by SIGSYS: a forbidden system call"
        if process.last_words >= 0:
            process.reason = _read_words(process.last_words) or process.reason
            os.close(process.last_words)
        # What crashes while it is being ended (its connection broke, say, which is noticed first) has crashed.
        ours = process.killed_by in (0, signal.SIGKILL, signal.SIGTERM)
        process.wanted = process.state is ProcessState.STOPPING and process.verdict is None and ours
        process.state = ProcessState.ENDED
        self.processes.remove(process)
        self.cgroups.leave(process.name)
        if process.channel is not None:
            process.channel.close(process.obituary)
            process.channel = None
        elif process.endpoint:  # nobody greeted it, and it may have bound its name
            from shared.control import unlink_endpoint

            unlink_endpoint(process.endpoint)
        level = log.info if process.wanted else log.warn
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
            process.state = ProcessState.STOPPING
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    def condemn(self, process: Process, cause: Cause, reason: str, *, since: float | None = None) -> None:
        """End a process that lives and is of no use. Its supervisor hears of it as of any other death."""
        if process.state in (ProcessState.STARTING, ProcessState.RUNNING):
            process.verdict = Verdict(cause, reason, since)
            log.warn(f"{process.kind} {process.name} (pid {process.pid}), {cause}: {reason}; ending it")
            if log.wanted(log.Level.INFO):  # the device waits meanwhile
                log.info(f"{process.name}'s threads: {thread_places(process.pid)}")
            self.kill(process)

    def report_loss(self, process: Process) -> None:
        """Of one that has ended, to supervision, unless it was told to end."""
        if not process.wanted:
            loss = process.loss
            self.supervision.lost(process.kind, process.name, process.pid, loss.cause, loss.reason, since=loss.since)

    def hung_up(self, process: Process, cause: Cause, reason: str) -> None:
        """Its connection broke. One that is ending anyway is its pidfd's to report: sockets close a moment earlier."""
        if cause is Cause.DISCONNECTED and process_state(process.pid)[1]:
            return
        self.condemn(process, cause, reason)

    def condemn_zygote(self, cause: Cause, reason: str) -> None:
        self._zygote_verdict = self.zygote.pid, Verdict(cause, reason)
        self.zygote.kill()

    def renew_zygote(self) -> None:
        """Start another if it has died: the next worker must not wait for its imports."""
        zygote, pid = self.zygote, self.zygote.pid
        if not zygote.running or process_state(pid)[0] != "Z":
            return
        try:
            renewed = zygote.renew()
        except OSError as error:
            log.warn(f"no zygote: {describe(error)}; the next worker tries again")
            return
        if renewed:
            condemned, verdict = self._zygote_verdict
            if condemned != pid:  # a fork that waited for that one has had it replaced
                verdict = Verdict(Cause.ENDED, "it has ended")
            self.supervision.lost("zygote", "zygote", pid, verdict.cause, verdict.reason)
            self.supervision.restored("zygote", "zygote", zygote.pid)

    def describe(self) -> list[dict[str, Any]]:
        """Rows for `vmm.fleet`: this process, its zygote, and every other process but the vCPUs."""
        rows = [row("controller", "controller", os.getpid(), ProcessState.RUNNING, 0)]
        if self.zygote.running:
            rows.append(row("zygote", "zygote", self.zygote.pid, ProcessState.RUNNING, self.zygote.starts - 1))
        return rows + [row(p.kind, p.name, p.pid, p.state, p.restarts) for p in self.processes]
