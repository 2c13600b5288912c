"""Hangs: who lives and does nothing. One timer for all processes of the VM; a VM at rest wakes once a second.

    every PERIOD  ask each serving worker for its heartbeat, and look at each process's state in /proc
    GRACE later   judge, when all answers that have come have been read

| what is seen | hung after |
|---|---|
| stopped (SIGSTOP; a debugger's stop is left alone) | at the second look in a row |
| no answer, its threads asleep | `answer` of its kind |
| the same epoch again: a ring or I/O thread took no turn though nudged, and is in no system call | the same |
| either, with a thread of it, or of our own messaging, that would run or waits for a page | PATIENCE |

A look at threads takes time, on a slow host too much: what came meanwhile is read before anybody is ended, and one
whose rings seem to stand still is asked once more.

Not judged: a worker that carries out something for the controller (a quiesce waits for the disk, as long as that
takes), and one whose main thread is held by the kernel. A late timer of our own is the host's fault and is forgiven.
A worker that was replaced as hung within the last minute gets twice the time, and so on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable

from controller.fleet import Fleet, Process, ProcessState
from controller.statistics import checked
from controller.supervision import Cause, process_state, thread_states
from shared import log
from shared.errors import FlotillaError, ProtocolError
from shared.reactor import Reactor, Timer, describe
from shared.records import Record, field
from shared.typed import Any, Final

GRACE: Final = 0.02
PATIENCE: Final = 10.0
MOST: Final = 30.0


class Limits(Record):
    """Seconds. `answer`: by kind, how long a worker may stay silent after it was asked.

    One second for every kind: a ring thread does nothing that takes longer in user space, and what the kernel holds
    (a slow disk, a full TAP) is not counted. So a hang is noticed within period + answer.
    """

    period: float = 1.0
    answer: dict[str, float] = field(default_factory=lambda: {"blk": 1.0, "net": 1.0, "console": 1.0})
    other: float = 1.0

    def of(self, kind: str) -> float:
        return self.answer.get(kind, self.other)


class Patient(Record):
    """A process that is watched for being stopped."""

    kind: str
    name: str
    pid: int
    condemn: Callable[[Cause, str], None]


class Watch(Record, frozen=False):
    """What is known of one process."""

    stopped: float | None = None  # when it was first seen so
    asked: float | None = None  # the heartbeat that has not been answered
    answered: float = 0.0
    epoch: int = -1
    still: float | None = None  # since when its epoch has not moved
    doubted: bool = False  # it has been asked once more


class Watchdog:
    """See the module. `fleet.patients` are those that are not in the fleet's list (vCPUs)."""

    def __init__(self, reactor: Reactor, fleet: Fleet, limits: Limits | None = None) -> None:
        self._reactor = reactor
        self._fleet = fleet
        self._limits = limits or Limits()
        self._watches: dict[int, Watch] = {}
        self._timer: Timer | None = None
        self._due = 0.0
        self._watching = False

    def start(self) -> None:
        self._watching = True
        self._rest(self._limits.period)

    def stop(self) -> None:
        self._watching = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rest(self, seconds: float) -> None:
        self._wait(seconds, self._tick)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._due = time.monotonic() + seconds
        self._timer = self._reactor.call_later(seconds, then)

    def _tick(self) -> None:
        self._forgive(time.monotonic() - self._due)
        self._wait(GRACE, self._settle)

    def _settle(self) -> None:
        self._forgive(time.monotonic() - self._due)
        self._reactor.call_settled(self._judge)

    def _forgive(self, late: float) -> None:
        for watch in self._watches.values():  # whoever was asked has not had this time
            watch.asked = watch.asked + late if watch.asked is not None else None
            watch.still = watch.still + late if watch.still is not None else None
            watch.stopped = watch.stopped + late if watch.stopped is not None else None

    def _judge(self) -> None:
        if not self._watching:
            return
        self._timer = None
        seen: dict[int, Watch] = {}
        for patient in self._patients():
            seen[patient.pid] = self._watches.get(patient.pid) or Watch()
            self._look(patient, seen[patient.pid])
        self._watches = seen
        for process in list(self._fleet.processes):
            if process.serving and process.state is ProcessState.RUNNING:
                self._question(process, seen.setdefault(process.pid, Watch()))
        self._rest(max(0.0, self._limits.period - GRACE))
        self._fleet.renew_zygote()

    def _patients(self) -> Iterable[Patient]:
        for process in list(self._fleet.processes):
            if process.state in (ProcessState.STARTING, ProcessState.RUNNING):
                yield Patient(process.kind, process.name, process.pid, self._condemner(process))
        zygote = self._fleet.zygote
        if zygote.running:
            yield Patient("zygote", "zygote", zygote.pid, self._fleet.condemn_zygote)
        for more in self._fleet.patients:
            yield from more()

    def _condemner(self, process: Process) -> Callable[[Cause, str], None]:
        return lambda cause, reason: self._fleet.condemn(process, cause, reason)

    # Stopped -----------------------------------------------------------------------------------------------------

    def _look(self, patient: Patient, watch: Watch) -> None:
        now = time.monotonic()
        if process_state(patient.pid)[0] != "T":
            watch.stopped = None
        elif watch.stopped is None:
            watch.stopped = now
        elif now - watch.stopped > self._limits.period / 2:
            patient.condemn(Cause.HUNG, "stopped by a signal")

    # Silent, or without progress ---------------------------------------------------------------------------------

    def _question(self, process: Process, watch: Watch) -> None:
        if watch.asked is None:
            watch.asked = time.monotonic()
            self._reactor.spawn(self._ask(process, watch), f"heartbeat {process.name}")
            return
        # One that is stopped is _look's to judge, and has its time to answer when it goes on. One that is busy for us
        # may take as long as a disk; it answers when that is done.
        if watch.stopped is not None or process.busy():
            watch.asked = time.monotonic()
        silent = time.monotonic() - watch.asked
        if silent >= self._patience(process) and not self._held(process, silent):
            reason = f"no heartbeat for {silent:.1f} s"
            self._reactor.call_settled(lambda: self._give_up(process, watch, reason))

    def _give_up(self, process: Process, watch: Watch, reason: str) -> None:
        """Unless its answer has come while its threads were looked at."""
        if watch.asked is not None and self._watching:
            self._fleet.condemn(process, Cause.HUNG, reason, since=watch.answered or watch.asked)

    async def _ask(self, process: Process, watch: Watch) -> None:
        busy = process.busy()
        try:
            answer = await process.call("heartbeat", None)
        except ProtocolError as error:
            self._fleet.condemn(process, Cause.REFUSED, describe(error))
            return
        except FlotillaError as error:  # it is dead, and will be reported so
            log.debug(f"{process.name}: {describe(error)}")
            return
        watch.asked, watch.answered = None, time.monotonic()
        if not _well_formed(answer):
            self._fleet.condemn(process, Cause.REFUSED, f"a heartbeat that is none: {str(answer)[:100]}")
            return
        process.stats = answer.get("stats") or process.stats
        process.on_heartbeat()
        self._progress(process, watch, answer["epoch"], busy or process.busy())

    def _progress(self, process: Process, watch: Watch, epoch: int, busy: bool) -> None:
        now = time.monotonic()
        if epoch != watch.epoch or busy:
            watch.epoch, watch.still, watch.doubted = epoch, now, False
            return
        still = now - (watch.still if watch.still is not None else now)
        # Asked once a period: what did not move from one answer to the next had a whole one.
        if still < max(self._patience(process) - 2 * GRACE, 0) or self._held(process, still, main=False):
            watch.doubted = False
            return
        if watch.doubted:
            self._fleet.condemn(process, Cause.HUNG, f"its rings took no turn for {still:.1f} s", since=watch.still)
        else:  # a turn that was taken after the answer was made is in the next one
            watch.doubted, watch.asked = True, now
            self._reactor.spawn(self._ask(process, watch), f"heartbeat {process.name}")

    def _patience(self, process: Process) -> float:
        hung = self._fleet.supervision.often(process.kind, process.name, Cause.HUNG)
        return min(self._limits.of(process.kind) * float(2**hung), MOST)

    def _held(self, process: Process, seconds: float, *, main: bool = True) -> bool:
        if main and process_state(process.pid)[0] in "Dt":
            return True
        if seconds >= PATIENCE:
            return False
        # The question goes from a thread of ours to theirs, the answer back: twice, so that it can't slip by.
        return any(
            "R" in (theirs := thread_states(process.pid))
            or "D" in theirs
            or "R" in thread_states(os.getpid(), but=threading.get_native_id())
            for _ in range(2)
        )


def _well_formed(answer: dict[str, Any]) -> bool:
    try:
        checked(answer.get("stats", {}))
    except ProtocolError:
        return False
    return type(answer.get("epoch")) is int
