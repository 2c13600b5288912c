"""Golden states: what a save() of some version gave once, stored as tests/golden/KIND-vN.json.

    read, record    JSON that a human can read: bytes are {"$bytes": "7f03 00*62 80"}, long lists of numbers
                    {"$numbers": "1 2 0*62"}: a run of one value is shortened
    shape           the keys and types of a state, without its values
    explain         how two shapes differ, and what whoever changed a save() is to do about it

FLOTILLA_RECORD=1 lets the tests record a version that has no file yet. They never touch one that is there.
"""

from __future__ import annotations

import json
import os
from itertools import groupby
from pathlib import Path
from typing import Any

from controller.migration import codec
from shared.handover import Message
from shared.state_versions import StateKind

FOLDER = Path(__file__).resolve().parent / "golden"
RECORD = "FLOTILLA_RECORD"
BYTES, NUMBERS = "$bytes", "$numbers"
WIDTH = 110
SHORTEST_RUN, LONGEST_LIST = 8, 32
EMPTY = "(empty)"


def path_of(kind: StateKind, version: int) -> Path:
    return FOLDER / f"{kind.name}-v{version}.json"


def read(kind: StateKind, version: int) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(path_of(kind, version).read_text(), object_hook=_from_json)
    return golden


def record(kind: StateKind, golden: dict[str, Any]) -> None:
    """The present version, if that is asked for and not there yet."""
    path = path_of(kind, kind.version)
    if os.environ.get(RECORD) and not path.exists():
        path.write_text("\n".join(_lines(_to_json(golden))) + "\n")


def on_the_wire(state: dict[str, Any]) -> dict[str, Any]:
    """As it arrives at a destination: tuples have become lists."""
    arrived: dict[str, Any] = codec.decode(Message.STATE, codec.encode(Message.STATE, {"state": state}))["state"]
    return arrived


# JSON ------------------------------------------------------------------------------------------------------------


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {BYTES: _shorten([f"{byte:02x}" for byte in value], "")}
    if isinstance(value, dict):
        return {key: _to_json(below) for key, below in value.items()}
    if isinstance(value, list):
        if len(value) > LONGEST_LIST and all(type(item) is int for item in value):
            return {NUMBERS: _shorten([str(item) for item in value], " ")}
        return [_to_json(item) for item in value]
    return value


def _from_json(value: dict[str, Any]) -> Any:
    if list(value) == [BYTES]:
        return b"".join(bytes.fromhex(data) * count for data, count in _runs(value[BYTES]))
    if list(value) == [NUMBERS]:
        return [int(number) for number, count in _runs(value[NUMBERS]) for _ in range(count)]
    return value


def _shorten(items: list[str], between: str) -> str:
    """A run becomes `item*count`, what is no run stays together."""
    words: list[str] = []
    rest: list[str] = []
    for item, run in ((item, len(list(run))) for item, run in groupby(items)):
        if run < SHORTEST_RUN:
            rest += [item] * run
        else:
            words += [between.join(rest), f"{item}*{run}"]
            rest = []
    return " ".join(word for word in (*words, between.join(rest)) if word)


def _runs(text: str) -> list[tuple[str, int]]:
    words = (word.partition("*") for word in text.split())
    return [(item, int(count or 1)) for item, _, count in words]


def _lines(value: Any, indent: str = "") -> list[str]:
    """One line for what fits into one."""
    flat = json.dumps(value)
    if len(indent) + len(flat) <= WIDTH or not isinstance(value, dict | list) or not value:
        return [indent + flat]
    below = indent + " "
    items = [(f"{json.dumps(key)}: ", item) for key, item in value.items()] if isinstance(value, dict) else [
        ("", item) for item in value
    ]  # fmt: skip
    lines = []
    for name, item in items:
        first, *rest = _lines(item, below)
        lines += [below + name + first.strip(), *rest]
        lines[-1] += ","
    lines[-1] = lines[-1][:-1]
    brackets = "{}" if isinstance(value, dict) else "[]"
    return [indent + brackets[0], *lines, indent + brackets[1]]


# Shapes ----------------------------------------------------------------------------------------------------------


def shape(value: Any, where: str = "") -> set[str]:
    """A line for each place: `functions._disk0.transport.queues[].size: int`."""
    if isinstance(value, dict) and value:
        return {line for key, below in value.items() for line in shape(below, f"{where}.{key}".lstrip("."))}
    if isinstance(value, list) and value:
        return {line for below in value for line in shape(below, f"{where}[]")}
    if isinstance(value, list):
        return {f"{where}[]: {EMPTY}"}
    return {f"{where}: {'empty map' if value == {} else type(value).__name__}"}


def explain(kind: StateKind, saved: dict[str, Any], golden: dict[str, Any]) -> str:
    """Nothing, or how save() differs from the golden state and what to do. A list that is empty in one of them may
    hold anything in the other."""
    ours, theirs = shape(saved), shape(golden)
    empty = tuple(line.removesuffix(f": {EMPTY}") for line in ours ^ theirs if line.endswith(EMPTY))
    new, gone = (
        sorted(line for line in lines if not (empty and line.startswith(empty)))
        for lines in (ours - theirs, theirs - ours)
    )
    if not new and not gone:
        return ""
    changes = "".join([*(f"\n  + {line}" for line in new), *(f"\n  - {line}" for line in gone)])
    now, then = kind.version, kind.version + 1
    return (
        f"save() of {kind.name} does not give a state of version {now} as {path_of(kind, now).name} has it:{changes}\n"
        "A destination that reads this version can't load that. If the change is meant, append a step to "
        f"{kind.name}'s upgrades in shared/state_versions.py, which makes version {then} of a state of version {now}, "
        f"and run this test once with {RECORD}=1: it records {path_of(kind, then).name}. "
        "Leave the older files as they are."
    )
