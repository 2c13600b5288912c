"""Supervision of a whole VM under verified load: stopped processes, counters, events, what `ch-remote fleet` says."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.vmm import Vmm, events, poll

pytestmark = pytest.mark.probe

DISK_SIZE = 16 << 20
LOADED = "mode=blkload depth=8 lost_irq_ticks=100"  # a process that is killed owes the guest interrupts


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


def stopped(vmm: Vmm, device: str) -> dict[str, Any]:
    """Stop a process and wait for its successor; the row."""
    pid = vmm.pid_of(device)
    os.kill(pid, signal.SIGSTOP)
    row: dict[str, Any] = poll(
        lambda: (now := vmm.fleet().get(device)) and now["pid"] not in (0, pid) and now["last_stall_ms"] and now
    )
    return row


@pytest.mark.timeout(300)
@pytest.mark.parametrize("device", ["_disk0", "vcpu0"])
def test_stopped_process_is_replaced_under_load_and_everybody_is_told(tmp_path: Path, disk: Path, device: str) -> None:
    monitor = tmp_path / "events"
    arguments = ["--disk", f"path={disk}", "--event-monitor", f"path={monitor}"]
    with Vmm.guest(tmp_path, LOADED, *arguments) as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        row = stopped(vmm, device)
        assert (row["last_cause"], row["last_reason"]) == ("hung", "stopped by a signal")
        assert row["restarts"] == 1
        told = [(event, properties) for event, properties in events(monitor) if properties.get("name") == device]
        assert [event for event, _ in told] == ["worker-lost", "worker-restarted"]
        assert told[0][1]["cause"] == "hung" and told[1][1]["stall_ms"] == row["last_stall_ms"]
        assert f"{device} (pid {told[0][1]['pid']}) is lost, hung: stopped by a signal" in vmm.errors
        vmm.more("blk ok ", 60)
        assert b"BAD" not in vmm.output


@pytest.mark.parametrize("device", ["console", "janitor", "api", "zygote"])
def test_stopped_helper_process_is_replaced(tmp_path: Path, device: str) -> None:
    with Vmm.guest(tmp_path, "mode=rng") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        poll(lambda: "janitor" in vmm.fleet())
        if device == "api":  # it can't be asked meanwhile
            os.kill(vmm.pid_of("api"), signal.SIGSTOP)
            vmm.wait_api()
            row = vmm.fleet()["api"]
        else:
            row = stopped(vmm, device)
        assert (row["last_cause"], row["restarts"]) == ("hung", 1)
        vmm.more("rng ok ")


@pytest.mark.timeout(300)
def test_pause_takes_a_stopped_vcpu_and_a_stopped_disk_with_it(tmp_path: Path, disk: Path) -> None:
    """Both are replaced while the pause waits for them."""
    with Vmm.guest(tmp_path, LOADED, "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        for device in ("vcpu0", "_disk0"):
            os.kill(vmm.pid_of(device), signal.SIGSTOP)
            vmm.ask("pause")
            assert vmm.ask("info")["state"] == "Paused"
            vmm.ask("resume")
            vmm.more("blk ok ", 60)
        assert b"BAD" not in vmm.output


def serves(row: dict[str, Any], gone: int) -> bool:
    """Whether it is the row of a successor that is up: one that is killed before may not count as a loss."""
    return row["pid"] not in (0, gone) and row["state"] in ("running", "degraded")


def test_counters_go_on_over_kills(tmp_path: Path, disk: Path) -> None:
    with Vmm.guest(tmp_path, LOADED, "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        before = vmm.ask("counters")["_disk0"]
        for _ in range(3):
            pid = vmm.pid_of("_disk0")
            os.kill(pid, signal.SIGKILL)
            poll(lambda pid=pid: serves(vmm.fleet()["_disk0"], pid))
            after = vmm.ask("counters")["_disk0"]
            for name in ("read_ops", "write_ops", "read_bytes", "write_bytes"):
                assert after[name] >= before[name]
            before = after
        poll(lambda: vmm.fleet()["_disk0"]["state"] == "degraded")
        row = vmm.fleet()["_disk0"]
        assert (row["restarts"], row["last_cause"]) == (3, "ended")


def test_healthy_vm_is_never_taken_for_a_hung_one(tmp_path: Path, disk: Path) -> None:
    with Vmm.guest(tmp_path, "mode=rng", "--disk", f"path={disk}") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        for _ in range(8):  # each takes long enough for a round of the watchdog or more
            assert all(row["last_cause"] is None for row in vmm.fleet().values())
        assert "is lost" not in vmm.errors
