"""A fault as `vmm.fault-inject` describes it, checked.

    {"process": "_disk0", "fault": "slow", "at": {"request": 100}, "value": 20, "spread": 5, "shape": "normal", …}

VICTIMS (shared/faults.py) says which fault makes sense for which kind of process, KINDS which fields and points it has.
Everything else is refused with the field's name. Raises ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from controller.migration.progress import Phase
from shared.errors import ConfigError
from shared.faults import DEVICES, RINGS, VICTIMS, Kind, Process
from shared.messages import Verb
from shared.native_ring import Step

REQUEST: Final = "vmm.fault-inject"
MAX_MS: Final = 3_600_000
MAX_COUNT: Final = (1 << 31) - 1
MAX_SECTOR: Final = (1 << 55) - 1


class Shape(StrEnum):
    """How delays are spread; the numbers are enum blk_shape's."""

    FIXED = "fixed"
    UNIFORM = "uniform"
    NORMAL = "normal"


class Channel(StrEnum):
    """Where a corrupt message is sent."""

    VHOST_USER = "vhost-user"
    CONTROL = "control"


class Point(StrEnum):
    """Keys of `at`."""

    STATE = "state"  # a phase of this VMM's migration
    MESSAGE = "message"  # a request on the control channel, before it is carried out
    REQUEST = "request"  # the n-th request of a queue
    STEP = "step"  # where in that request


@dataclass(frozen=True, slots=True)
class Rule:
    """Of one kind of fault: its fields beside process, fault and at, and the points that it has."""

    fields: tuple[str, ...] = ()
    points: tuple[Point, ...] = (Point.STATE,)


KINDS: Final[dict[Kind, Rule]] = {
    Kind.KILL: Rule(points=tuple(Point)),
    Kind.STOP: Rule(("duration_ms",)),
    Kind.HANG: Rule(("duration_ms",), (Point.STATE, Point.MESSAGE)),
    Kind.SLOW: Rule(("value", "spread", "shape", "seed", "count", "duration_ms"), (Point.STATE, Point.REQUEST)),
    Kind.ERROR: Rule(("rate", "sectors", "seed", "count", "duration_ms"), (Point.STATE, Point.REQUEST)),
    Kind.CORRUPT: Rule(("value",)),
    Kind.DROP: Rule(("count",)),
    Kind.DUPLICATE: Rule(("count",)),
    Kind.OUT_OF_MEMORY: Rule(),
}
_COMMON: Final = ("process", "fault", "at")
_FIELDS: Final = (*_COMMON, "value", "spread", "shape", "rate", "sectors", "seed", "count", "duration_ms")
# At which a worker can be struck by a message: the contract's, and what some kinds have beside it.
MESSAGES: Final = tuple(
    str(verb)
    for verb in (
        *(Verb.HEARTBEAT, Verb.QUIESCE, Verb.SAVE, Verb.LOAD, Verb.RESUME, Verb.STATS, Verb.LOG_LEVEL),
        *(Verb.FLUSH, Verb.ANNOUNCE),
    )
)
STEPS: Final = tuple(step.name.lower() for step in Step if step)


@dataclass(frozen=True, slots=True)
class At:
    """At most one of state, message and request; none of them: at once. `request` counts from 1, per queue."""

    state: str = ""
    message: str = ""
    request: int = 0
    step: str = "marked"


@dataclass(frozen=True, slots=True)
class Fault:
    """`value`: of slow the delay in ms, of corrupt-protocol the channel. `rate`: in how many of a million requests.
    `count`: how many requests or notifications, 0: all. `duration_ms`: 0: nobody ends it but supervision."""

    process: str
    kind: Kind
    at: At = At()
    delay_ms: int = 0
    channel: Channel = Channel.VHOST_USER
    spread: int = 0
    shape: Shape = Shape.FIXED
    rate: int = 1_000_000
    sectors: tuple[int, int] | None = None
    seed: int = 0
    count: int = 0
    duration_ms: int = 0


def parse(body: Any, processes: Mapping[str, Process]) -> Fault:
    """`processes`: those that there are, by name."""
    if not isinstance(body, dict):
        raise ConfigError(f"{REQUEST}: the body is not an object")
    for field in body:
        if field not in _FIELDS:
            raise ConfigError(f"{REQUEST}: unknown field {field}", f"known: {', '.join(_FIELDS)}")
    name, target = _process(body, processes)
    kind = _word(body, "fault", Kind)
    rule = KINDS[kind]
    if target not in VICTIMS[kind]:
        whose = ", ".join(sorted(VICTIMS[kind]))
        raise ConfigError(f"{REQUEST}: fault: {kind} makes no sense for a {target} process", f"it is for: {whose}")
    for field in body:
        if field not in _COMMON and field not in rule.fields:
            allowed = ", ".join(rule.fields) or "none"
            raise ConfigError(f"{REQUEST}: {field}: {kind} has no such field", f"beside process and at: {allowed}")
    fault = Fault(
        name,
        kind,
        _at(body.get("at"), kind, target),
        delay_ms=_number(body, "value", 1, MAX_MS, required=True) if kind is Kind.SLOW else 0,
        channel=_word(body, "value", Channel) if "value" in body and kind is Kind.CORRUPT else Channel.VHOST_USER,
        spread=_number(body, "spread", 0, MAX_MS),
        shape=_word(body, "shape", Shape) if "shape" in body else Shape.FIXED,
        rate=_rate(body),
        sectors=_sectors(body),
        seed=_number(body, "seed", 0, (1 << 64) - 1),
        count=_number(body, "count", 0, MAX_COUNT),
        duration_ms=_number(body, "duration_ms", 0, MAX_MS),
    )
    _check(fault, body, target)
    return fault


