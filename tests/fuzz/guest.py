"""The probe guest's `mode=fuzz` in a VM with a disk, a card, a console and rng; what must hold while and after it runs.

`python -m tests.fuzz.guest [--minutes M | --steps N] [--seed S]`: one seed after the other until the time is up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controller.machine.hostcpu import host_phys_bits
from controller.machine.layout import compute
from tests.network import Network
from tests.vmm import Vmm, poll, probe

RAM = 128 << 20
DISK = 16 << 20
STEP_SECONDS = 0.05  # far more than a step takes, on any host
STATES = {"running", "restarting", "degraded", "quarantined"}  # of a worker that was abused


def words(seed: int, steps: int) -> str:
    """The guest's command line. Registers that only the DSDT's methods know are told by word."""
    layout = compute(RAM, host_phys_bits())
    places = f"ged={layout.ged.start:#x} phpr={layout.pci_hotplug.start:#x} pres={layout.cpu_hotplug.start:#x}"
    return f"mode=fuzz seed={seed} passes={steps} report_ms=5000 {places}"


@contextmanager
def machine(folder: Path, cmdline: str) -> Iterator[Vmm]:
    (folder / "disk.raw").write_bytes(bytes(DISK))
    network = Network(opened=False)
    try:
        with network.inside():
            vmm = Vmm.guest(
                folder, cmdline, "--disk", f"path={folder / 'disk.raw'}", "--net", f"tap={network.NAME}",
                "--console", f"file={folder / 'console'}",
            )  # fmt: skip
        with vmm:
            yield vmm
    finally:
        network.close()


def finished(vmm: Vmm, steps: int, since: int = 0) -> int:
    """Until the guest has made all its steps; where its output ends then."""
    return vmm.expect(r"fuzz ok \d+ irqs=\d+\nprobe: done bad=0\n", 30 + STEP_SECONDS * steps, since).end()


def settled(rows: dict[str, Any]) -> dict[str, Any]:
    """Nothing while a worker comes or goes."""
    return {} if {row["state"] for row in rows.values()} & {"starting", "stopping"} else rows


def healthy(vmm: Vmm, pid: int) -> None:
    """It lives, answers, and at worst a device is being restarted or set aside."""
    assert vmm.process.poll() is None and vmm.process.pid == pid, vmm.errors[-3000:]
    assert vmm.ask("ping")["pid"] == pid
    assert vmm.ask("info")["state"] == "Running"
    # A worker that has just been condemned is "stopping" until its end is seen, and its device's successor "starting".
    rows: dict[str, Any] = poll(lambda: settled(vmm.fleet()))
    assert {"_disk0", "_net1", "console", "vcpu0"} <= set(rows)
    assert {row["state"] for row in rows.values()} <= STATES, rows
    assert "Traceback" not in vmm.errors and "unexpected" not in vmm.errors, vmm.errors[-3000:]


def config(folder: Path, cmdline: str) -> dict[str, Any]:
    return {
        "payload": {"kernel": probe(), "cmdline": cmdline}, "memory": {"size": RAM}, "serial": {"mode": "Tty"},
        "console": {"mode": "Off"}, "disks": [{"path": str(folder / "disk.raw")}],
    }  # fmt: skip


def campaign(folder: Path, seed: int, steps: int) -> None:
    """One guest's life, its second after a reboot, then another guest in the same VMM, which verifies its disk."""
    with machine(folder, words(seed, steps)) as vmm:
        pid = vmm.process.pid
        vmm.wait_api()
        end = finished(vmm, steps)
        healthy(vmm, pid)
        vmm.ask("reboot")
        end = finished(vmm, steps, end)
        healthy(vmm, pid)
        vmm.ask("delete")
        (folder / "vm.json").write_text(json.dumps(config(folder, "mode=blkload,rng rng.passes=5 blkload.passes=2")))
        vmm.ask("create", str(folder / "vm.json"))
        vmm.ask("boot")
        vmm.expect(r"probe: done bad=0\n", 60, end)
        healthy_again = vmm.ask("ping")["pid"]
        assert healthy_again == pid and b"BAD" not in vmm.output[end:]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz.guest", description=__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=20_000, help="of one guest")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "little"))
    given = parser.parse_args(argv)
    end = time.monotonic() + 60 * (given.minutes or 0)
    seed = given.seed
    while True:
        with tempfile.TemporaryDirectory(prefix="fl.") as folder:
            os.environ["XDG_RUNTIME_DIR"] = folder
            try:
                campaign(Path(folder), seed, given.steps)
            except AssertionError as error:
                print(f"guest: FINDING: seed {seed}, {given.steps} steps: {error}", flush=True)
                print(f"guest: again: python -m tests.fuzz.guest --seed {seed} --steps {given.steps}", flush=True)
                return 1
        print(f"guest: seed {seed}: {given.steps} steps twice, no finding", flush=True)
        seed += 1
        if time.monotonic() >= end:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
