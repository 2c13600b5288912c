"""A disk that somebody else serves: `--disk vhost_user=on,socket=` with qemu-storage-daemon."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest

from tests.vmm import Vmm, events, poll

pytestmark = pytest.mark.probe

DISK_SIZE = 16 << 20
DAEMON = "qemu-storage-daemon"


@pytest.fixture
def daemon(tmp_path):
    """Starts qemu-storage-daemon on a disk image; again, if it was ended."""
    if shutil.which(DAEMON) is None:
        pytest.skip(f"{DAEMON} is missing; bash deploy/setup.sh installs it")
    image, sock = tmp_path / "disk.raw", tmp_path / "vhost.sock"
    image.write_bytes(os.urandom(DISK_SIZE))
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        sock.unlink(missing_ok=True)
        command = [
            DAEMON, "--blockdev", f"driver=file,node-name=file,filename={image}", "--export",
            f"type=vhost-user-blk,id=export,node-name=file,addr.type=unix,addr.path={sock},writable=on",
        ]  # fmt: skip
        running.append(subprocess.Popen(command))
        poll(sock.exists)
        return running[-1]

    start.sock = sock  # type: ignore[attr-defined]
    yield start
    for process in running:
        process.kill()
        process.wait()
    sock.unlink(missing_ok=True)


def test_guest_verifies_a_disk_of_qemu_storage_daemon(tmp_path, daemon):
    daemon()
    with Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"vhost_user=on,socket={daemon.sock}") as vmm:
        vmm.expect("blk ok ")
        vmm.more("blk ok ")
        assert b"BAD" not in vmm.output


def test_guest_waits_for_a_back_end_that_was_ended_and_goes_on_with_its_successor(tmp_path, daemon):
    """This daemon keeps no inflight table, so only whole passes of reading are promised across its death."""
    first = daemon()
    with Vmm.guest(tmp_path, "mode=equal", "--disk", f"vhost_user=on,socket={daemon.sock}") as vmm:
        vmm.expect("equal 1 ")
        first.kill()
        first.wait()
        daemon()
        vmm.more("equal ")
        assert b"not equal" not in vmm.output


def test_back_end_killed_again_and_again_under_writes_loses_nothing_at_depth_one(tmp_path, daemon):
    """Without an inflight table a request that was answered out of order would be lost: one at a time none is."""
    running = daemon()
    words = "mode=blkload depth=1 lost_irq_ticks=100"  # a daemon that is killed owes the guest interrupts
    with Vmm.guest(tmp_path, words, "--disk", f"vhost_user=on,socket={daemon.sock}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        for number in range(1, 6):
            running.kill()
            running.wait()
            running = daemon()
            poll(lambda number=number: (row := vmm.fleet()["_disk0"])["restarts"] == number and row["last_stall_ms"])
            vmm.more("blk ok ")
        assert b"BAD" not in vmm.output


def test_back_end_that_is_away_is_shown_and_refuses_a_pause_by_name(tmp_path, daemon):
    running = daemon()
    with Vmm.guest(tmp_path, "mode=equal", "--disk", f"vhost_user=on,socket={daemon.sock}") as vmm:
        vmm.expect("equal 1 ")
        vmm.wait_api()
        assert (vmm.fleet()["_disk0"]["state"], vmm.fleet()["_disk0"]["kind"]) == ("running", "vhost-user")
        running.kill()
        running.wait()
        row = poll(lambda: (now := vmm.fleet()["_disk0"])["state"] == "restarting" and now)
        assert row["last_cause"] == "disconnected" and str(daemon.sock) in row["last_reason"]
        for words in (("pause",), ("send-migration", "--local", f"unix:{tmp_path}/nobody")):
            refused = vmm.remote(*words)
            assert refused.returncode == 1
            assert "_disk0: its vhost-user back end at" in refused.stderr and str(daemon.sock) in refused.stderr
        assert vmm.ask("info")["state"] == "Running"
        daemon()
        poll(lambda: vmm.fleet()["_disk0"]["state"] == "running")
        vmm.ask("pause")
        vmm.ask("resume")
        vmm.more("equal ")


def test_reboot_is_refused_by_name_while_the_back_end_is_away_and_the_guest_runs_on(tmp_path, daemon):
    running = daemon()
    with Vmm.guest(tmp_path, "mode=equal", "--disk", f"vhost_user=on,socket={daemon.sock}") as vmm:
        vmm.expect("equal 1 ")
        vmm.wait_api()
        running.kill()
        running.wait()
        poll(lambda: vmm.fleet()["_disk0"]["state"] == "restarting")
        refused = vmm.remote("reboot")
        assert refused.returncode == 1
        assert f"_disk0: its vhost-user back end at {daemon.sock} is away: " in refused.stderr
        assert vmm.ask("info")["state"] == "Running"
        daemon()
        vmm.more("equal ")
        assert vmm.output.count(b"probe: up") == 1
        vmm.ask("reboot")
        vmm.more("equal 1 ")


@contextmanager
def waiting(tmp_path, daemon):
    """A guest that has reset itself while its disk's back end is away."""
    running = daemon()
    told = tmp_path / "events"
    devices = ["--disk", f"vhost_user=on,socket={daemon.sock}", "--event-monitor", f"path={told}"]
    with Vmm.guest(tmp_path, "mode=acpi reset", *devices) as vmm:
        vmm.expect("probe: up")
        vmm.wait_api()
        running.kill()
        running.wait()
        _, what = poll(lambda: events(told, "reset-waits"))[0]
        assert "_disk0: its vhost-user back end" in what["reason"] and str(daemon.sock) in what["reason"]
        yield vmm


def test_guest_that_resets_itself_while_the_back_end_is_away_boots_when_it_is_back(tmp_path, daemon):
    with waiting(tmp_path, daemon) as vmm:
        assert "can't boot: _disk0: its vhost-user back end" in vmm.errors
        assert vmm.ask("info")["state"] == "Created"
        refused = vmm.remote("pause")
        assert refused.returncode == 1 and "its guest has reset itself and can't boot: _disk0: " in refused.stderr
        daemon()
        vmm.more("probe: up")


@pytest.mark.parametrize("how", ["shutdown", "delete"])
def test_guest_that_waits_for_a_back_end_after_its_reset_can_be_shut_down_and_deleted(tmp_path, daemon, how):
    with waiting(tmp_path, daemon) as vmm:
        config = vmm.ask("info")["config"]
        vmm.ask(how)
        refused = vmm.remote("pause")
        assert refused.returncode == 1 and "has reset itself" not in refused.stderr
        daemon()
        if how == "delete":
            (tmp_path / "config").write_text(json.dumps(config))
            vmm.ask("create", str(tmp_path / "config"))
        vmm.ask("boot")
        vmm.more("probe: up")


def test_vmm_whose_guest_waits_for_a_back_end_after_its_reset_ends_when_it_is_told_to(tmp_path, daemon):
    with waiting(tmp_path, daemon) as vmm:
        vmm.process.send_signal(signal.SIGTERM)
        assert vmm.wait() == 0
        assert not vmm.api.exists()


@pytest.mark.timeout(300)
def test_missing_back_end_is_an_error_that_names_the_socket(tmp_path):
    with Vmm.guest(tmp_path, "mode=equal", "--disk", f"vhost_user=on,socket={tmp_path}/none") as vmm:
        assert vmm.wait(60) == 1
        assert f"{tmp_path}/none" in vmm.errors
