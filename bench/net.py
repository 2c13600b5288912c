"""A network card as the host sees it: the probe guest on a TAP, beside QEMU's virtio-net with vhost=off on the same.

A case is a way (tx: guest to host, rx: host to guest, rtt: pings by the guest, which the host's kernel answers), the
size of a frame with its Ethernet header, and streams: UDP flows with a port each, on as many queue pairs (and as many
vCPUs, which the card asks for; one of them runs). Which queue a flow to the guest takes is the host kernel's choice.
Peers take turns (A B A B …), a fresh VMM each time. Figures:

    kpps        thousand frames a second through the TAP, by the host kernel's counters
    mb_per_s    the same in 10^6 bytes
    cpu_us      processor time of all of the VMM's processes per frame, the guest's own included
    starved     rx: at how many of a hundred looks the TAP's queue was empty, the VMM quicker than the flood
    p50_us, p99_us  round trips by the guest's clock

What the host counts must agree with what the guest counts, else there is no figure.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import processes, programs, report
from bench.boot import QEMU_CPU
from bench.errors import BenchError
from bench.footprint import MICROVM_WORDS
from bench.recorder import Heard, Recorder
from bench.wire import GUEST, GUEST_MAC, HEADERS, HOST, NAME, Counters, Flood, Wire, namespace
from guest.lines import NetFlood

MEMORY: Final = 256  # MiB
VHOST: Final = "/dev/vhost-net"
GOALS: Final = "goal: at least 1.0 x QEMU tap with vhost=off; for rtt, at most"
STRAY_FRAMES: Final = 100  # that the host may send beside the flood: ARP


@dataclass(frozen=True, slots=True)
class Case:
    way: str
    size: int
    streams: int
    figure: str
    higher_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.way} {self.size} x{self.streams}"

    def words(self) -> str:
        flags = f"tx={int(self.way == 'tx')}" if self.way != "rtt" else "ping=1"
        room = f"bytes={self.size - HEADERS} tx_bytes={max(1514, self.size)}"
        return f"mode=netflood peer={HOST} ip={GUEST} pairs={self.streams} {flags} {room} report_ms=100"


BULK, SMALL, HUGE = 1514, 64, 65507 + HEADERS  # the last in one piece by UFO
CASES: Final = (
    *(Case(way, BULK, streams, "mb_per_s") for way in ("tx", "rx") for streams in (1, 4)),
    Case("tx", HUGE, 1, "mb_per_s"),
    *(Case(way, SMALL, streams, "kpps") for way in ("tx", "rx") for streams in (1, 4)),
    Case("rtt", 98, 1, "p50_us", higher_is_better=False),
)
Maker = Callable[[str, Case], list[str]]


def run(
    kernel: str, runs: int, patience: float, seconds: float = 2.0, only: Sequence[str] = ()
) -> dict[str, Any]:
    """`only`: names of cases. Never raises for what can't be measured: that is a row that says why."""
    rows: list[report.Row] = []
    cases = [case for case in CASES if not only or str(case) in only]
    for case in cases:
        here = [_row(kernel, name, make, case) for name, make in MAKERS.items()]
        for number in range(runs):
            for row in here:
                _one(row, number, case, seconds, patience)
        rows += here
    rows.append(vhost(kernel, runs, seconds, patience))
    notes = [GOALS, "case: way, bytes of a frame, streams", "ratios are medians of each run's own ratio"]
    answer = report.result("net", "thousand frames/s, MB/s, us", rows, "mb_per_s", notes)
    return {**answer, "ratios": compare(cases, rows)}


def compare(cases: Sequence[Case], rows: Sequence[report.Row]) -> dict[str, float]:
    """Ours over each peer's, run by run, in the case's own figure."""
    found = {}
    for case in cases:
        samples = {row.peer: row.samples.get(case.figure, []) for row in rows if row.case == str(case)}
        own = samples.pop("flotilla", [])
        for peer, theirs in samples.items():
            pairs = [mine / other for mine, other in zip(own, theirs, strict=False) if other]
            if pairs:
                sense = "higher" if case.higher_is_better else "lower"
                found[f"{peer} {case} {case.figure} ({sense} is better)"] = round(statistics.median(pairs), 2)
    return found


def vhost(kernel: str, runs: int, seconds: float, patience: float) -> report.Row:
    """For information: QEMU with the kernel's own back end."""
    case = CASES[0]
    row = _row(kernel, "qemu-vhost", lambda elf, each: qemu(elf, each, vhost="on"), case)
    if not os.path.exists(VHOST):
        row.missing = row.missing or f"{VHOST} does not exist: this kernel has no vhost_net, or it is not loaded"
    for number in range(runs):
        _one(row, number, case, seconds, patience)
    return row


def flotilla(kernel: str, case: Case) -> list[str]:
    return [
        *programs.ours("flotilla"), "--kernel", kernel, "--cmdline", case.words(), "--cpus", f"boot={case.streams}",
        "--memory", f"size={MEMORY}M", "--serial", "tty", "--console", "off",
        "--net", f"tap={NAME},mac={GUEST_MAC},num_queues={2 * case.streams}",
    ]  # fmt: skip


