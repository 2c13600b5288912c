"""A worker's counters, carried over its death: what `vm.counters` tells never goes backwards.

A killed process takes its counters with it. What it last told (with every heartbeat, and whenever somebody asked) is
kept and added to its successor's, so at most the counts since the last heartbeat are missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import ProtocolError
from shared.typed import Final

# What describes the present and not the past: only the living one's counts.
PRESENT: Final = ("inflight", "broken_queues", "poisoned_sector")
NONE_YET: Final = (1 << 64) - 1  # a latency before the first request
MOST: Final = (1 << 63) - 1  # of what is added up
MOST_NAMES: Final = 256
MOST_LETTERS: Final = 64


def checked(told: object) -> dict[str, int]:
    """What a worker tells of itself, names and numbers. Raises ProtocolError: anything else, added up later, would keep
    the worker's successors from starting, or the sums from being told."""
    if not isinstance(told, dict):
        raise ProtocolError("a worker's counters are no map")
    if len(told) > MOST_NAMES:
        raise ProtocolError(f"a worker with {len(told)} counters (limit {MOST_NAMES})")
    for name, value in told.items():
        if not isinstance(name, str) or type(value) is not int:
            raise ProtocolError(f"a worker's counter {str(name)[:40]!r} is no number")
        if len(name) > MOST_LETTERS:
            raise ProtocolError(f"a worker's counter {name[:40]!r} has {len(name)} letters (limit {MOST_LETTERS})")
        if not 0 <= value <= (MOST if _is_sum(name) else NONE_YET):
            raise ProtocolError(f"a worker's counter {name[:40]!r} is {value}")
    return told


def _is_sum(name: str) -> bool:
    return name not in PRESENT and not name.endswith(("_min", "_max", "_avg"))


def merge(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Counters of a worker and of those before it. By name: `*_min`, `*_max`, `*_avg` (weighted by `*_ops`), sums.

    As many names as one worker may have: those that the present one does not know go first.
    """
    carried = [name for name in before if name not in PRESENT and name not in now][: MOST_NAMES - len(now)]
    merged = {name: before[name] for name in carried}
    for name, value in now.items():
        if name in PRESENT or name not in before:
            merged[name] = value
        elif name.endswith("_min") or (name.endswith(("_max", "_avg")) and NONE_YET in (before[name], value)):
            merged[name] = min(before[name], value)
        elif name.endswith("_max"):
            merged[name] = max(before[name], value)
        elif name.endswith("_avg"):
            merged[name] = _average(name, before, now)
        else:
            merged[name] = min(before[name] + value, MOST)
    return merged


def _average(name: str, before: Mapping[str, int], now: Mapping[str, int]) -> int:
    ops = name.removesuffix("_latency_avg") + "_ops"
    first, second = before.get(ops, 0), now.get(ops, 0)
    total = first + second
    return (before[name] * first + now[name] * second) // total if total else now[name]
