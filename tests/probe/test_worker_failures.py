"""Workers that can't start, at boot and later, and at a destination: the guest waits for its device or runs on.

The console worker opens `--rng src=` itself, without capabilities: a file of mode 000 fails it and not the controller.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Random bytes for `--rng src=`."""
    path = tmp_path / "random"
    path.write_bytes(os.urandom(4 << 20))
    return path


def row(vmm: Vmm) -> dict[str, Any]:
    return vmm.fleet().get("console", {})


def refused(vmm: Vmm, *words: str) -> None:
    """A request fails and its error names device and reason."""
    done = vmm.remote(*words)
    assert done.returncode == 1
    assert "__rng" in done.stderr and "Permission denied" in done.stderr, done.stderr


def test_worker_that_can_not_start_at_boot_is_shown_and_tried_again(tmp_path: Path, source: Path) -> None:
    source.chmod(0)
    with Vmm.guest(tmp_path, "mode=rng", "--rng", f"src={source}") as vmm:
        vmm.wait_api()
        poll(lambda: row(vmm).get("state") == "quarantined")
        assert "Permission denied" in row(vmm)["last_reason"] and row(vmm)["restarts"] >= 3
        assert vmm.ask("info")["state"] == "Running"
        refused(vmm, "pause")
        refused(vmm, "send-migration", "--local", f"unix:{tmp_path}/nobody")
        assert "__rng: no worker" in vmm.errors and "Permission denied" in vmm.errors
        source.chmod(0o644)
        vmm.expect("rng ok 1")  # its driver has waited in the activation
        assert row(vmm)["state"] == "running"
        vmm.ask("pause")
        vmm.ask("resume")
        vmm.more("rng ok ")


def test_vmm_ends_in_order_while_a_worker_can_not_start(tmp_path: Path, source: Path) -> None:
    source.chmod(0)
    with Vmm.guest(tmp_path, "mode=rng", "--rng", f"src={source}") as vmm:
        vmm.wait_api()
        poll(lambda: row(vmm).get("state") == "quarantined")
        vmm.process.send_signal(signal.SIGTERM)
        assert vmm.wait() == 0


def test_killed_worker_without_a_successor_fails_a_pause_and_the_guest_goes_on(tmp_path: Path, source: Path) -> None:
    with Vmm.guest(tmp_path, "mode=rng", "--rng", f"src={source}") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        source.chmod(0)
        os.kill(vmm.pid_of("console"), signal.SIGKILL)
        poll(lambda: row(vmm).get("state") == "quarantined")
        refused(vmm, "pause")
        assert vmm.ask("info")["state"] == "Running"
        source.chmod(0o644)
        vmm.more("rng ok ")
        assert row(vmm)["state"] == "running"


def test_destination_whose_worker_can_not_start_refuses_and_can_receive_again(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "sock"
    with (
        Vmm.guest(tmp_path, "mode=rng", "--rng", f"src={source}", name="one") as vmm,
        Vmm(tmp_path, name="two") as destination,
    ):
        vmm.expect("rng ok 1")
        vmm.wait_api()
        destination.wait_api()
        source.chmod(0)
        receiver = destination.start_remote("receive-migration", f"unix:{path}")
        poll(path.exists)
        refused(vmm, "send-migration", "--local", f"unix:{path}")
        assert receiver.wait(30) == 1
        vmm.more("rng ok ")
        assert "console" not in destination.fleet()
        source.chmod(0o644)
        receiver = destination.start_remote("receive-migration", f"unix:{path}")
        poll(path.exists)
        vmm.ask("send-migration", "--local", f"unix:{path}")
        assert receiver.wait(30) == 0
        destination.expect("rng ok ")
