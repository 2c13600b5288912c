"""Local migration of the probe guest on /dev/kvm, by the commands of the document."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.netns import network_namespace
from tests.vmm import REMOTE, Vmm, environment, poll

pytestmark = pytest.mark.probe

HOPS = int(os.environ.get("FLOTILLA_HOPS", "10"))
DISK_SIZE = 16 << 20


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


class Receiver:
    """`ch-remote receive-migration`, which blocks until the guest is there."""

    def __init__(self, vmm: Vmm, path: object) -> None:
        command = [sys.executable, "-c", REMOTE, "--api-socket", str(vmm.api), "receive-migration", f"unix:{path}"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


def hop(source: Vmm, destination: Vmm, path) -> None:
    """One migration; both commands and the source end with 0."""
    destination.wait_api()
    receiver = Receiver(destination, path)
    poll(path.exists)
    sent = source.remote("send-migration", "--local", f"unix:{path}")
    code, errors = receiver.end()
    assert (sent.returncode, code) == (0, 0), f"{sent.stderr}\n{errors}\n{source.errors}\n{destination.errors}"
    assert source.wait() == 0
    assert not source.api.exists()
    assert destination.ask("info")["state"] == "Running"


def test_document_example_with_verified_io(tmp_path, disk):
    path = tmp_path / "sock"
    with (
        Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
    ):
        source.expect("blk ok ")
        source.wait_api()
        hop(source, destination, path)
        destination.expect("blk ok ")
        destination.more("blk ok ")
        assert b"BAD" not in source.output + destination.output
        progress = destination.ask("migration-progress")
        assert progress["state"] == "completed" and progress["bytes_transferred"] < 1 << 20


@pytest.mark.timeout(60 + 10 * HOPS)
def test_many_hops_in_a_row_with_two_vcpus(tmp_path, disk):
    """RAM, exits and disk are verified by the guest all the time; its lines are numbered across the hops."""
    arguments = ["--disk", f"path={disk}", "--cpus", "boot=2"]
    with Vmm.guest(tmp_path, "mode=equal cpus=2 ap=ram ap.mb=8", *arguments, name="hop0") as first:
        first.expect("equal 1 ")
        first.wait_api()
        here, opened = first, []
        output = b""
        try:
            for number in range(1, HOPS + 1):
                there = Vmm(tmp_path, name=f"hop{number}")
                opened.append(there)
                hop(here, there, tmp_path / f"sock{number}")
                there.expect(r"equal \d+ ")
                output += here.output
                here = there
            output += here.output
        finally:
            for vmm in opened:
                vmm.__exit__()
        assert b"not equal" not in output and b"BAD" not in output and b"panic" not in output


def test_send_to_a_socket_nobody_listens_on_fails_and_the_guest_goes_on(tmp_path):
    with Vmm.guest(tmp_path, "mode=rng") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        sent = vmm.remote("send-migration", "--local", f"unix:{tmp_path}/nobody")
        assert sent.returncode == 1 and "nobody" in sent.stderr
        assert vmm.ask("info")["state"] == "Running"
        vmm.more("rng ok ")


def test_ping_is_answered_while_a_receive_waits(tmp_path):
    with Vmm(tmp_path) as vmm:
        vmm.wait_api()
        receiver = Receiver(vmm, tmp_path / "sock")
        poll((tmp_path / "sock").exists)
        assert vmm.ask("ping")["pid"] == vmm.process.pid
        assert vmm.ask("migration-progress")["state"] == "ongoing"
        vmm.ask("cancel-migration")
        code, errors = receiver.end()
        assert code == 1 and "cancel" in errors
        assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize("victim", ["source-agent", "destination-agent", "destination"])
def test_kill_before_the_hand_over_leaves_the_guest_at_the_source_and_a_retry_works(tmp_path, victim, disk):
    path = tmp_path / "sock"
    with (
        Vmm.guest(tmp_path, "mode=equal", "--disk", f"path={disk}", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        Vmm(tmp_path, name="three") as spare,
    ):
        source.expect("equal 1 ")
        source.wait_api()
        destination.wait_api()
        receiver = Receiver(destination, path)
        poll(path.exists)
        if victim == "destination-agent":
            os.kill(destination.pid_of("migration"), signal.SIGKILL)
            code, _ = receiver.end()
            assert code == 1
        elif victim == "destination":
            destination.process.kill()
            destination.process.wait()
            receiver.end()
        else:
            # A peer that says nothing keeps the source's agent waiting, so that it can be killed.
            receiver.process.kill()
            receiver.process.communicate()
            destination.ask("cancel-migration")
        sent = source.remote("send-migration", "--local", f"unix:{path}")
        assert sent.returncode == 1
        source.more("equal ")
        hop(source, spare, tmp_path / "sock3")
        spare.expect("equal ")


def test_paused_guest_moves_paused_and_its_devices_go_on_when_it_is_resumed(tmp_path, disk):
    """Twice, so that it leaves the second VMM without ever having run there. Its rings start at the resume."""
    devices = ["--disk", f"path={disk}", "--net", "mac=12:34:56:78:90:ab", "--console", f"file={tmp_path}/console"]
    with (
        network_namespace(),
        Vmm.guest(tmp_path, "mode=blkload,console,net depth=8", *devices, name="one") as first,
        Vmm(tmp_path, name="two") as second,
        Vmm(tmp_path, name="three") as third,
    ):
        first.expect("blk ok ")
        first.wait_api()
        first.ask("pause")
        for number, (source, destination) in enumerate([(first, second), (second, third)]):
            path = tmp_path / f"sock{number}"
            destination.wait_api()
            receiver = Receiver(destination, path)
            poll(path.exists)
            source.ask("send-migration", "--local", f"unix:{path}")
            assert receiver.end()[0] == 0
            assert source.wait() == 0
            assert destination.ask("info")["state"] == "Paused"
        third.ask("resume")
        poll(lambda: third.ask("counters")["_disk0"]["write_ops"] > 100)
        third.more("blk ok ")
        third.more("console ok ")
        assert b"BAD" not in first.output + third.output
