"""Where a migration stands: phases with checked transitions, events, and what `vm.migration-progress` answers.

    send       CONNECTING ▶ BUILDING ▶ PAUSING ▶ SAVING ▶ OFFERED ▶ HANDED_OVER ▶ COMPLETED
                    any but the last ──▶ SETTLING ──▶ RESUMING ──▶ FAILED | CANCELLED
                                            └──▶ COMPLETED | LOST
    receive    LISTENING ▶ GREETING ▶ READY ▶ BUILDING ▶ BUILT ▶ LOADING ▶ CLAIMED ▶ RUNNING ▶ COMPLETED
                    any but the last ──▶ FAILED | CANCELLED

OFFERED: the word says so, nothing has been sent. HANDED_OVER: the kernel has the whole state. SETTLING: something went
wrong and the word decides whose the guest is; it lasts while the destination holds the word at CLAIMED.
"""

from __future__ import annotations

import time
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final

from controller.events import EventMonitor
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
_RECEIVE: Final = (
    *(Phase.IDLE, Phase.LISTENING, Phase.GREETING, Phase.READY, Phase.BUILDING, Phase.BUILT, Phase.LOADING),
    *(Phase.CLAIMED, Phase.RUNNING, Phase.COMPLETED),
)


def _table(path: tuple[Phase, ...], detours: frozenset[Phase]) -> dict[Phase, frozenset[Phase]]:
    """The straight way, and from each of its phases but the last to the detours."""
    return {phase: detours | {successor} for phase, successor in pairwise(path)}


SUCCESSORS: Final[dict[Direction, dict[Phase, frozenset[Phase]]]] = {
    Direction.SEND: {
        **_table(_SEND, frozenset({Phase.SETTLING})),
        # A VM that was paused already needs no pausing.
        Phase.BUILDING: frozenset({Phase.PAUSING, Phase.SAVING, Phase.SETTLING}),
        Phase.SETTLING: frozenset({Phase.RESUMING, Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED, Phase.LOST}),
        Phase.RESUMING: frozenset({Phase.FAILED, Phase.CANCELLED}),
    },
    Direction.RECEIVE: _table(_RECEIVE, frozenset({Phase.FAILED, Phase.CANCELLED})),
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

    def emit(self, event: str) -> None:
        self._events.emit("vm", event)

    def succeed(self) -> None:
        self._total_ms = elapsed_ms(self._began)
        self.to(Phase.COMPLETED)
        self.emit(_EVENTS[self.direction][0])

    def fail(self, error: FlotillaError, phase: Phase | None = None) -> None:
        self._error = error
        self._total_ms = elapsed_ms(self._began)
        self.to(phase or (Phase.CANCELLED if isinstance(error, MigrationCancelled) else Phase.FAILED))
        self.emit(_EVENTS[self.direction][1])

    def report(self) -> dict[str, Any]:
        """What the API answers. `error` is a list of messages, outermost first, or None."""
        return {
            "state": ENDED.get(self.phase, "ongoing"),
            "phase": str(self.phase),
            "direction": str(self.direction),
            "bytes_transferred": self.bytes_transferred,
            "fds_passed": self.fds_passed,
            "downtime_ms": self.downtime_ms,
            "total_ms": elapsed_ms(self._began) if self._total_ms is None else self._total_ms,
            "breakdown": self.breakdown,
            "error": None if self._error is None else chain(self._error),
        }


def elapsed_ms(began: float, ended: float | None = None) -> float:
    """Milliseconds from one reading of CLOCK_MONOTONIC to another (now)."""
    return round(((time.monotonic() if ended is None else ended) - began) * 1000, 3)
