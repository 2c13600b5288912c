"""Results: one JSON shape for every bench, and the same as a table.

    {"bench": …, "where": "here" | "lab", "host": {…}, "unit": …, "rows": [row, …], "ratios": {…}, "notes": […]}
    row: {"peer", "case", "command", "missing": null | reason, "figures": {name: {"n", "min", "median", "p99", "max"}}}
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import HostError
from shared.kvm import Kvm


@dataclass(slots=True)
class Row:
    """One peer in one case. `missing` says why there are no figures, or that there are fewer than asked for."""

    peer: str
    case: str
    command: list[str] = field(default_factory=list)
    missing: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, **figures: float | None) -> None:
        for name, value in figures.items():
            if value is not None:
                self.samples.setdefault(name, []).append(round(value, 3))

    def median(self, name: str) -> float | None:
        values = self.samples.get(name)
        return statistics.median(values) if values else None

    def to_json(self) -> dict[str, Any]:
        figures = {name: spread(values) for name, values in self.samples.items()}
        return {
            "peer": self.peer, "case": self.case, "command": self.command, "missing": self.missing or None,
            "figures": figures, "samples": self.samples, **self.details,
        }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "min": min(values),
        "median": round(statistics.median(values), 3),
        "p99": quantile(values, 0.99),
        "max": max(values),
    }


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that `part` of all don't pass; with few values the largest."""
    return sorted(values)[min(len(values), math.ceil(part * len(values))) - 1]


def ratio(rows: Iterable[Row], figure: str, base: str) -> dict[str, float]:
    """Our median over each peer's, by "peer case"; below 1 is better than the peer."""
    rows = list(rows)
    own = {row.case: row.median(figure) for row in rows if row.peer == base}
    found = {}
    for row in rows:
        mine, theirs = own.get(row.case), row.median(figure)
        if row.peer != base and mine is not None and theirs:
            found[f"{row.peer} {row.case}".strip()] = round(mine / theirs, 2)
    return found


def host() -> dict[str, Any]:
    """What a figure depends on, beside the program."""
    modules = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if os.path.isdir(f"/sys/module/{name}")]
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "kvm": modules,
        "python": platform.python_version(),
        "load": float(Path("/proc/loadavg").read_text().split()[0]),
    }


def kvm_missing() -> str:
    """Why /dev/kvm can't be used, or an empty string."""
    try:
        Kvm().close()
    except HostError as error:
        return str(error)
    return ""


def result(bench: str, unit: str, rows: Sequence[Row], figure: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "bench": bench,
        "where": "here",
        "host": host(),
        "unit": unit,
        "rows": [row.to_json() for row in rows],
        "ratios": ratio(rows, figure, "flotilla"),
        "notes": list(notes),
    }


def show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        json.dump(answer, sys.stdout)
        sys.stdout.write("\n")
        return
    facts = answer["host"]
    print(
        f"{answer['bench']} ({answer['where']}; {answer['unit']}; kernel {facts['kernel']}, {facts['cpus']} CPUs, "
        f"{'+'.join(facts['kvm']) or 'kvm'}, Python {facts['python']}, load {facts['load']})"
    )
    lines = [["peer", "case", "figure", "n", "min", "median", "p99", "max"]]
    for row in answer["rows"]:
        for name, values in row["figures"].items():
            numbers = [f"{values[key]:.1f}" for key in ("min", "median", "p99", "max")]
            lines.append([row["peer"], row["case"], name, str(int(values["n"])), *numbers])
        if row["missing"]:
            lines.append([row["peer"], row["case"], f"missing: {row['missing']}"])
    print_table(lines)
    for row in answer["rows"]:
        if row.get("processes"):
            print(f"\n{row['peer']} {row['case']}, KiB beyond guest RAM by address space")
            print_table([[f"  {each['name']}", str(each["kib"])] for each in row["processes"]])
    for name, value in answer["ratios"].items():
        print(f"flotilla / {name}: {value:.2f}")
    for note in answer["notes"]:
        print(f"note: {note}")


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Columns of equal width; the last cell of a line may be as long as it likes."""
    widths: dict[int, int] = {}
    for line in lines:
        for column, cell in enumerate(line[:-1] if len(line) < max(map(len, lines)) else line):
            widths[column] = max(widths.get(column, 0), len(cell))
    for line in lines:
        print("  ".join(cell.ljust(widths.get(column, 0)) for column, cell in enumerate(line)).rstrip())
