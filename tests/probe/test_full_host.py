"""A host that runs full under a VM: the file system of a disk image, and shared memory at a destination."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "small", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def shm() -> Iterator[Path]:
    """/dev/shm, which is this run's own (tests/leaks.py), with a limit that can be reached."""
    subprocess.run(["mount", "-o", "remount,size=1M", "/dev/shm"], check=True)
    yield Path("/dev/shm")
    subprocess.run(["mount", "-o", "remount,size=50%", "/dev/shm"], check=True)


def fill(path: Path) -> None:
    """Take all room that is left."""
    with open(path, "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_write_to_an_image_whose_file_system_is_full(tmp_path: Path, small: Path) -> None:
    """The guest sees an I/O error, the log names the disk, and VM and disk go on."""
    image = small / "image.raw"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    with Vmm.guest(tmp_path, "mode=blkload depth=4 trim=0", "--disk", f"path={image}") as vmm:
        vmm.expect(r"blk BAD status disk=0 op=write sector=\d+ status=1")
        vmm.wait_api()
        poll(lambda: "No space left on device" in vmm.errors)
        line = next(line for line in vmm.errors.splitlines() if "No space left on device" in line)
        assert "ERROR" in line and str(image) in line
        assert vmm.ask("info")["state"] == "Running"
        assert vmm.ask("counters")["_disk0"]["errors"] > 0
        disk = vmm.pid_of("_disk0")
        subprocess.run(["mount", "-o", "remount,size=64M", small], check=True)
        written = vmm.ask("counters")["_disk0"]["write_ops"]
        poll(lambda: vmm.ask("counters")["_disk0"]["write_ops"] > written)
        vmm.ask("pause")
        vmm.ask("resume")
        assert vmm.pid_of("_disk0") == disk


def test_boot_with_a_full_dev_shm_is_refused_by_name(tmp_path: Path, shm: Path) -> None:
    fill(shm / "filler")
    try:
        with Vmm.guest(tmp_path, "mode=rng") as vmm:
            assert vmm.wait() == 1
            assert "/dev/shm" in vmm.errors and "No space left on device" in vmm.errors
    finally:
        os.unlink(shm / "filler")


def test_destination_with_a_full_dev_shm_refuses_and_can_receive_again(tmp_path: Path, shm: Path) -> None:
    path = tmp_path / "sock"
    with (
        Vmm.guest(tmp_path, "mode=rng", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
    ):
        source.expect("rng ok 1")
        source.wait_api()
        destination.wait_api()
        fill(shm / "filler")
        receive = destination.start_remote("receive-migration", f"unix:{path}")
        poll(path.exists)
        sent = source.remote("send-migration", "--local", f"unix:{path}")
        assert sent.returncode == 1
        assert "/dev/shm" in sent.stderr and "No space left on device" in sent.stderr
        assert receive.wait(30) == 1
        source.more("rng ok ")
        os.unlink(shm / "filler")
        receive = destination.start_remote("receive-migration", f"unix:{path}")
        poll(path.exists)
        source.ask("send-migration", "--local", f"unix:{path}")
        assert receive.wait(30) == 0
        destination.expect("rng ok ")


@pytest.mark.parametrize("room", [1, 5, 9, 14, 20])
def test_destination_that_runs_out_of_descriptors_refuses_and_can_receive_again(tmp_path: Path, room: int) -> None:
    """At different steps: its agent, the peer's descriptors, a device's image, memory, vCPUs, workers."""
    path, disk = tmp_path / "sock", tmp_path / "disk.raw"
    disk.write_bytes(bytes(MIB))
    with (
        Vmm.guest(tmp_path, "mode=rng", "--disk", f"path={disk}", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
    ):
        source.expect("rng ok 1")
        source.wait_api()
        destination.wait_api()
        receive = destination.start_remote("receive-migration", f"unix:{path}", stderr=subprocess.PIPE)
        poll(path.exists)
        pid = destination.process.pid
        highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + room, hard))
        assert source.remote("send-migration", "--local", f"unix:{path}").returncode == 1
        _, reason = receive.communicate(timeout=30)
        assert receive.returncode == 1
        assert b"Too many open files" in reason or b"descriptors were lost" in reason, reason
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        source.more("rng ok ")
        receive = destination.start_remote("receive-migration", f"unix:{path}")
        poll(path.exists)
        source.ask("send-migration", "--local", f"unix:{path}")
        assert receive.wait(30) == 0
        destination.expect("rng ok ")
