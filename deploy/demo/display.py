"""The demo's events for people: a live picture on a terminal (rich), or plain lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

CONSOLE_LINES = 14
COMMAND_LINES = 7
FAULT_COLUMNS = (
    "process", "fault", "injected", "recovered", "median ms", "worst ms", "fio passes", "MiB echoed", "lost",
)  # fmt: skip
FLEET_COLUMNS = ("vmm", "pid", "process", "device", "state", "restarts", "PSS MiB")


class Display(Protocol):
    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def say(self, text: str) -> None: ...
    def show(self, event: dict[str, Any]) -> None: ...


class Feed:
    """A sink for the bytes of the event stream; keeps the report and the last failure."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._rest = b""
        self.report: dict[str, Any] | None = None
        self.failure = ""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "start":  # also after the death of a lab machine
                self.report, self.failure = None, ""
            elif event["event"] == "report":
                self.report = event["report"]
            elif event["event"] == "failure":
                self.failure = event["text"]
            self._display.show(event)


def display(stream: TextIO | None = None) -> Display:
    """The one that fits the stream (stdout)."""
    stream = stream or sys.stdout
    return Picture() if stream.isatty() else Lines(stream)


def fleet_rows(name: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of FLEET_COLUMNS. A process without memory of its own (a vCPU shares the controller's) has a dash."""
    return [
        [
            name, str(row["pid"]), row["kind"], row["device"], row["state"], str(row["restarts"]),
            f"{row['pss_kib'] / 1024:.1f}" if row["pss_kib"] else "-",
        ]
        for row in rows
    ]  # fmt: skip


def figures(event: dict[str, Any]) -> str:
    """One line about a migration: the phase that it is in, or how it was."""
    if event["event"] == "migration":
        return f"hop {event['hop']}: {event['phase']} ({event['total_ms'] or 0:.0f} ms)"
    sent = f"{event['bytes_transferred'] / 1024:.0f} KiB"
    what = "of state sent, no RAM" if event["ram_stayed"] else "of RAM and state sent"
    return (
        f"hop {event['hop']}: downtime {event['downtime_ms']:.0f} ms, whole migration {event['total_ms']:.0f} ms, "
        f"{sent} {what}"
    )


def summary(report: dict[str, Any]) -> list[str]:
    """The end of it, for people."""
    if not report["ok"]:
        return [*fault_lines(report), f"FAILED: {report['failure']}"]
    if "runs" in report:
        end = f"{report['lost']} lost, {report['guest_errors']} errors in the guest"
        return ["Every process was killed and stopped; the guest went on.", *fault_lines(report), f"  {end}"]
    first, last = report["uptime_s"][0], report["uptime_s"][-1]
    source, destination = report["source_exit"], report["destination_exit"]
    hosts = report.get("hosts", [])
    lines = [
        "The guest ran on in another VMM; "
        + ("it was not restarted." if hosts else "nothing of it was copied or restarted."),
        f"  downtime          {report['downtime_ms']:.0f} ms (whole migration {report['total_ms']:.0f} ms)",
        f"  checksum loop     {report['equal']} times equal, {report['not_equal']} times not equal",
        f"  same boot         boot_id {report['boot_id'][-1]}, uptime {first:.0f} s before and {last:.0f} s after",
        f"  exit codes        source VMM {source}, destination after poweroff {destination}",
        f"  processes         {len(report['processes'])} at the destination",
    ]
    if hosts:
        sent, received = report["ping"]
        lines += [
            f"  host VMs          ping {received} of {sent}, exit codes after poweroff {hosts[0]} and {hosts[1]}",
            f"  until source end  {report['seconds']['send_to_source_exit']:.0f} s from send-migration",
        ]
    return lines


def fault_lines(report: dict[str, Any]) -> list[str]:
    """A table: per process kind and fault how often, how many came back, and how long they were gone."""
    lines = []
    for run in report.get("runs", []):
        for strike in run.get("strikes", []):
            stalls = [strike["median_stall_ms"], strike["worst_stall_ms"]]
            cells = [run["process"], strike["fault"], str(strike["injected"]), str(strike["recovered"])]
            lines.append([*cells, *("-" if stall is None else f"{stall:.0f}" for stall in stalls)])
        if run.get("strikes"):
            lines[-1] += [str(run["fio_passes"]), f"{run['net_bytes'] / (1 << 20):.1f}", str(run["lost"])]
    return ["  " + "  ".join(f"{cell:>{len(head)}}" for head, cell in zip(FAULT_COLUMNS, cells, strict=False))
            for cells in [FAULT_COLUMNS, *lines]] if lines else []  # fmt: skip


class Lines:
    """Plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.monotonic()
        self._last = ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def say(self, text: str) -> None:
        self._stream.write(f"[{time.monotonic() - self._began:5.1f} s] {text}\n")
        self._stream.flush()

    def show(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "step":
                self.say(event["text"])
            case "command":
                self.say(f"{event['name']} $ {event['text']}")
            case "console" if event["line"]:
                self.say(f"{event['name']} | {event['line']}")
            case "migration" | "hop":
                self.say(figures(event))
            case "fleet":
                for cells in [list(FLEET_COLUMNS), *fleet_rows(event["name"], event["rows"])]:
                    self.say("  ".join(cell.ljust(10) for cell in cells).rstrip())


class Picture:
    """A picture that stays in place: step, commands, fleets, console, migration."""

    def __init__(self) -> None:
        self._console = Console()
        self._began = time.monotonic()
        self._lock = threading.Lock()  # rich draws in a thread of its own
        self._clear()
        self._live = Live(console=self._console, get_renderable=self.draw, refresh_per_second=8)

    def _clear(self) -> None:
        self._step = ""
        self._commands: deque[str] = deque(maxlen=COMMAND_LINES)
        self._lines: deque[str] = deque(maxlen=CONSOLE_LINES)
        self._shown = ""
        self._fleets: dict[str, list[dict[str, Any]]] = {}
        self._migrations: dict[int, list[str]] = {}

    def __enter__(self) -> Picture:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def show(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self._clear()
            case "step":
                self._step = event["text"]
            case "command":
                self._commands += event["text"].split("\n")
            case "console":
                self._shown = event["name"]
                self._lines.append(f"{event['name']}  {event['line']}")
            case "fleet":
                self._fleets = {**dict(list(self._fleets.items())[-1:]), event["name"]: event["rows"]}
            case "migration" | "hop":
                self._migrations.setdefault(event["hop"], []).append(figures(event))

    def draw(self) -> RenderableType:
        with self._lock:
            return self._drawn()

    def _drawn(self) -> RenderableType:
        head = Text(f"{time.monotonic() - self._began:5.0f} s  {self._step}", style="bold")
        commands = Panel(Text("\n".join(self._commands), no_wrap=True), title="typed", title_align="left")
        console = Panel(
            Text("\n".join(self._lines), no_wrap=True, overflow="ellipsis"), height=CONSOLE_LINES + 2,
            title=f"console of the guest ({self._shown})", title_align="left",
        )  # fmt: skip
        parts: list[RenderableType] = [head, commands, console]
        if self._fleets:
            parts.append(self._fleet_table())
        last = [lines[-1] for lines in self._migrations.values()]
        return Group(*parts, *(Text(line, style="green") for line in last[-5:]))

    def _fleet_table(self) -> Table:
        table = Table(title="fleet", title_justify="left")
        for column in FLEET_COLUMNS:
            table.add_column(column, justify="right" if column in ("pid", "restarts", "PSS MiB") else "left")
        for name, rows in list(self._fleets.items()):
            for cells in fleet_rows(name, rows):
                table.add_row(*cells)
            table.add_section()
        return table
