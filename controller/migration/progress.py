"""Where a migration stands: phases with checked transitions, events, and what `vm.migration-progress` answers.

    send       CONNECTING
      local       ▶ BUILDING ▶ PAUSING ▶ SAVING ▶ OFFERED ▶ HANDED_OVER ▶ COMPLETED
      remote      ▶ PROPOSING ▶ COPYING ▶ PAUSING ▶ SAVING ▶ FINAL_PASS ▶ PREPARING ▶ COMMITTED ▶ COMPLETED
                    any but the last ──▶ SETTLING ──▶ RESUMING ──▶ FAILED | CANCELLED
                                            └──▶ COMPLETED | LOST
                    COMMITTED ──▶ IN_DOUBT ──▶ COMPLETED | SETTLING
    receive    LISTENING ▶ GREETING ▶ READY        (▶ LISTENING, after a peer that only asked for another's outcome)
      local       ▶ BUILDING ▶ BUILT ▶ LOADING ▶ CLAIMED ▶ RUNNING ▶ COMPLETED
      remote      ▶ CHECKING ▶ BUILDING ▶ BUILT ▶ LOADING ▶ PREPARED ▶ COMMITTED ▶ RUNNING ▶ COMPLETED
                    any but the last ──▶ FAILED | CANCELLED

OFFERED: the word says so, nothing has been sent. HANDED_OVER: the kernel has the whole state. SETTLING: something went
wrong and the word decides whose the guest is; it lasts while the destination holds the word at CLAIMED. COPYING: RAM
moves while the guest runs, round after round. PREPARING: the destination has everything and loads. COMMITTED: it was
told to go on. IN_DOUBT: and has not answered (controller/migration/commit.py).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final

from controller.events import EventMonitor
from shared import log
from shared.errors import FlotillaError, MigrationCancelled, chain


class Direction(StrEnum):
    SEND = "send"
    RECEIVE = "receive"


class Phase(StrEnum):
    IDLE = "idle"
    CONNECTING = "connecting"
    LISTENING = "listening"
    GREETING = "greeting"
    READY = "ready"
    BUILDING = "building"
    BUILT = "built"
    PAUSING = "pausing"
    SAVING = "saving"
    OFFERED = "offered"
    HANDED_OVER = "handed-over"
    LOADING = "loading"
    CLAIMED = "claimed"
    RUNNING = "running"
    PROPOSING = "proposing"
    CHECKING = "checking"
    COPYING = "copying"
    FINAL_PASS = "final-pass"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COMMITTED = "committed"
    IN_DOUBT = "in-doubt"
    SETTLING = "settling"
    RESUMING = "resuming"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


_SEND: Final = (
    *(Phase.IDLE, Phase.CONNECTING, Phase.BUILDING, Phase.PAUSING, Phase.SAVING, Phase.OFFERED),
    *(Phase.HANDED_OVER, Phase.COMPLETED),
)
_SEND_REMOTE: Final = (
    *(Phase.CONNECTING, Phase.PROPOSING, Phase.COPYING, Phase.PAUSING, Phase.SAVING, Phase.FINAL_PASS),
    *(Phase.PREPARING, Phase.COMMITTED, Phase.COMPLETED),
)
_RECEIVE: Final = (
    *(Phase.IDLE, Phase.LISTENING, Phase.GREETING, Phase.READY, Phase.BUILDING, Phase.BUILT, Phase.LOADING),
    *(Phase.CLAIMED, Phase.RUNNING, Phase.COMPLETED),
)
_RECEIVE_REMOTE: Final = (
    *(Phase.READY, Phase.CHECKING, Phase.BUILDING, Phase.BUILT, Phase.LOADING),
    *(Phase.PREPARED, Phase.COMMITTED, Phase.RUNNING, Phase.COMPLETED),
)
Table = dict[Phase, frozenset[Phase]]


def _table(paths: tuple[tuple[Phase, ...], ...], detours: frozenset[Phase]) -> Table:
    """The straight ways, and from each of their phases but the last to the detours."""
    table: Table = {}
    for phase, successor in (pair for path in paths for pair in pairwise(path)):
        table[phase] = table.get(phase, frozenset()) | detours | {successor}
    return table


def _send() -> Table:
    table = _table((_SEND, _SEND_REMOTE), frozenset({Phase.SETTLING}))
    # A VM that was paused already needs no pausing.
    table[Phase.BUILDING] |= {Phase.SAVING}
    table[Phase.COPYING] |= {Phase.SAVING}
    table[Phase.COMMITTED] |= {Phase.IN_DOUBT}
    return table | {
        Phase.IN_DOUBT: frozenset({Phase.COMPLETED, Phase.SETTLING}),
        Phase.SETTLING: frozenset({Phase.RESUMING, Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED, Phase.LOST}),
        Phase.RESUMING: frozenset({Phase.FAILED, Phase.CANCELLED}),
    }


def _receive() -> Table:
    table = _table((_RECEIVE, _RECEIVE_REMOTE), frozenset({Phase.FAILED, Phase.CANCELLED}))
    table[Phase.READY] |= {Phase.LISTENING}
    return table


SUCCESSORS: Final[dict[Direction, Table]] = {
    Direction.SEND: _send(),
    Direction.RECEIVE: _receive(),
}
ENDED: Final = {
    Phase.IDLE: "none",
    Phase.COMPLETED: "completed",
    Phase.CANCELLED: "cancelled",
    Phase.FAILED: "failed",
    Phase.LOST: "failed",
}
_EVENTS: Final = {
    Direction.SEND: ("migration-finished", "migration-failed"),
    Direction.RECEIVE: ("migration-receive-finished", "migration-receive-failed"),
}


MAX_FIGURES: Final = 128
MAX_NAME: Final = 64  # characters
MAX_DEPTH: Final = 4


@dataclass(slots=True)
class Transfer:
    """RAM's way to another host. Pages have 4096 bytes; `remaining_bytes` is what is known to be left."""

    round: int = 0
    ram_bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    page_bytes: int = 0  # in the stream, lists included
    remaining_bytes: int = 0
    dirty_bytes_per_s: float = 0.0
    throughput_bytes_per_s: float = 0.0
    estimated_downtime_ms: float | None = None
    time_left_s: float | None = None


