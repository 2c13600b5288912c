"""Exec of the VMM to the first byte on the guest's serial port: 'P', written by the kernel's first instruction.

Peers take turns (A B A B …) after one start of each that does not count, which also fills the byte code cache.
"""

from __future__ import annotations

import json
import os
import select
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bench import processes, programs, report
from bench.errors import BenchError

MEMORY: Final = 512  # MiB
CMDLINE: Final = "mode=tick"
QEMU_CPU: Final = "host,-arch-capabilities"  # without it QEMU 7.2 ends with "failed to set MSR 0x10a" on kvm_pvm


def run(kernel: str, runs: int, patience: float) -> dict[str, Any]:
    """Milliseconds per peer. Never raises: what can't be measured is a row that says why."""
    with tempfile.TemporaryDirectory(prefix="bench.") as name:
        folder = Path(name)
        rows = peers(kernel, folder)
        for number in range(runs + 1):
            for row in rows:
                if row.missing:
                    continue
                try:
                    took = sample(folder, row, patience)
                except (BenchError, OSError) as error:
                    row.missing = f"run {number}: {error}"
                    continue
                if number:  # the first is the warm-up
                    row.add(first_byte_ms=took * 1e3)
    return report.result("boot", "ms from exec to the guest's first serial byte", rows, "first_byte_ms")


def peers(kernel: str, folder: Path) -> list[report.Row]:
    rows = []
    makers: dict[str, Callable[[], list[str]]] = {
        "flotilla": lambda: flotilla(kernel, programs.ours("flotilla")),
        "qemu-microvm": lambda: qemu(kernel, programs.qemu()),
        "cloud-hypervisor": lambda: flotilla(kernel, [programs.cloud_hypervisor()]),
        "firecracker": lambda: firecracker(kernel, folder, programs.firecracker()),
    }
    for name, make in makers.items():
        row = report.Row(name, f"{MEMORY}M")
        rows.append(row)
        try:
            row.command = make()
            row.missing = report.kvm_missing() if row.command[0] else "no binary given (see bench/programs.py)"
        except BenchError as error:
            row.missing = str(error)
    return rows


def flotilla(kernel: str, program: list[str]) -> list[str]:
    """Ours and Cloud Hypervisor's: the same words."""
    return [
        *program, "--kernel", kernel, "--cmdline", CMDLINE, "--cpus", "boot=1", "--memory", f"size={MEMORY}M",
        "--serial", "tty", "--console", "off",
    ]  # fmt: skip


def qemu(kernel: str, program: str) -> list[str]:
    return [
        program, "-accel", "kvm", "-M", "microvm", "-cpu", QEMU_CPU, "-m", f"{MEMORY}M", "-nodefaults",
        "-display", "none", "-kernel", kernel, "-append", CMDLINE, "-serial", "stdio",
    ]  # fmt: skip


def firecracker(kernel: str, folder: Path, program: str) -> list[str]:
    config = folder / "firecracker.json"
    source = {"kernel_image_path": kernel, "boot_args": CMDLINE}
    machine = {"vcpu_count": 1, "mem_size_mib": MEMORY}
    config.write_text(json.dumps({"boot-source": source, "drives": [], "machine-config": machine}))
    return [program, "--no-api", "--config-file", str(config)]


def sample(folder: Path, row: report.Row, patience: float) -> float:
    """Seconds. Raises BenchError when the byte does not come."""
    try:
        with processes.Child(folder, row.peer, row.command) as child:
            end = child.began + patience
            while True:
                ready, _, _ = select.select([child.fd], [], [], max(0.0, end - time.monotonic()))
                data = os.read(child.fd, 4096) if ready else b""
                now = time.monotonic()
                if b"P" in data:
                    return now - child.began
                if not data:
                    how = "ended" if ready else f"no byte within {patience:.0f} s"
                    raise BenchError(f"{how}; stderr: {child.errors or 'empty'}")
    finally:
        processes.settle()
