"""Downtime of a local migration as the guest sees it, at several sizes of RAM.

The probe guest sends a heartbeat byte every millisecond and remembers the largest gap between two looks at its clocks.
Three figures per migration, in milliseconds:

    downtime_ms    last heartbeat that came from the source to the first from the destination, by our clock
    guest_gap_ms   the largest gap that the guest itself saw, in the report that covers the hop
    total_ms       from the send command to the end of both commands
    steady_gap_ms  the largest gap between two heartbeats in the second before: what the machine's own noise is worth
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from bench import processes, report
from bench.errors import BenchError
from bench.recorder import Heard, Recorder
from bench.vmms import FlotillaPair, Pair, QemuPair, UpstreamPair
from guest.lines import Beat, Ready, Tick

SIZES: Final = ("256M", "1G", "4G")
REPORT_MS: Final = 200
STEADY_SECONDS: Final = 1.0
GOALS: Final = (
    "goals: flotilla's median downtime at most 25 ms on a development machine, 4G within 1.2 x 256M; in the lab below "
    "Cloud Hypervisor's 200 to 290 ms, then below QEMU's 110 to 150"
)


def run(
    kernel: str, runs: int, patience: float, sizes: Sequence[str] = SIZES, tick_us: int = 1000, spin: bool = True
) -> dict[str, Any]:
    """Never raises: what can't be measured is a row that says why."""
    words = f"mode=tick tick_us={tick_us} spin={int(spin)} report_ms={REPORT_MS}"
    rows: list[report.Row] = []
    for size in sizes:
        pairs = makers()
        here = {name: report.Row(name, size) for name in pairs}
        rows += here.values()
        for number in range(runs):
            for name, make in pairs.items():
                if not here[name].missing:
                    _one(here[name], number, partial(make, kernel=kernel, words=words, size=size), patience)
    notes = [
        GOALS,
        "QEMU: x-ignore-shared, RAM in a file that both map (memory-backend-file, share=on)",
        *scaling(rows),
    ]
    return report.result("migrate-local", "ms", rows, "downtime_ms", notes)


Maker = Callable[..., Pair]


def makers() -> dict[str, Maker]:
    return {"flotilla": FlotillaPair, "qemu-microvm": QemuPair, "cloud-hypervisor": UpstreamPair}


def scaling(rows: Sequence[report.Row]) -> list[str]:
    """Our largest size over our smallest."""
    own = [(row.case, row.median("downtime_ms")) for row in rows if row.peer == "flotilla"]
    if len(own) < 2 or own[0][1] is None or own[-1][1] is None:
        return []
    return [f"flotilla {own[-1][0]} / {own[0][0]}: {own[-1][1] / own[0][1]:.2f}"]


def _one(row: report.Row, number: int, make: Callable[[Path], Pair], patience: float) -> None:
    """One migration into `row`."""
    if missing := report.kvm_missing():
        row.missing = missing
        return
    try:
        # A short name: a unix socket's path has 107 bytes at most.
        with tempfile.TemporaryDirectory(prefix="bench.") as name:
            pair = make(Path(name))
            row.command = pair.source_command
            row.add(**sample(Path(name), pair, patience))
    except (BenchError, OSError) as error:
        row.missing = f"run {number}: {error}"
    except KeyboardInterrupt:
        row.missing = f"run {number}: interrupted"
        raise


def sample(folder: Path, pair: Pair, patience: float) -> dict[str, float | None]:
    """One migration between two fresh VMMs. Raises BenchError."""
    with pair:
        try:
            return _measure(folder, pair, patience)
        except BenchError as error:
            raise BenchError(f"{error}; {pair.complaints()}") from error


def _measure(folder: Path, pair: Pair, patience: float) -> dict[str, float | None]:
    try:
        with Recorder() as recorder, processes.Child(folder, "source", pair.source_command) as source:
            pair.started("source", source)
            recorder.add(source.fd, "source")
            recorder.until(lambda heard: isinstance(heard.event, Ready), patience, "guest that is ready")
            with processes.Child(folder, "destination", pair.destination_command) as destination:
                pair.started("destination", destination)
                recorder.add(destination.fd, "destination")
                pair.prepare(patience)
                recorder.beat("source", time.monotonic() + STEADY_SECONDS, patience)
                began = time.monotonic()
                pair.migrate(patience)
                total = time.monotonic() - began
                first = recorder.beat("destination", began, patience)
                # The report that follows covers the hop, unless it was under way: then it is the next.
                line = recorder.until(_is_tick, patience, "report of the guest", first)
                own = pair.finish(patience)
        figures = evaluate(recorder.events[: line + 1], began)
        return {**figures, "total_ms": total * 1e3, **own}
    finally:
        processes.settle()


def _is_tick(heard: Heard) -> bool:
    return heard.source == "destination" and isinstance(heard.event, Tick)


def evaluate(events: Sequence[Heard], began: float) -> dict[str, float | None]:
    """Figures from what was heard up to and with the guest's first report at the destination. Milliseconds."""
    beats = {name: [h.at for h in events if h.source == name and isinstance(h.event, Beat)] for name in _SIDES}
    if not all(beats.values()):
        raise BenchError("no heartbeat on one of the two sides")
    before = [at for at in beats["source"] if began - STEADY_SECONDS < at < began]
    return {
        "downtime_ms": max(0.0, beats["destination"][0] - beats["source"][-1]) * 1e3,
        "guest_gap_ms": guest_gap(events),
        "steady_gap_ms": max((b - a for a, b in pairwise(before)), default=0.0) * 1e3,
    }


_SIDES: Final = ("source", "destination")


def guest_gap(events: Sequence[Heard]) -> float | None:
    """The gap of the last report, by the clock that ran on: kvmclock may stand still while the guest does not run.

    The TSC's rate comes from the reports before, whose largest gap both clocks saw.
    """
    ticks = [heard.event for heard in events if isinstance(heard.event, Tick)]
    if not ticks:
        return None
    rates = [tick.gap_tsc / tick.gap_us for tick in ticks[:-1] if tick.gap_us and tick.gap_tsc]
    by_tsc = ticks[-1].gap_tsc / statistics.median(rates) if rates else 0.0
    return max(ticks[-1].gap_us, by_tsc) / 1e3