def _check(fault: Fault, body: Mapping[str, Any], target: Process) -> None:
    """What depends on more than one field."""
    if fault.kind in (Kind.DROP, Kind.DUPLICATE) and not fault.count:
        raise ConfigError(f"{REQUEST}: count is missing", "of how many notifications, at least 1")
    if fault.spread and fault.shape is Shape.FIXED:
        raise ConfigError(f"{REQUEST}: spread: a fixed delay has none", "add shape uniform or normal")
    if fault.shape is not Shape.FIXED and not fault.spread:
        raise ConfigError(f"{REQUEST}: shape: a {fault.shape} delay needs spread, in ms")
    if fault.kind is Kind.SLOW and target is not Process.BLK:
        for field in ("spread", "shape", "seed", "count"):
            if field in body:
                raise ConfigError(f"{REQUEST}: {field}: only a blk process has it", "leave it out")
        if fault.at.request:
            raise ConfigError(f"{REQUEST}: at: request: only a blk process is slow from a request on")


def _process(body: Mapping[str, Any], processes: Mapping[str, Process]) -> tuple[str, Process]:
    name = body.get("process")
    there = f"there are: {', '.join(sorted(processes))}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{REQUEST}: process is missing", there)
    if name == "controller":
        raise ConfigError(f"{REQUEST}: process: the controller's end is the VM's", there)
    if name not in processes:
        raise ConfigError(f"{REQUEST}: process: there is no {name}", there)
    return name, processes[name]


def _word(body: Mapping[str, Any], field: str, words: Any) -> Any:
    value = body.get(field)
    known = ", ".join(words)
    if value is None:
        raise ConfigError(f"{REQUEST}: {field} is missing", f"one of {known}")
    if not isinstance(value, str) or value not in list(words):
        raise ConfigError(f"{REQUEST}: {field}: unknown {field} {value!r}", f"one of {known}")
    return words(value)


def _number(
    body: Mapping[str, Any], field: str, least: int, most: int, default: int = 0, *, required: bool = False
) -> int:
    value = body.get(field)
    if value is None and not required:
        return default
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{REQUEST}: {field}: {value!r} is no whole number from {least} to {most}")
    return value


def _rate(body: Mapping[str, Any]) -> int:
    """0 < rate <= 1, as parts of a million."""
    value = body.get("rate", 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"{REQUEST}: rate: {value!r} is no part of the requests", "above 0, at most 1")
    return max(1, round(value * 1_000_000))


def _sectors(body: Mapping[str, Any]) -> tuple[int, int] | None:
    value = body.get("sectors")
    if value is None:
        return None
    fits = isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 <= n <= MAX_SECTOR for n in value)
    if not fits or value[0] > value[1] or not value[1]:
        raise ConfigError(f"{REQUEST}: sectors: {value!r} is no range", "[first, last], in units of 512 bytes")
    return value[0], value[1]


def _at(value: Any, kind: Kind, target: Process) -> At:
    if value is None:
        return At()
    points = [str(point) for point in KINDS[kind].points]
    if not isinstance(value, dict) or len(value.keys() - {Point.STEP}) != 1:
        raise ConfigError(f"{REQUEST}: at is one of {', '.join(p for p in points if p != Point.STEP)} with its value")
    for point in value:
        if point not in list(Point):
            raise ConfigError(f"{REQUEST}: at: unknown point {point}", f"{kind} has: {', '.join(points)}")
        if point not in points:
            raise ConfigError(f"{REQUEST}: at: {kind} can't wait for a {point}", f"{kind} has: {', '.join(points)}")
    if Point.STATE in value:
        if Point.STEP in value:
            raise ConfigError(f"{REQUEST}: at: step belongs to a request")
        return At(state=str(_word(value, "state", Phase)))
    if Point.MESSAGE in value:
        return At(message=_message(value, target))
    if target not in RINGS:
        raise ConfigError(f"{REQUEST}: at: {target} processes have no requests to count", "blk and net have")
    step = value.get("step", "marked")
    if step not in STEPS:
        raise ConfigError(f"{REQUEST}: at: unknown step {step!r}", f"one of {', '.join(STEPS)}")
    return At(request=_number(value, "request", 1, MAX_COUNT, required=True), step=step)


def _message(value: Mapping[str, Any], target: Process) -> str:
    message = value["message"]
    if target not in DEVICES:
        raise ConfigError(f"{REQUEST}: at: {target} processes are not asked by messages", "blk, net and console are")
    if Point.STEP in value:
        raise ConfigError(f"{REQUEST}: at: step belongs to a request")
    if message not in MESSAGES:
        raise ConfigError(f"{REQUEST}: at: unknown message {message!r}", f"one of {', '.join(MESSAGES)}")
    return str(message)
