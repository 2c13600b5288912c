"""shared.latency: histograms as entries of a worker's stats."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shared import latency


@given(st.lists(st.integers(0, 2**63), min_size=latency.BUCKETS, max_size=latency.BUCKETS), st.integers(0, 2**63))
def test_what_is_told_is_what_is_read(buckets: list[int], total: int) -> None:
    stats = {"read_ops": 1} | latency.told("read", total, buckets)
    assert latency.read("read", stats) == (total, buckets)
    assert latency.read("write", stats) == (0, [0] * latency.BUCKETS)
    assert {name for name in stats if not latency.is_histogram(name)} == {"read_ops"}


def test_empty_buckets_are_not_told() -> None:
    assert latency.told("read", 5, [0, 1, *[0] * 18]) == {"read_latency_sum": 5, "read_latency_bucket_1": 1}


def test_each_bucket_is_twice_as_wide_as_the_one_before() -> None:
    upper = latency.UPPER_SECONDS
    assert len(upper) == latency.BUCKETS - 1 and upper[0] == 16e-6
    assert all(round(b / a, 9) == 2 for a, b in pairwise(upper))
