"""Proportional set size beyond guest RAM, per process, with 1 vCPU, 2 disks and a console.

Each address space counts once: our vCPU processes live in the controller's. Guest RAM is what is mapped of the RAM's
memfd. The API process is told apart: it is there only when an API socket is asked for. A sample is taken once the guest
has read both disks and all of the fleet is up.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bench import processes, programs, report
from bench.boot import QEMU_CPU
from bench.errors import BenchError
from bench.recorder import Recorder
from guest.lines import Done

MEMORY: Final = 512  # MiB
DISK_SIZE: Final = 16 << 20
CMDLINE: Final = "mode=equal,equal passes=2"
# QEMU's microvm has no MCFG table and assigns no BARs.
MICROVM_WORDS: Final = "ecam=0xe0000000 bars=0xc0000000"
GOAL_KIB: Final = 45 << 10
FLEET: Final = {"api", "blk", "console", "controller", "janitor", "vcpu", "zygote"}
IDLE_SECONDS: Final = 1.0


def run(kernel: str, runs: int, patience: float) -> dict[str, Any]:
    """KiB per peer. Never raises: what can't be measured is a row that says why."""
    with tempfile.TemporaryDirectory(prefix="bench.") as name:
        folder = Path(name)
        for disk in ("a", "b"):
            (folder / disk).write_bytes(bytes(DISK_SIZE))
        rows = peers(kernel, folder)
        taken: dict[str, list[list[processes.Footprint]]] = {}
        for number in range(runs):
            for row in rows:
                if not row.missing:
                    try:
                        taken.setdefault(row.peer, []).append(sample(folder, row, patience))
                    except (BenchError, OSError) as error:
                        row.missing = f"run {number}: {error}"
        for row in rows:
            summarize(row, taken.get(row.peer, []))
    notes = [
        f"goal for flotilla without the API process: {GOAL_KIB} KiB",
        "PSS shares a page among all that map it: other Python programs on this machine make ours look smaller",
    ]
    return report.result("footprint", "KiB of PSS beyond guest RAM", rows, "without_api_kib", notes)


def peers(kernel: str, folder: Path) -> list[report.Row]:
    makers: dict[str, Callable[[], list[str]]] = {
        "flotilla": lambda: flotilla(kernel, folder, programs.ours("flotilla")),
        "qemu-microvm": lambda: qemu(kernel, folder, programs.qemu(), "microvm,pcie=on"),
        "qemu-q35": lambda: qemu(kernel, folder, programs.qemu(), "q35"),
        "cloud-hypervisor": lambda: flotilla(kernel, folder, [programs.cloud_hypervisor()]),
    }
    rows = []
    for name, make in makers.items():
        row = report.Row(name, "1 vCPU, 2 disks, console" if "qemu" not in name else "1 vCPU, 2 disks")
        rows.append(row)
        try:
            row.command = make()
            row.missing = report.kvm_missing() if row.command[0] else "no binary given (see bench/programs.py)"
        except BenchError as error:
            row.missing = str(error)
    return rows


def flotilla(kernel: str, folder: Path, program: list[str]) -> list[str]:
    return [
        *program, "--kernel", kernel, "--cmdline", CMDLINE, "--cpus", "boot=1",
        "--memory", f"size={MEMORY}M,shared=on", "--disk", f"path={folder}/a", f"path={folder}/b",
        "--serial", "tty", "--console", f"file={folder}/console", "--api-socket", f"{folder}/api",
    ]  # fmt: skip


def qemu(kernel: str, folder: Path, program: str, machine: str) -> list[str]:
    words = f"{CMDLINE} {MICROVM_WORDS}" if machine.startswith("microvm") else CMDLINE
    command = [
        program, "-accel", "kvm", "-cpu", QEMU_CPU, "-m", f"{MEMORY}M", "-M", f"{machine},memory-backend=ram",
        "-object", f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on", "-nodefaults", "-display", "none",
        "-kernel", kernel, "-append", words, "-serial", "stdio",
    ]  # fmt: skip
    for disk in ("a", "b"):
        command += ["-drive", f"file={folder}/{disk},format=raw,if=none,id={disk}"]
        command += ["-device", f"virtio-blk-pci,drive={disk},disable-legacy=on"]
    return command


def sample(folder: Path, row: report.Row, patience: float) -> list[processes.Footprint]:
    """One start. Raises BenchError."""
    try:
        with Recorder() as recorder, processes.Child(folder, row.peer, row.command) as child:
            recorder.add(child.fd, row.peer)
            try:
                recorder.until(lambda heard: isinstance(heard.event, Done), patience, "end of the passes")
            except BenchError as error:
                raise BenchError(f"{error}; stderr: {child.errors or 'empty'}") from error
            names = fleet(folder, patience) if row.peer == "flotilla" else {}
            time.sleep(IDLE_SECONDS)
            return processes.footprints(child.pid, names)
    finally:
        processes.settle()


def fleet(folder: Path, patience: float) -> dict[int, str]:
    """pid -> name, once every kind of process is there. Raises BenchError."""
    command = [*programs.ours("ch-remote"), "--api-socket", f"{folder}/api", "fleet"]
    end = time.monotonic() + patience
    while True:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=patience, env=programs.environment()
        )
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        if {row["kind"] for row in rows} >= FLEET:
            return {row["pid"]: " ".join(dict.fromkeys((row["kind"], row["device"]))) for row in rows}
        if time.monotonic() > end:
            raise BenchError(f"the fleet is not complete within {patience:.0f} s: {done.stdout}{done.stderr}")
        time.sleep(0.1)


def summarize(row: report.Row, taken: list[list[processes.Footprint]]) -> None:
    """Totals of every sample, and the processes of the one whose total is the median."""
    if not taken:
        return
    for spaces in taken:
        total = sum(space.kib for space in spaces)
        api = sum(space.kib for space in spaces if _is_api(space))
        row.add(without_api_kib=total - api, api_kib=api if api else None)
    totals = [sum(space.kib for space in spaces) for spaces in taken]
    middle = taken[totals.index(statistics.median_low(totals))]
    row.details["processes"] = [
        {"name": " + ".join(space.names), "kib": space.kib, "ram_kib": space.ram_kib, "pids": list(space.pids)}
        for space in middle
    ]


def _is_api(space: processes.Footprint) -> bool:
    return "api" in space.names
