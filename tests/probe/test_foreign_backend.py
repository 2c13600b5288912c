"""A disk that somebody else serves: `--disk vhost_user=on,socket=` with qemu-storage-daemon."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.vmm import Vmm, poll

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
    with Vmm.guest(tmp_path, "mode=blkload depth=1", "--disk", f"vhost_user=on,socket={daemon.sock}") as vmm:
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


def test_missing_back_end_is_an_error_that_names_the_socket(tmp_path):
    with Vmm.guest(tmp_path, "mode=equal", "--disk", f"vhost_user=on,socket={tmp_path}/none") as vmm:
        assert vmm.wait(60) == 1
        assert f"{tmp_path}/none" in vmm.errors
