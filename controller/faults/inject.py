"""Carrying faults out: a signal by pidfd, or a word to the worker (shared/rehearsal.py, each worker's `fault`).

    request ──parse──▶ armed ──(at once, or when a migration enters the state)──▶ struck ──(duration_ms)──▶ lifted
                         └── at a message or request: the worker itself waits for it

A fault belongs to one process: its successor has none. What is lifted is lifted only of the process that was struck,
and only if no later fault has taken its place there: SIGSTOP that of SIGSTOP, a word to the worker that of a word.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Mapping
from typing import Any, Final

from controller.events import EventMonitor
from controller.faults.fault import Channel, Fault, Point, Shape, parse
from controller.fleet import Fleet
from controller.fleet import Process as Running
from shared import log
from shared.errors import FlotillaError, HostError, StateError, WorkerError, WorkerLost
from shared.faults import Kind, Process
from shared.messages import Verb
from shared.reactor import Reactor, describe, sleep

# So that the API process can still pass the answer on.
ANSWER_SECONDS: Final = 0.1
CALL_SECONDS: Final = 5.0
SLACK: Final = 16 << 20  # for what a thread needs to say that it can't go on
AGENT: Final = "migration"  # exists only while one goes on; may be named before
STEMS: Final = {"vcpu": Process.VCPU, "_disk": Process.BLK, "_net": Process.NET, "console": Process.CONSOLE}
SIGNALS: Final = {Kind.KILL: signal.SIGKILL, Kind.STOP: signal.SIGSTOP}


class Injector:
    """`vcpus`: pids of the VM's vCPU processes by name, at the moment."""

    def __init__(
        self, reactor: Reactor, fleet: Fleet, events: EventMonitor, vcpus: Callable[[], Mapping[str, int]]
    ) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._events = events
        self._vcpus = vcpus
        # The latest of each process, by pid: a successor with the same one is struck anew.
        self._stops: dict[int, Fault] = {}
        self._words: dict[int, Fault] = {}

    def processes(self) -> dict[str, Process]:
        """Those that can be named now."""
        found = {process.name: Process(process.kind) for process in self._fleet.processes}
        if self._fleet.zygote.running:
            found["zygote"] = Process.ZYGOTE
        return {AGENT: Process.MIGRATION} | found | dict.fromkeys(self._vcpus(), Process.VCPU)

    async def request(self, body: Any) -> dict[str, Any]:
        """The answer of `vmm.fault-inject`. Raises FlotillaError; nothing has been done then."""
        fault = parse(body, self.processes() | _awaited(body))
        pid = self._pid(fault.process)
        if fault.at.state:
            self._arm(fault)
        elif pid is None:
            raise StateError(f"process: there is no {fault.process} process now", "give at with a state")
        elif fault.process == "api":
            self._reactor.call_later(ANSWER_SECONDS, lambda: self._strike_later(fault))
        else:
            await self._strike(fault, pid)
        return {"process": fault.process, "pid": pid, "fault": str(fault.kind), "waits": _waits(fault)}

    # When ----------------------------------------------------------------------------------------------------------

    def _arm(self, fault: Fault) -> None:
        """Once, when this VMM's migration enters the state: before anything else happens in it, where a signal does."""

        def heard(_source: str, event: str, properties: dict[str, Any] | None) -> None:
            if event == "migration-phase" and properties is not None and properties["phase"] == fault.at.state:
                self._reactor.call_soon(lambda: self._events.subscribers.remove(heard))
                self._strike_later(fault)

        self._events.subscribers.append(heard)

    def _strike_later(self, fault: Fault) -> None:
        pid = self._pid(fault.process)
        if pid is None:
            log.warn(f"fault {fault.kind}: there is no {fault.process} process")
            self._tell("fault-missed", fault, 0)
        elif fault.kind in SIGNALS:
            try:
                self._signal(fault, pid)
            except HostError as error:  # a migration's event has brought us here, and is to go on
                self._missed(fault, pid, error)
        else:
            self._reactor.spawn(self._try(fault, pid), f"fault {fault.process}")

    async def _try(self, fault: Fault, pid: int) -> None:
        try:
            await self._strike(fault, pid)
        except FlotillaError as error:
            self._missed(fault, pid, error)

    def _missed(self, fault: Fault, pid: int, error: FlotillaError) -> None:
        log.warn(f"fault {fault.kind} of {fault.process}: {describe(error)}")
        self._tell("fault-missed", fault, pid)

    # How -----------------------------------------------------------------------------------------------------------

    def _pid(self, name: str) -> int | None:
        if name == "zygote":
            return self._fleet.zygote.pid if self._fleet.zygote.running else None
        if name in (vcpus := self._vcpus()):
            return vcpus[name] or None
        process = self._process(name)
        return process.pid if process is not None else None

    def _process(self, name: str) -> Running | None:
        return next((process for process in self._fleet.processes if process.name == name), None)

    async def _strike(self, fault: Fault, pid: int) -> None:
        if fault.kind in SIGNALS and not fault.at.message and not fault.at.request:
            self._signal(fault, pid)
            return
        process = self._process(fault.process)
        if process is None:
            raise WorkerLost(f"{fault.process} has just ended")
        if fault.kind is Kind.OUT_OF_MEMORY:
            _limit_memory(pid)
        what, value, options = words(fault)
        arguments: dict[str, Any] = {"what": what, "value": value} | ({"options": options} if options else {})
        before = self._words.get(pid)
        if not fault.at.message:  # that one stands beside whatever else there is
            self._words[pid] = fault
        try:
            await process.call(Verb.FAULT, CALL_SECONDS, **arguments)
        except WorkerLost:
            log.debug(f"{fault.process} died of {fault.kind} before it answered")
        except FlotillaError:  # refused: the one before is as it was
            if before is not None and self._words.get(pid) is fault:
                self._words[pid] = before
            raise
        self._tell("fault-injected", fault, pid)
        if fault.duration_ms and not fault.at.message:
            self._reactor.spawn(self._clear(process, pid, fault), f"clear {fault.process}")

    def _signal(self, fault: Fault, pid: int) -> None:
        """Its parent is this process, which reaps on this very thread: the pid can't be a stranger's."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise HostError(f"{fault.process} (pid {pid}): {error.strerror}") from error
        try:
            signal.pidfd_send_signal(pidfd, SIGNALS[fault.kind])
        except OSError as error:
            os.close(pidfd)
            raise HostError(f"{fault.process} (pid {pid}): {error.strerror}") from error
        self._tell("fault-injected", fault, pid)
        if fault.kind is Kind.STOP:
            self._stops[pid] = fault
        if fault.kind is Kind.STOP and fault.duration_ms:
            self._reactor.call_later(fault.duration_ms / 1000, lambda: self._continue(pidfd, pid, fault))
        else:
            os.close(pidfd)

    def _continue(self, pidfd: int, pid: int, fault: Fault) -> None:
        """SIGCONT, to the very process that was stopped, if it still lives."""
        try:
            if self._stops.get(pid) is fault:
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)

    async def _clear(self, process: Running, pid: int, fault: Fault) -> None:
        await sleep(self._reactor, fault.duration_ms / 1000)
        if self._words.get(pid) is not fault:
            return
        try:
            await process.call(Verb.FAULT, CALL_SECONDS, what="clear")
        except FlotillaError as error:
            log.debug(f"{fault.process}: {fault.kind} needed no end: {describe(error)}")

    def _tell(self, event: str, fault: Fault, pid: int) -> None:
        log.warn(f"{event}: {fault.kind} of {fault.process} (pid {pid})")
        properties = {"process": fault.process, "pid": pid, "fault": str(fault.kind), "waits": _waits(fault)}
        self._events.emit("vmm", event, properties)


def _awaited(body: Any) -> dict[str, Process]:
    """Who is to be struck in a state may come with that state, as a VM that arrives: the name tells its kind."""
    name = body.get("process") if isinstance(body, dict) else None
    at = body.get("at") if isinstance(body, dict) else None
    if not isinstance(name, str) or not isinstance(at, dict) or Point.STATE not in at:
        return {}
    kind = STEMS.get(name.rstrip("0123456789"))
    return {} if kind is None else {name: kind}


def words(fault: Fault) -> tuple[str, int, dict[str, int]]:
    """What the worker is told: its word, value and options."""
    at = fault.at
    if at.message:
        return f"{fault.kind}@{at.message}", fault.duration_ms, {}
    if fault.kind is Kind.KILL:
        return f"die-{at.step}", at.request, {}
    if fault.kind is Kind.CORRUPT:
        return ("corrupt-vhost" if fault.channel is Channel.VHOST_USER else "corrupt-control"), 0, {}
    if fault.kind in (Kind.SLOW, Kind.ERROR):
        wanted = {"seed": fault.seed, "after": max(0, at.request - 1), "count": fault.count}
        if fault.kind is Kind.ERROR:
            return "fail", fault.count, _given(wanted | _range(fault)) | {"fail": fault.rate}
        wanted |= {"spread_ms": fault.spread, "shape": list(Shape).index(fault.shape)}
        return "delay", fault.delay_ms, _given(wanted)
    if fault.kind is Kind.HANG:
        return "freeze", fault.duration_ms, {}
    return {Kind.DROP: "withhold", Kind.DUPLICATE: "repeat"}.get(fault.kind, str(fault.kind)), fault.count, {}


def _given(options: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in options.items() if value}


def _range(fault: Fault) -> dict[str, int]:
    first, last = fault.sectors or (0, 0)
    return {"first_sector": first, "last_sector": last}


def _waits(fault: Fault) -> str | None:
    """What an armed fault waits for; None: it has been done."""
    at = fault.at
    if at.request:
        return f"request {at.request}, step {at.step}" if fault.kind is Kind.KILL else f"request {at.request}"
    return f"state {at.state}" if at.state else f"message {at.message}" if at.message else None


def _limit_memory(pid: int) -> None:
    """Hardly more address space than it has: what it hoards comes to an end. Raises WorkerError."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize() + SLACK
        hard = resource.prlimit(pid, resource.RLIMIT_AS)[1]
        resource.prlimit(pid, resource.RLIMIT_AS, (size, hard))
    except (OSError, ValueError) as error:
        raise WorkerError(f"pid {pid}: its memory can't be limited: {error}") from error
