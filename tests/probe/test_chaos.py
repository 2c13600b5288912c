"""Campaigns on /dev/kvm: any process but the controller may die at any moment, and the guest's data stays whole.

    FLOTILLA_KILLS=1000               random kills over all kinds of processes (default 60)
    FLOTILLA_CHAOS_MIGRATIONS=200     migrations during which a process is killed (default 6)
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from chaos.schedule import DEFAULT_PROCESSES
from tests.netns import network_namespace
from tests.netpeer import Flow, ping
from tests.probe.net.rig import GUEST, HOST
from tests.vmm import Vmm, environment, poll

pytestmark = pytest.mark.probe

KILLS = int(os.environ.get("FLOTILLA_KILLS", "60"))
SEED = int(os.environ.get("FLOTILLA_CHAOS_SEED", "1"))
DISK_SIZE = 16 << 20
CHAOS = "import sys; from controller.main import main; sys.exit(main(['chaos', *sys.argv[1:]]))"


def chaos(vmm: Vmm, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHAOS, "--api-socket", str(vmm.api), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


@pytest.fixture
def network():
    with network_namespace():
        yield


@pytest.fixture
def loaded(tmp_path, disk, network):
    """A guest that verifies disk, network and RAM, with every kind of process."""
    words = "mode=blkload,net,rng rng.every_ms=20 depth=8 cpus=2 ap=ram ap.mb=4 ap.rate=20"
    devices = ["--disk", f"path={disk}", "--net", f"ip={HOST}", "--console", f"file={tmp_path}/console"]
    with Vmm.guest(
        tmp_path, words, *devices, "--cpus", "boot=2", "--memory", "size=128M", "--allow-fault-injection"
    ) as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        poll(lambda: {row["kind"] for row in vmm.fleet().values()} >= {"janitor", "console", "net", "blk"})
        ping(GUEST)
        yield vmm


@pytest.mark.timeout(120 + 3 * KILLS)
def test_random_kills_over_all_kinds_lose_nothing(tmp_path, loaded, disk):
    """The guest verifies every block and datagram, and the image is verified from outside with the VM paused."""
    report = tmp_path / "report.json"
    with Flow(GUEST) as flow:
        done = chaos(
            loaded, "--seed", str(SEED), "--count", str(KILLS), "--kinds", "kill", "--rate", "50",
            "--verify", str(disk), "--verify-every", "25", "--report", str(report), seconds=60 + 3 * KILLS,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr}\n{loaded.errors[-3000:]}"
        flow.goes_on()
        loaded.more("blk ok ", 60)
        loaded.more("blk ok ", 60)
    print(done.stdout[-900:])
    found = json.loads(report.read_text())
    assert found["outcome"] == "ok" and found["verifications"] > KILLS // 25
    assert sum(row["injected"] for row in found["rows"]) == KILLS
    assert all(row["recovered"] == row["injected"] and not row["lost"] for row in found["rows"])
    assert {row["process"] for row in found["rows"]} == set(DEFAULT_PROCESSES)
    assert b"BAD" not in loaded.output


def rand() -> random.Random:
    return random.Random(SEED)
