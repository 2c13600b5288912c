"""How long a guest under load waits while a process of its VMM fails and is replaced, as the guest sees it.

A case is a kind of process and a fault: `kill` SIGKILL, `hang` SIGSTOP that nobody ends but supervision, `protocol`
garbage on the vhost-user connection. The faults of one case hit one VM, a second and more apart, so that each is the
first.

    blk                            longest request that was answered in the reports around the fault (mode=blkload)
    vcpu                           largest gap between two looks at the clock (mode=tick)
    net                            longest silence of pings from the host, one every 5 ms (mode=net)
    console api zygote janitor     as blk: what the guest's disk feels of their replacement

`steady_ms` is the same of the second before: what the machine's own noise is worth.

The peer: QEMU with vhost-user-blk and reconnect=1 (it has nothing shorter), whose qemu-storage-daemon is killed and at
once started again. That daemon keeps no table of what is in flight, so its guest has one request at a time, and so has
ours in the case beside it.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import processes, programs, report
from bench.boot import QEMU_CPU
from bench.errors import BenchError
from bench.flows import Pings
from bench.footprint import MICROVM_WORDS
from bench.recorder import Heard, Recorder
from bench.wire import GUEST, GUEST_MAC, NAME, Wire, namespace
from chaos.client import Api, Gone, Refused
from guest.lines import BlkOk, NetOpen, Ready, Tick

REPORT_MS: Final = 50
STEADY_SECONDS: Final = 1.3  # what lived that long is replaced without a delay
MARGIN_SECONDS: Final = 0.2
LATE_SECONDS: Final = 1.0  # that a report may take to us on a busy host
REPLACED_SECONDS: Final = 15.0
COMMON_US: Final = 1000  # a gap that no clock takes for one of its own
DISK_BYTES: Final = 16 << 20
DAEMON: Final = "qemu-storage-daemon"
STALL_US: Final = 500_000  # half of what QEMU rests before it asks for the daemon again; no healthy request takes that
GOALS: Final = (
    "goals: kill at most 20 ms median and 50 ms p99 for blk, net and vcpu; a hang is found within its deadline plus "
    "100 ms (docs/fault-isolation.md)"
)
FAULTS: Final[dict[str, dict[str, Any]]] = {
    "kill": {"fault": "kill"},
    "hang": {"fault": "stop"},
    "protocol": {"fault": "corrupt-protocol"},
}
LOADS: Final = {"vcpu": "tick spin=1", "net": "net"}
DISK_LOAD: Final = "blkload"


@dataclass(frozen=True, slots=True)
class Case:
    process: str
    fault: str
    depth: int = 8

    def __str__(self) -> str:
        return f"{self.process} {self.fault}" + (" depth=1" if self.depth == 1 else "")

    @property
    def words(self) -> str:
        load = LOADS.get(self.process, DISK_LOAD)
        return f"mode={load} depth={self.depth} ip={GUEST} report_ms={REPORT_MS}"


CASES: Final = (
    *(Case(process, fault) for process in ("blk", "net") for fault in FAULTS),
    Case("blk", "kill", depth=1),
    *(Case("vcpu", fault) for fault in ("kill", "hang")),
    *(Case(process, "kill") for process in ("console", "api", "zygote", "janitor")),
)


def run(kernel: str, runs: int, patience: float, only: Sequence[str] = ()) -> dict[str, Any]:
    """`runs` faults per case. Never raises for what can't be measured: that is a row that says why."""
    rows = []
    for case in CASES:
        if not only or str(case) in only:
            rows.append(_one(report.Row("flotilla", str(case)), partial(ours, kernel, case, runs, patience)))
            if case.depth == 1:
                peer = report.Row("qemu-storage-daemon", str(case))
                rows.append(_one(peer, partial(qemu, kernel, case, runs, patience)))
    notes = [GOALS, "qemu-storage-daemon: killed and at once started again; QEMU asks for it once a second"]
    return report.result("faults", "ms that the guest waits", rows, "stall_ms", notes)


def _one(row: report.Row, measure: Callable[[report.Row], None]) -> report.Row:
    row.missing = report.kvm_missing()
    if row.missing:
        return row
    try:
        measure(row)
    except (BenchError, OSError) as error:
        row.missing = str(error)
    finally:
        with contextlib.suppress(BenchError):
            processes.settle()
    return row


# Ours ----------------------------------------------------------------------------------------------------------------


