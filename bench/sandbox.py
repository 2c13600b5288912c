"""What the sandbox costs: block I/O and the way to the first of it, beside ours with `--seccomp false` (the other walls
stand) and ours without any (bench/unconfined.py).

They take turns (A B C C B A …) after one start of each that does not count; a ratio is the median over the runs of
neighbours, which the machine's other work changes least. `first_io_ms` is from exec to the first verified
pass of the disk's load: the disk's worker, which is what the filter holds up, comes up on the way.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

from bench import processes, programs, report, unconfined
from bench.errors import BenchError
from bench.recorder import Recorder
from guest.lines import BlkOk

UNCONFINED: Final = "flotilla-unconfined"
DISK_BYTES: Final = 64 << 20
CMDLINE: Final = "mode=blkload depth=8 span=32m trim=0 report_ms=50"
MODES: Final = {"flotilla": "true", "flotilla-unfiltered": "false", UNCONFINED: "false"}


def run(kernel: str, runs: int, patience: float, seconds: float) -> dict[str, Any]:
    """Never raises: what can't be measured is a row that says why."""
    with tempfile.TemporaryDirectory(prefix="bench.") as name:
        folder = Path(name)
        disk = folder / "disk.raw"
        disk.write_bytes(bytes(DISK_BYTES))
        rows = [report.Row(peer, "4k depth 8", command(peer, kernel, disk, mode)) for peer, mode in MODES.items()]
        for row in rows:
            row.missing = report.kvm_missing()
        for number in range(runs + 1):
            for row in rows if number % 2 else rows[::-1]:
                if row.missing:
                    continue
                try:
                    figures = sample(folder, row, patience, seconds)
                except (BenchError, OSError) as error:
                    row.missing = f"run {number}: {error}"
                    continue
                if number:  # the first is the warm-up
                    row.add(**figures)
    answer = report.result("sandbox", "block requests a second; ms from exec to the first I/O", rows, "iops")
    answer["ratios"] = {
        f"{row.peer} {name}": paired(rows[0], row, name) for row in rows[1:] for name in ("iops", "first_io_ms")
    }
    return answer


def command(peer: str, kernel: str, disk: Path, mode: str) -> list[str]:
    ours = programs.ours("flotilla")
    return [
        *(unconfined.argv(ours) if peer == UNCONFINED else ours),
        "--kernel", kernel, "--cmdline", CMDLINE, "--cpus", "boot=1", "--memory",
        "size=128M", "--disk", f"path={disk}", "--serial", "tty", "--console", "off", "--seccomp", mode,
    ]  # fmt: skip


def sample(folder: Path, row: report.Row, patience: float, seconds: float) -> dict[str, float]:
    """One start of one VMM. Raises BenchError."""
    try:
        with processes.Child(folder, row.peer, row.command) as child, Recorder() as recorder:
            recorder.add(child.fd, row.peer)
            at = recorder.until(lambda heard: isinstance(heard.event, BlkOk), patience, "verified block")
            first = recorder.events[at]
            end = first.at + seconds
            last = recorder.events[
                recorder.until(
                    lambda heard: isinstance(heard.event, BlkOk) and heard.at >= end,
                    patience,
                    "more blocks",
                    at,
                )
            ]
            assert isinstance(first.event, BlkOk) and isinstance(last.event, BlkOk)
            iops = (last.event.ops - first.event.ops) / (last.at - first.at)
            return {"iops": iops, "first_io_ms": (first.at - child.began) * 1e3}
    finally:
        processes.settle()


def paired(ours: report.Row, other: report.Row, figure: str) -> float:
    """Median of the ratios of neighbours; 0 without any."""
    pairs = zip(ours.samples.get(figure, []), other.samples.get(figure, []), strict=False)
    ratios = [mine / theirs for mine, theirs in pairs if theirs]
    return round(statistics.median(ratios), 3) if ratios else 0.0
