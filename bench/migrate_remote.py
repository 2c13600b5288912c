"""Remote migration over loopback as the guest sees it, beside QEMU's, by size, way and how fast the guest writes.

The probe guest sends a heartbeat each millisecond and, side by side with that, verifies and rewrites half of its RAM at
a given rate. Figures per migration, beside those of migrate-local:

    mb_per_s       wire_mb over own_total_ms
    first_round_mb_per_s  of ours: nothing but copying
    wire_mb        in the stream, in all (10^6 bytes)
    wire_per_ram   the same per byte of RAM
    rounds         the final pass included
    own_total_ms   from the first page to the guest's first instruction there, by the VMM's own count

Of ours also how much each round has sent, beside a simulation that knows how fast the guest is told to write:
on a host where it does not get that far the measured rounds are the smaller ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import report
from bench.errors import BenchError
from bench.migrate_local import REPORT_MS, Maker, sample
from bench.vmms import FlotillaRemotePair, QemuRemotePair
from shared.pages import PAGE_SIZE

SIZES: Final = ("1G", "4G")
WAYS: Final = ("tcp", "unix")
RATES: Final = (0, 50, 200, 500)  # MiB/s that the guest writes
DOWNTIME_MS: Final = 300
GOALS: Final = "goals: throughput at least 1.0 x QEMU's single channel, downtime at most QEMU's and at most downtime_ms"
MAKERS: Final[dict[str, Maker]] = {"flotilla": FlotillaRemotePair, "qemu-microvm": QemuRemotePair}
SHOWN_ROUNDS: Final = 8  # in a note; all are in the JSON
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
    notes += [*compare(rows), *round_notes(rows)]
    return report.result("migrate-remote", "ms, MB, MB/s", rows, "downtime_ms", notes)


def compare(rows: Sequence[report.Row]) -> list[str]:
    """Our median throughput over QEMU's."""
    found = report.ratio(rows, "mb_per_s", "flotilla")
    return [f"throughput flotilla / {name}: {value:.2f}" for name, value in found.items()]


def words(size: str, rate: int) -> str:
    load = f"ram ram.mb={filled_bytes(size) >> 20} ram.rate={written(rate)} ram.report_ms=1000"
    return f"mode=tick,{load} tick.tick_us=1000 tick.spin=0 tick.report_ms={REPORT_MS}"


def size_bytes(size: str) -> int:
    return int(size[:-1]) * _BYTES[size[-1]]


def filled_bytes(size: str) -> int:
    """What the guest fills, and then rewrites from end to end."""
    return size_bytes(size) // 2


def written(rate: int) -> int:
    """MiB/s: the guest has no word for nothing."""
    return max(1, rate)


# Rounds --------------------------------------------------------------------------------------------------------------


def round_bytes(copied: Mapping[str, Any]) -> list[int]:
    """What each round has sent, from `copied` of a migration's breakdown; the final pass is the last."""
    return [*(each["bytes"] for each in copied["rounds"]), copied["final_pages"] * PAGE_SIZE]


def simulate(first: float, bytes_per_s: float, dirty_bytes_per_s: float, working_set: float, count: int) -> list[float]:
    """`count` rounds over a network: each sends what was written while the one before was sent. A guest that rewrites
    its working set from end to end writes different pages until it comes round."""
    rounds = [first]
    while len(rounds) < count:
        rounds.append(min(working_set, dirty_bytes_per_s * rounds[-1] / bytes_per_s))
    return rounds


def rounds_of(copied: Mapping[str, Any], size: str, rate: int) -> dict[str, list[float]]:
    """In MB, the measured ones and the simulated ones. The simulation takes over the first round and its speed."""
    sent = round_bytes(copied)
    first = copied["rounds"][0]
    bytes_per_s = max(1.0, first["bytes"]) / max(0.001, first["ms"]) * 1e3
    simulated = simulate(sent[0], bytes_per_s, written(rate) << 20, filled_bytes(size), len(sent))
    return {"sent_mb": _megabytes(sent), "simulated_mb": _megabytes(simulated)}


def _megabytes(sizes: Sequence[float]) -> list[float]:
    return [round(each / 1e6, 3) for each in sizes]


def round_notes(rows: Sequence[report.Row]) -> list[str]:
    """A line per migration whose rounds are known."""
    return [
        f"rounds of {row.peer} {row.case}, MB: {_sizes(each['sent_mb'])}; simulated: {_sizes(each['simulated_mb'])}"
        for row in rows
        for each in row.details.get("rounds", ())
    ]


def _sizes(megabytes: Sequence[float]) -> str:
    shown = [f"{each:.1f}" for each in megabytes]
    if len(shown) > SHOWN_ROUNDS:
        shown[SHOWN_ROUNDS - 1 : -1] = [f"… {len(shown) - SHOWN_ROUNDS} more …"]
    return " ".join(shown)


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
        if isinstance(pair, FlotillaRemotePair):
            row.details.setdefault("rounds", []).append(rounds_of(pair.copied, size, rate))
        row.add(**figures, wire_per_ram=(figures["wire_mb"] or 0.0) * 1e6 / size_bytes(size))
    except (BenchError, OSError) as error:
        row.missing = f"run {number}: {error}"
    except KeyboardInterrupt:
        row.missing = f"run {number}: interrupted"
        raise