def ours(kernel: str, case: Case, runs: int, patience: float, row: report.Row) -> None:
    """Raises BenchError; what has been measured so far is in the row."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench.")))
        api = Api(f"{folder}/api")
        row.command = [
            *programs.ours("flotilla"), "--kernel", kernel, "--cmdline", case.words, "--cpus", "boot=1",
            "--memory", "size=256M", "--serial", "tty", "--console", f"file={folder}/console",
            "--disk", f"path={image(folder)}", "--api-socket", api.path, "--allow-fault-injection",
        ]  # fmt: skip
        if case.process == "net":
            stack.enter_context(namespace())
            stack.enter_context(Wire(1))
            row.command += ["--net", f"tap={NAME},mac={GUEST_MAC}"]
        child = stack.enter_context(processes.Child(folder, "vmm", row.command))
        recorder = stack.enter_context(Recorder())
        recorder.add(child.fd, "guest")
        stall = stack.enter_context(watching(case, recorder, patience))
        _wait(lambda: _pid(api, case.process), patience, f"{case.process} process")
        for _ in range(runs):
            time.sleep(STEADY_SECONDS)
            pid = _pid(api, case.process)
            began = time.monotonic()
            _strike(api, case)
            if case.process == "zygote":  # it is started again when somebody is to be forked
                _wait(partial(_pid, api, "console"), REPLACED_SECONDS, "console process")
                _strike(api, Case("console", "kill"))
            _wait(partial(_replaced, api, case.process, pid), REPLACED_SECONDS, "successor")
            steady, waited = stall(began, time.monotonic())
            row.add(stall_ms=waited, steady_ms=steady)


def _strike(api: Api, case: Case) -> None:
    try:
        api.put("vmm.fault-inject", {"process": _name(api, case.process), **FAULTS[case.fault]})
    except (Refused, Gone) as error:
        raise BenchError(f"the fault was not injected: {error}") from error


def _rows(api: Api, kind: str) -> list[dict[str, Any]]:
    try:
        return [row for row in api.get("vmm.fleet") if row["kind"] == kind]
    except (Gone, Refused):  # the API process is on its way
        return []


def _name(api: Api, kind: str) -> str:
    rows = _rows(api, kind)
    return str(rows[0]["device"]) if rows else kind


def _pid(api: Api, kind: str) -> int:
    """0: there is none that serves."""
    rows = [row for row in _rows(api, kind) if kind == "vcpu" or row["state"] in ("running", "degraded")]
    return int(rows[0]["pid"]) if rows else 0


def _replaced(api: Api, kind: str, pid: int) -> bool:
    return _pid(api, kind) not in (0, pid)


# What the guest feels ------------------------------------------------------------------------------------------------

Stall = Callable[[float, float], tuple[float, float]]


@contextlib.contextmanager
def watching(case: Case, recorder: Recorder, patience: float) -> Iterator[Stall]:
    """Once the guest is under load: a function that tells, of a fault at `began` whose repair was seen at `ended`, how
    long the guest waited in the second before and then, in ms."""
    if case.process != "net":
        recorder.until(lambda heard: isinstance(heard.event, Ready), patience, "guest that is ready")
        yield partial(reported, recorder, patience, Tick if case.process == "vcpu" else BlkOk)
        return
    recorder.until(lambda heard: isinstance(heard.event, NetOpen), patience, "guest with a card")
    with Pings(GUEST) as pings:
        pings.goes_on(50, patience)

        def silence(began: float, ended: float) -> tuple[float, float]:
            pings.goes_on(50, patience)
            before, gap = pings.gap_ms(began - STEADY_SECONDS, began - MARGIN_SECONDS), pings.gap_ms(began, ended)
            assert before is not None and gap is not None
            return before, gap

        yield silence


def reported(
    recorder: Recorder, patience: float, kind: type[Tick | BlkOk], began: float, ended: float
) -> tuple[float, float]:
    """The worst of the reports in the second before `began`, and of those from then until a second after `ended`."""
    last = recorder.until(
        lambda heard: isinstance(heard.event, kind) and heard.at > ended + LATE_SECONDS, patience, "report"
    )
    events = recorder.events[: last + 1]
    rate = tsc_per_us(events)
    before = (_worst(heard, rate) for heard in events if began - STEADY_SECONDS < heard.at < began)
    return max(before, default=0.0), max(_worst(heard, rate) for heard in events if heard.at >= began)


def tsc_per_us(events: Sequence[Heard]) -> float:
    """By the gaps that both of the guest's clocks saw; 0: there were none."""
    ticks = [heard.event for heard in events if isinstance(heard.event, Tick)]
    return min((tick.gap_tsc / tick.gap_us for tick in ticks if tick.gap_us >= COMMON_US), default=0.0)