def qemu(kernel: str, case: Case, vhost: str = "off") -> list[str]:
    several, device = (f",queues={case.streams}", f",mq=on,vectors={2 * case.streams + 2}")
    if case.streams == 1:
        several = device = ""
    return [
        programs.qemu(), "-accel", "kvm", "-M", "microvm,pcie=on,pic=off,pit=off", "-cpu", QEMU_CPU,
        "-smp", str(case.streams), "-m", f"{MEMORY}M",
        "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-kernel", kernel, "-append",
        f"{case.words()} {MICROVM_WORDS}",
        "-netdev", f"tap,id=n,ifname={NAME},script=no,downscript=no,vhost={vhost}{several}",
        "-device", f"virtio-net-pci,disable-legacy=on,netdev=n,mac={GUEST_MAC},romfile={device}",
    ]  # fmt: skip


MAKERS: Final[dict[str, Maker]] = {"flotilla": flotilla, "qemu-microvm": qemu}


def _row(kernel: str, name: str, make: Maker, case: Case) -> report.Row:
    row = report.Row(name, str(case))
    try:
        row.command = make(kernel, case)
        row.missing = report.kvm_missing()
    except BenchError as error:
        row.missing = str(error)
    return row


def _one(row: report.Row, number: int, case: Case, seconds: float, patience: float) -> None:
    """One sample into `row`."""
    if row.missing:
        return
    try:
        with tempfile.TemporaryDirectory(prefix="bench.") as name, namespace():
            row.add(**sample(Path(name), row, case, seconds, patience))
    except (BenchError, OSError) as error:
        row.missing = f"run {number}: {error}"


def sample(folder: Path, row: report.Row, case: Case, seconds: float, patience: float) -> dict[str, float]:
    """Raises BenchError."""
    try:
        with (
            Wire(case.streams) as wire,
            Recorder() as recorder,
            processes.Child(folder, row.peer, row.command) as child,
        ):
            try:
                recorder.add(child.fd, "guest")
                guest = Guest(recorder, patience)
                guest.next()  # the card is open
                if case.way == "rx":
                    return _rx(wire, guest, case, seconds, patience)
                return _tx(wire, guest, case, seconds)
            except BenchError as error:
                raise BenchError(f"{error}; stderr: {child.errors or 'empty'}") from error
    finally:
        processes.settle()


class Guest:
    """The guest's own count."""

    def __init__(self, recorder: Recorder, patience: float) -> None:
        self._recorder, self._patience, self._seen = recorder, patience, 0

    def next(self, wanted: Callable[[NetFlood], bool] = lambda _: True, what: str = "report of the guest") -> Heard:
        """The next report that is wanted."""

        def fits(heard: Heard) -> bool:
            return isinstance(heard.event, NetFlood) and wanted(heard.event)

        found = self._recorder.until(fits, self._patience, what, self._seen)
        self._seen = found + 1
        return self._recorder.events[found]

    def report_after(self, at: float) -> NetFlood:
        """A report that came after that moment, and all of which the guest found out after it."""
        while self.next().at < at:
            pass
        line = self.next().event
        assert isinstance(line, NetFlood)
        return line


def _tx(wire: Wire, guest: Guest, case: Case, seconds: float) -> dict[str, float]:
    """A window in the middle of the guest's sending; or of its pings, which are frames both ways."""
    guest.next(lambda line: line.gone > 0 and (line.answered > 0 or case.way == "tx"), "frame that has gone out")
    before, spent = wire.counters(), cpu_seconds()
    first = guest.report_after(before.at)
    while (heard := guest.next()).at < before.at + seconds:
        pass
    after, used = wire.counters(), cpu_seconds() - spent
    last = heard.event
    assert isinstance(last, NetFlood)
    # What was taken before its line was printed has passed the TAP; nothing that the guest has not sent yet has.
    later = guest.report_after(after.at)
    if not last.gone <= after.from_guest <= later.sent or first.sent < before.from_guest:
        raise BenchError(f"the guest counts {last.gone} to {later.sent} frames sent, the host {after.from_guest}")
    if case.way == "rtt":
        return {"p50_us": last.p50_us, "p99_us": last.p99_us, "pings": last.answered, "lost": last.lost}
    frames = after.from_guest - before.from_guest
    return _figures(case, before, after, frames, after.from_guest_bytes - before.from_guest_bytes, used)


def _rx(wire: Wire, guest: Guest, case: Case, seconds: float, patience: float) -> dict[str, float]:
    with Flood(wire, case.size, case.streams) as flood:
        flood.run(seconds / 4)
        before, spent = wire.counters(), cpu_seconds()
        flood.run(seconds)
        after, used = wire.counters(), cpu_seconds() - spent
        flood.drain(patience)
        dropped = flood.dropped(wire.counters())
        due = flood.sent - dropped
        line = guest.next(lambda line: line.rx >= due, f"{due} frames received by the guest").event
        assert isinstance(line, NetFlood)
        if line.rx > due + STRAY_FRAMES:
            raise BenchError(f"the guest counts {line.rx} frames received, the host sent {due}")
    frames = after.to_guest - before.to_guest
    figures = _figures(case, before, after, frames, after.to_guest_bytes - before.to_guest_bytes, used)
    return {**figures, "dropped": float(dropped), "starved": 100 * flood.empty / flood.looks}


def _figures(
    case: Case, before: Counters, after: Counters, frames: int, size: int, used: float
) -> dict[str, float]:
    """Raises BenchError when the frames are not of the case's size: it would measure something else."""
    if not frames or abs(size / frames - case.size) > 0.01 * case.size:
        raise BenchError(f"{frames} frames have {size} bytes, not {case.size} each")
    took = after.at - before.at
    return {"kpps": frames / took / 1e3, "mb_per_s": size / took / 1e6, "cpu_us": used / frames * 1e6}


def cpu_seconds() -> float:
    """Processor time so far of everything below this process."""
    ticks = 0
    for pid in processes.descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
