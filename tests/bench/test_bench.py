"""Each bench as a user starts it: it ends with 0 and its JSON has the figures. How large they are is not judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import unconfined
from tests.vmm import Vmm

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 240
HAS_QEMU = shutil.which("qemu-system-x86_64") is not None

pytestmark = [pytest.mark.probe, pytest.mark.timeout(SECONDS + 30)]


def bench(*words, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, "-m", "bench", *words, "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
    )
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    return done.returncode, answer, {row["peer"]: row for row in answer["rows"]}


def has_figures(row, *names, n=1):
    assert row["missing"] is None
    for name in names:
        figure = row["figures"][name]
        assert figure["n"] == n and 0 <= figure["min"] <= figure["median"] <= figure["max"]


def test_boot():
    code, answer, rows = bench("boot", "--runs", "2")
    assert (code, answer["bench"], answer["where"]) == (0, "boot", "here")
    has_figures(rows["flotilla"], "first_byte_ms", n=2)
    assert "no binary given" in rows["cloud-hypervisor"]["missing"]
    if HAS_QEMU:
        has_figures(rows["qemu-microvm"], "first_byte_ms", n=2)
        assert answer["ratios"]["qemu-microvm 512M"] > 0


def test_footprint_tells_the_api_apart_and_counts_the_vcpu_with_the_controller():
    code, _, rows = bench("footprint", "--runs", "1")
    assert code == 0
    own = rows["flotilla"]
    has_figures(own, "without_api_kib", "api_kib")
    names = [each["name"] for each in own["processes"]]
    assert "controller + vcpu vcpu0" in names and "api" in names
    assert sum(name.startswith("blk ") for name in names) == 2
    assert sum(each["kib"] for each in own["processes"]) == sum(own["figures"][f]["min"] for f in own["figures"])
    assert sum(each["ram_kib"] for each in own["processes"]) > 0
    if HAS_QEMU:
        has_figures(rows["qemu-microvm"], "without_api_kib")


def test_migrate_local():
    code, _, rows = bench("migrate-local", "--runs", "1", "--sizes", "256M")
    assert code == 0
    has_figures(rows["flotilla"], "downtime_ms", "guest_gap_ms", "total_ms", "steady_gap_ms")
    assert rows["qemu-microvm"]["missing"] or rows["qemu-microvm"]["figures"]["downtime_ms"]["n"] == 1


def test_migrate_remote():
    code, answer, rows = bench("migrate-remote", "--sizes", "256M", "--ways", "unix", "--rates", "50")
    assert code == 0 and answer["bench"] == "migrate-remote"
    own = rows["flotilla"]
    has_figures(own, "downtime_ms", "guest_gap_ms", "total_ms", "mb_per_s", "wire_mb", "wire_per_ram", "rounds")
    assert own["figures"]["wire_mb"]["min"] > 128  # half of RAM is filled
    (rounds,) = own["rounds"]
    assert len(rounds["sent_mb"]) == len(rounds["simulated_mb"]) == own["figures"]["rounds"]["min"]
    assert sum(rounds["sent_mb"]) == pytest.approx(own["figures"]["wire_mb"]["min"], rel=0.05)
    assert any(note.startswith("rounds of flotilla 256M unix 50, MB: ") for note in answer["notes"])
    assert rows["qemu-microvm"]["missing"] or rows["qemu-microvm"]["figures"]["wire_mb"]["n"] == 1


def test_faults():
    code, answer, _ = bench("faults", "--runs", "1", "--cases", "blk kill depth=1", "net kill", "vcpu kill")
    assert code == 0 and answer["bench"] == "faults"
    rows = {(row["peer"], row["case"]): row for row in answer["rows"]}
    for case in ("blk kill depth=1", "net kill", "vcpu kill"):
        has_figures(rows["flotilla", case], "stall_ms", "steady_ms")
        assert rows["flotilla", case]["figures"]["stall_ms"]["min"] > 0
    peer = rows["qemu-storage-daemon", "blk kill depth=1"]
    assert peer["missing"] or peer["figures"]["stall_ms"]["n"] == 1


def test_peer_that_cannot_run_is_reported_with_the_reason(tmp_path):
    broken = tmp_path / "cloud-hypervisor"
    broken.write_text("#!/bin/sh\necho not today >&2; exit 3\n")
    broken.chmod(0o755)
    variables = {"FLOTILLA_BENCH_CLOUD_HYPERVISOR": str(broken), "FLOTILLA_BENCH_QEMU": str(tmp_path / "absent")}
    code, _, rows = bench("boot", "--runs", "1", **variables)
    assert code == 0 and rows["flotilla"]["missing"] is None
    assert "run 0: ended; stderr: not today" in rows["cloud-hypervisor"]["missing"]
    assert "not a program that can be run" in rows["qemu-microvm"]["missing"]


def test_sandbox():
    code, answer, rows = bench("sandbox", "--runs", "1", "--seconds", "0.2")
    assert (code, answer["bench"]) == (0, "sandbox")
    for peer, mode in (("flotilla", "true"), ("flotilla-unfiltered", "false"), ("flotilla-unconfined", "false")):
        has_figures(rows[peer], "iops", "first_io_ms")
        assert rows[peer]["command"][-2:] == ["--seccomp", mode]
    others = ("flotilla-unfiltered", "flotilla-unconfined")
    assert set(answer["ratios"]) == {f"{peer} {name}" for peer in others for name in ("iops", "first_io_ms")}


def test_the_bench_of_the_sandbox_can_take_it_away(tmp_path):
    """Read from the kernel: a worker of the one to compare with has nothing that the sandbox would have given it."""
    code = unconfined.argv([sys.executable, "-c", "import sys; from controller.main import main; sys.exit(main())"])[-1]
    with Vmm.guest(tmp_path, "mode=rng", "--seccomp", "false", program=code) as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        row = next(row for row in vmm.ask("sandbox") if row["kind"] == "console")
        assert (row["namespaces"], row["root"], row["seccomp"]) == ([], "shared", "none")
        assert (row["capabilities"] != "0") is (os.geteuid() == 0)
