"""controller.statistics: what a worker may say of itself, and that a lying one costs nothing beyond its own figures."""

from __future__ import annotations

import msgpack
import pytest

from controller.statistics import MOST, MOST_LETTERS, MOST_NAMES, NONE_YET, checked, merge
from shared.errors import ProtocolError


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {1: 1},
        {"reads": "1"},
        {"reads": 1.5},
        {"reads": True},
        {"reads": -1},
        {"reads": MOST + 1},
        {"read_latency_min": -1},
        {"read_latency_sum": NONE_YET},
        {"n" * (MOST_LETTERS + 1): 1},
        {f"n{number}": 1 for number in range(MOST_NAMES + 1)},
    ],
)
def test_counters_that_are_none(told: object) -> None:
    with pytest.raises(ProtocolError, match="a worker"):
        checked(told)


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"reads": 0, "inflight": MOST},
        {"reads": MOST},
        {f"read_latency_{what}": NONE_YET for what in ("min", "max", "avg")},
        {"poisoned_sector": NONE_YET - 1},  # the guest's word
        {f"{number:0{MOST_LETTERS}}": MOST for number in range(MOST_NAMES)},
    ],
)
def test_counters_that_are_some(told: dict[str, int]) -> None:
    assert checked(told) == told


def test_sums_of_lies_can_still_be_told() -> None:
    past: dict[str, int] = {}
    for told in ({"reads": MOST, "read_latency_min": NONE_YET}, {"reads": MOST, "read_latency_min": 1}, {"reads": 1}):
        past = merge(past, checked(told))
        assert msgpack.unpackb(msgpack.packb(past)) == past
    assert past == {"reads": MOST, "read_latency_min": 1}


def test_averages_of_lies_can_still_be_told() -> None:
    lie = {"read_ops": MOST, "read_latency_avg": NONE_YET - 1, "read_latency_max": NONE_YET}
    past = merge(merge(lie, lie), lie)
    assert past["read_latency_avg"] == NONE_YET - 1 and msgpack.packb(past)


def test_names_that_are_carried_do_not_grow_with_every_incarnation() -> None:
    past: dict[str, int] = {}
    for incarnation in range(20):
        past = merge(past, checked({f"{incarnation}.{number}": 1 for number in range(MOST_NAMES // 2)}))
        assert len(past) <= MOST_NAMES
    now = {"reads": 3}
    assert merge(past, now)["reads"] == 3 and len(merge(past, now)) == MOST_NAMES