class Progress:
    """The record of one migration. Times in milliseconds."""

    def __init__(self, events: EventMonitor, direction: Direction) -> None:
        self._events = events
        self.direction = direction
        self.phase = Phase.IDLE
        self.breakdown: dict[str, Any] = {}
        self.downtime_ms: float | None = None
        self.bytes_transferred = 0
        self.fds_passed = 0
        self.transfer: Transfer | None = None  # of a remote migration
        self._error: FlotillaError | None = None
        self._began = time.monotonic()
        self._total_ms: float | None = None

    @property
    def ongoing(self) -> bool:
        return self.phase not in ENDED

    def to(self, phase: Phase) -> None:
        """Enter a phase; subscribers of the events run before this returns."""
        assert phase in SUCCESSORS[self.direction][self.phase], f"{self.direction}: {self.phase} to {phase}"
        self.phase = phase
        self._events.emit("vm", "migration-phase", {"direction": str(self.direction), "phase": str(phase)})

    def emit(self, event: str, properties: dict[str, Any] | None = None) -> None:
        self._events.emit("vm", event, properties)

    def succeed(self) -> None:
        self._total_ms = elapsed_ms(self._began)
        if self.direction is Direction.SEND:  # nobody can ask the source: it ends
            paused = "it was paused" if self.downtime_ms is None else f"downtime {self.downtime_ms:.0f} ms"
            rounds = "" if self.transfer is None else f", {self.transfer.round} rounds"
            log.info(f"migration: moved in {self._total_ms / 1e3:.2f} s, {paused}{rounds}")
        self.to(Phase.COMPLETED)
        self.emit(_EVENTS[self.direction][0])

    def fail(self, error: FlotillaError, phase: Phase | None = None) -> None:
        self._error = error
        self._total_ms = elapsed_ms(self._began)
        self.to(phase or (Phase.CANCELLED if isinstance(error, MigrationCancelled) else Phase.FAILED))
        self.emit(_EVENTS[self.direction][1])

    def doubt(self, error: FlotillaError) -> None:
        """The guest is here, paused, and may run there."""
        self._error = error
        self.to(Phase.IN_DOUBT)
        self.emit("migration-in-doubt")

    def report(self) -> dict[str, Any]:
        """What the API answers. `error` is a list of messages, outermost first, or None."""
        transfer = {} if self.transfer is None else asdict(self.transfer)
        return {
            "state": "in-doubt" if self.phase is Phase.IN_DOUBT else ENDED.get(self.phase, "ongoing"),
            "phase": str(self.phase),
            "direction": str(self.direction),
            "bytes_transferred": self.bytes_transferred + transfer.get("page_bytes", 0),
            "fds_passed": self.fds_passed,
            "downtime_ms": self.downtime_ms,
            "total_ms": elapsed_ms(self._began) if self._total_ms is None else self._total_ms,
            "breakdown": self.breakdown,
            "error": None if self._error is None else chain(self._error),
            **transfer,
        }


def elapsed_ms(began: float, ended: float | None = None) -> float:
    """Milliseconds from one reading of CLOCK_MONOTONIC to another (now)."""
    return round(((time.monotonic() if ended is None else ended) - began) * 1000, 3)


def figures(given: object) -> dict[str, Any]:
    """Of a breakdown that comes from a peer, or goes to one: numbers by name, and maps of them, as far as they are that
    and not too many."""
    left = MAX_FIGURES

    def kept(values: dict[Any, Any], depth: int) -> dict[str, Any]:
        nonlocal left
        found: dict[str, Any] = {}
        for name, value in values.items():
            if left == 0 or not isinstance(name, str) or len(name) > MAX_NAME:
                continue
            if isinstance(value, dict) and depth < MAX_DEPTH:
                left -= 1
                found[name] = kept(value, depth + 1)
            elif type(value) in (int, float) and math.isfinite(value):
                left -= 1
                found[name] = value
        return found

    return kept(given, 1) if isinstance(given, dict) else {}
