"""How long operations took: power-of-two buckets of microseconds, as native loops count them and workers tell them.

    bucket          0       1       2            18      19
    microseconds   0…15   16…31   32…63   …   ≥2^21    ≥2^22       blk_worker/blk.h has the same

A worker's `stats` are names with integers, so that they can be added up by name: `read_latency_sum` (µs) and, for each
bucket that is not empty, `read_latency_bucket_N`. Buckets of one operation add up to its `read_ops`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

SHIFT: Final = 4
BUCKETS: Final = 20
# Of all buckets but the last, which has none.
UPPER_SECONDS: Final = tuple((1 << SHIFT + bucket) / 1e6 for bucket in range(BUCKETS - 1))
_BUCKET: Final = "_latency_bucket_"


def told(operation: str, sum_us: int, buckets: Iterable[int]) -> dict[str, int]:
    """Entries of a worker's stats for one operation."""
    entries = {f"{operation}{_BUCKET}{number}": count for number, count in enumerate(buckets) if count}
    return {f"{operation}_latency_sum": sum_us, **entries}


def read(operation: str, stats: Mapping[str, int]) -> tuple[int, list[int]]:
    """Sum in µs and the buckets, from a worker's stats; zeros for what it did not tell."""
    buckets = [stats.get(f"{operation}{_BUCKET}{number}", 0) for number in range(BUCKETS)]
    return stats.get(f"{operation}_latency_sum", 0), buckets


def is_histogram(name: str) -> bool:
    """Whether an entry of a worker's stats is one of a histogram's."""
    return _BUCKET in name or name.endswith("_latency_sum")