def _worst(heard: Heard, rate: float) -> float:
    """ms. A gap may fall between the readings of the two clocks, so that only one of them sees it."""
    event = heard.event
    if isinstance(event, BlkOk):
        return event.recent_us / 1e3
    if isinstance(event, Tick):
        return max(event.gap_us, event.gap_tsc / rate if rate else 0.0) / 1e3
    return 0.0


# The peer ------------------------------------------------------------------------------------------------------------


def qemu(kernel: str, case: Case, runs: int, patience: float, row: report.Row) -> None:
    """Raises BenchError, as ours()."""
    if shutil.which(DAEMON) is None:
        raise BenchError(f"{DAEMON} is not in PATH; bash deploy/setup.sh installs it")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench.")))
        daemon = Daemon(folder)
        stack.callback(daemon.kill)
        daemon.start(patience)
        row.command = [
            programs.qemu(), "-accel", "kvm", "-M", "microvm,pcie=on,pic=off,pit=off,memory-backend=ram",
            "-cpu", QEMU_CPU, "-m", "256M", "-object", "memory-backend-memfd,id=ram,size=256M,share=on",
            "-nodefaults", "-no-reboot",
            "-display", "none", "-serial", "stdio", "-kernel", kernel,
            "-append", f"{case.words} {MICROVM_WORDS}",
            "-chardev", f"socket,id=disk,path={daemon.socket},reconnect=1",
            "-device", "vhost-user-blk-pci,chardev=disk,num-queues=1,disable-legacy=on",
        ]  # fmt: skip
        child = stack.enter_context(processes.Child(folder, "qemu", row.command))
        recorder = stack.enter_context(Recorder())
        recorder.add(child.fd, "guest")
        try:
            stall = stack.enter_context(watching(case, recorder, patience))
            for _ in range(runs):
                time.sleep(STEADY_SECONDS)
                began = time.monotonic()
                daemon.kill()
                daemon.start(patience)
                done = answered(recorder, began, patience)
                steady, waited = stall(began, done)
                row.add(stall_ms=waited, steady_ms=steady)
        except BenchError as error:
            raise BenchError(f"{error}; {child.errors}") from error


def answered(recorder: Recorder, began: float, patience: float) -> float:
    """When a report told of a request that had waited for the daemon. The guest goes on reporting while it waits."""
    first = recorder.until(
        lambda heard: isinstance(heard.event, BlkOk) and heard.at > began and heard.event.recent_us >= STALL_US,
        patience, "report of a request that waited for the daemon",
    )  # fmt: skip
    return recorder.events[first].at


class Daemon:
    """qemu-storage-daemon on an image of its own, at one socket. What it says is kept for messages."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "vhost"
        self._said = folder / "daemon.output"
        self._image = image(folder)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, patience: float) -> None:
        """Returns when it listens. Raises BenchError, with what it said."""
        self.socket.unlink(missing_ok=True)
        with open(self._said, "wb") as said:
            self._process = subprocess.Popen([
                DAEMON, "--blockdev", f"driver=file,node-name=file,filename={self._image}", "--export",
                f"type=vhost-user-blk,id=export,node-name=file,addr.type=unix,addr.path={self.socket},writable=on",
            ], stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)  # fmt: skip
        process = self._process
        try:
            _wait(lambda: self.socket.exists() or process.poll() is not None, patience, f"socket of {DAEMON}")
        except BenchError as error:
            raise BenchError(f"{error}; {self._words()}") from error
        if process.poll() is not None:
            raise BenchError(f"{DAEMON} ended with {process.returncode}; {self._words()}")

    def _words(self) -> str:
        return " ".join(self._said.read_text(errors="replace").split())[-400:]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def image(folder: Path) -> Path:
    path = folder / "disk.raw"
    path.touch()
    with open(path, "r+b") as file:
        file.truncate(DISK_BYTES)
    return path


def _wait(check: Callable[[], object], patience: float, what: str) -> None:
    end = time.monotonic() + patience
    while not check():
        if time.monotonic() > end:
            raise BenchError(f"no {what} within {patience:.0f} s")
        time.sleep(0.02)
