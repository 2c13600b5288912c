"""Remote migration over loopback as the guest sees it, beside QEMU's, by size, way and how fast the guest writes.

The probe guest sends a heartbeat each millisecond and, side by side with that, verifies and rewrites half of its RAM at
a given rate. Figures per migration, beside those of migrate-local:

    mb_per_s       wire_mb over own_total_ms
    first_round_mb_per_s  of ours: nothing but copying
    wire_mb        in the stream, in all (10^6 bytes)
    wire_per_ram   the same per byte of RAM
    rounds         the final pass included
    own_total_ms   from the first page to the guest's first instruction there, by the VMM's own count
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import report
from bench.errors import BenchError
from bench.migrate_local import REPORT_MS, Maker, sample
from bench.vmms import FlotillaRemotePair, QemuRemotePair

SIZES: Final = ("1G", "4G")
WAYS: Final = ("tcp", "unix")
RATES: Final = (0, 50, 200, 500)  # MiB/s that the guest writes
DOWNTIME_MS: Final = 300
GOALS: Final = "goals: throughput at least 1.0 x QEMU's single channel, downtime at most QEMU's and at most downtime_ms"
MAKERS: Final[dict[str, Maker]] = {"flotilla": FlotillaRemotePair, "qemu-microvm": QemuRemotePair}
_BYTES: Final = {"M": 1 << 20, "G": 1 << 30}


def run(
    kernel: str, runs: int, patience: float, sizes: Sequence[str] = SIZES, ways: Sequence[str] = WAYS,
    rates: Sequence[int] = RATES,
) -> dict[str, Any]:  # fmt: skip
    """Never raises: what can't be measured is a row that says why."""
    rows: list[report.Row] = []
    for size in sizes:
        for way in ways:
            for rate in rates:
                here = {name: report.Row(name, f"{size} {way} {rate}") for name in MAKERS}
                rows += here.values()
                for number in range(runs):
                    for name, make in MAKERS.items():
                        if not here[name].missing:
                            _one(here[name], number, make, kernel, (size, way, rate), patience)
    notes = [GOALS, "case: RAM, way, MiB/s that the guest writes (0: next to nothing); half of RAM is filled"]
    notes += compare(rows)
    return report.result("migrate-remote", "ms, MB, MB/s", rows, "downtime_ms", notes)


def compare(rows: Sequence[report.Row]) -> list[str]:
    """Our median throughput over QEMU's."""
    found = report.ratio(rows, "mb_per_s", "flotilla")
    return [f"throughput flotilla / {name}: {value:.2f}" for name, value in found.items()]


def words(size: str, rate: int) -> str:
    megabytes = size_bytes(size) >> 21
    load = f"ram ram.mb={megabytes} ram.rate={max(1, rate)} ram.report_ms=1000"
    return f"mode=tick,{load} tick.tick_us=1000 tick.spin=0 tick.report_ms={REPORT_MS}"


def size_bytes(size: str) -> int:
    return int(size[:-1]) * _BYTES[size[-1]]


def _one(
    row: report.Row, number: int, make: Maker, kernel: str, case: tuple[str, str, int], patience: float
) -> None:
    """One migration into `row`."""
    if missing := report.kvm_missing():
        row.missing = missing
        return
    size, way, rate = case
    maker = partial(make, kernel=kernel, words=words(size, rate), size=size, way=way, downtime_ms=DOWNTIME_MS)
    try:
        with tempfile.TemporaryDirectory(prefix="bench.") as name:
            pair = maker(Path(name))
            row.command = pair.source_command
            figures = sample(Path(name), pair, patience)
        row.add(**figures, wire_per_ram=(figures["wire_mb"] or 0.0) * 1e6 / size_bytes(size))
    except (BenchError, OSError) as error:
        row.missing = f"run {number}: {error}"
    except KeyboardInterrupt:
        row.missing = f"run {number}: interrupted"
        raise
