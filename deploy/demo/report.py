"""What an example tells whoever watches: one JSON object a line, and the report at the end.

    {"event": "start"}                                  forget what came before: a lab machine died, this is another
    {"event": "step", "text": …}                        what happens now
    {"event": "command", "name": …, "text": …}          a command that is typed, as it is typed
    {"event": "console", "name": …, "line": …}          a line that a terminal shows; `name` is that of its command
    {"event": "fleet", "name": …, "rows": […]}          the answer of vmm.fleet
    {"event": "migration", "hop": …, "phase": …, "total_ms": …}   the receiving side is in another phase
    {"event": "hop", "hop": …, …}                       a migration is done; the fields of Hop
    {"event": "failure", "text": …}
    {"event": "report", "report": {…}}
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from typing import Any


class DemoError(Exception):
    """The example did not go as the document says; the message has all that is known."""


class TooLate(DemoError):
    """What was waited for has not come in its time, and still could."""


class Events:
    """A writer of events to a pipe or a port (`path`), or to nowhere; lines of several threads stay whole."""

    def __init__(self, path: str | None) -> None:
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_CREAT | os.O_APPEND, 0o644) if path else -1

    def emit(self, event: str, **values: Any) -> None:
        if self._fd < 0:
            return
        line = memoryview(json.dumps({"event": event, **values}).encode() + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(slots=True)
class Hop:
    """One migration. Times in milliseconds.

    downtime_ms       from the pause at the source until the vCPUs run at the destination
    gap_ms            from the last line of the console at the source to the first at the destination
    bytes_transferred all that was sent: in a local migration the state of devices and vCPUs, else RAM as well
    ram_stayed        both controllers have the very same files of guest RAM mapped
    """

    hop: int
    downtime_ms: float | None = None
    total_ms: float | None = None
    gap_ms: float | None = None
    bytes_transferred: int | None = None
    send: int | None = None
    receive: int | None = None
    source_exit: int | None = None
    ram_stayed: bool = False
    breakdown: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """What `--report FILE` holds. `processes` are the rows of vmm.fleet at the destination."""

    ok: bool = False
    failure: str = ""
    where: str = ""
    downtime_ms: float | None = None
    total_ms: float | None = None
    equal: int = 0
    not_equal: int = 0
    verified: int = 0
    source_exit: int | None = None
    destination_exit: int | None = None
    boot_id: list[str] = field(default_factory=list)
    uptime_s: list[float] = field(default_factory=list)
    processes: list[dict[str, Any]] = field(default_factory=list)
    hops: list[Hop] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def sum_up(self) -> None:
        """The figures of all hops as one: the longest downtime and the first exit code that is not 0."""
        self.downtime_ms = max((hop.downtime_ms for hop in self.hops if hop.downtime_ms is not None), default=None)
        self.total_ms = max((hop.total_ms for hop in self.hops if hop.total_ms is not None), default=None)
        exits = [hop.source_exit for hop in self.hops if hop.source_exit is not None]
        self.source_exit = next((code for code in exits if code), exits[0] if exits else None)


@dataclass(slots=True)
class NestedReport(Report):
    """The same for the nested example. hosts: exit codes of VM 1 and VM 2; ping: packets sent and received."""

    hosts: list[int] = field(default_factory=list)
    ping: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Strike:
    """What `flotilla chaos` has counted of one fault. Times in milliseconds."""

    fault: str
    injected: int
    recovered: int
    median_stall_ms: float | None
    worst_stall_ms: float | None


@dataclass(slots=True)
class FaultsReport(Report):
    """One run of the fault example. `lost`: 0, or more where fio or the echo found anything that is not what it was.

    fio_passes   verified passes over the loaded disk; net_bytes: bytes that came back as they went
    guest_errors lines of the guest's kernel log that are errors and were not there before the load
    """

    process: str = ""
    strikes: list[Strike] = field(default_factory=list)
    fio_passes: int = 0
    net_bytes: int = 0
    guest_errors: int = 0
    lost: int = 0
    vmm_exit: int | None = None
