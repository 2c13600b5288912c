"""Which fault hits whom and when: a pure function of the seed and of what the campaign was asked for.

Every draw comes from one generator in a fixed order, so the same seed gives the same schedule, and a longer campaign
begins with a shorter one's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from shared.faults import VICTIMS, Kind, Process

# How long what does not end by a death may last, unless supervision ends it before.
STANDSTILL_MS: Final = 3000
INDICES: Final = 1 << 16
# How often a kind of process is drawn. The API process takes a second of imports to be back, or ten on a busy host.
WEIGHTS: Final = dict.fromkeys(Process, 4) | {Process.API: 1}
DEFAULT_KINDS: Final = (Kind.KILL, Kind.STOP)
# A migration's agent is there only while one goes on: tests strike it at its states.
DEFAULT_PROCESSES: Final = tuple(process for process in Process if process is not Process.MIGRATION)


@dataclass(frozen=True, slots=True)
class Injection:
    """`at_s`: seconds after the campaign's start, at the earliest. `index`: modulo the number of processes of the kind.
    `fields` of vmm.fault-inject beside process and fault."""

    at_s: float
    process: Process
    index: int
    kind: Kind
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a campaign was asked for. `rate`: injections a second on average. It ends with `seconds` or `count`."""

    seed: int
    kinds: tuple[Kind, ...]
    processes: tuple[Process, ...]
    rate: float
    seconds: float | None = None
    count: int | None = None

    @property
    def pairs(self) -> list[tuple[Process, Kind]]:
        """What can be drawn: a kind of process by WEIGHTS, then one of the kinds of fault that fit it."""
        return [(process, kind) for process in self.processes for kind in self.kinds if process in VICTIMS[kind]]


def schedule(plan: Plan) -> list[Injection]:
    """Raises ValueError where nothing fits or nothing ends it."""
    if plan.seconds is None and plan.count is None:
        raise ValueError("a campaign needs an end")
    if not plan.pairs:
        raise ValueError("none of the kinds fits one of the processes")
    drawn = islice(_draw(plan), plan.count)
    if plan.seconds is None:
        return list(drawn)
    found = []
    for injection in drawn:
        if injection.at_s > plan.seconds:
            break
        found.append(injection)
    return found


def _draw(plan: Plan) -> Iterator[Injection]:
    source = random.Random(plan.seed)
    by_process: dict[Process, list[Kind]] = {}
    for process, kind in plan.pairs:
        by_process.setdefault(process, []).append(kind)
    processes, weights = list(by_process), [WEIGHTS[process] for process in by_process]
    now = 0.0
    while True:
        now += source.expovariate(plan.rate)
        process = source.choices(processes, weights)[0]
        kind = source.choice(by_process[process])
        yield Injection(round(now, 6), process, source.randrange(INDICES), kind, _fields(source, kind, process))


def _fields(source: random.Random, kind: Kind, process: Process) -> dict[str, Any]:
    """Every kind draws the same number of values, so that one kind's fields don't move another's draws."""
    small, large, seed = source.randint(1, 8), source.randint(1, 50), source.randrange(1 << 32)
    if kind in (Kind.STOP, Kind.HANG):
        return {"duration_ms": STANDSTILL_MS}
    if kind is Kind.SLOW and process is Process.BLK:
        spread = {"value": large, "spread": small, "shape": "normal", "seed": seed}
        return {**spread, "count": 100, "duration_ms": STANDSTILL_MS}
    if kind is Kind.SLOW:
        return {"value": small, "duration_ms": STANDSTILL_MS}
    if kind is Kind.ERROR:
        return {"rate": large / 1000, "count": small, "seed": seed, "duration_ms": STANDSTILL_MS}
    if kind in (Kind.DROP, Kind.DUPLICATE):
        return {"count": small}
    return {}
