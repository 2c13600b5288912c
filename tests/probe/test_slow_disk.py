"""Late writes of a dead worker: the kernel holds a killed process's requests, and nobody may write over them before."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guest.pattern import damage
from tests.vmm import Vmm, poll

pytestmark = [
    pytest.mark.probe,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system and freeze it"),
]

LOOKS = 20


class FrozenDisk:
    """A file system of its own in a file: while it is frozen, the kernel holds every write to it."""

    def __init__(self, folder: Path) -> None:
        self.mount = folder / "mnt"
        self.mount.mkdir()
        image = folder / "fs.img"
        with open(image, "wb") as file:
            file.truncate(64 << 20)
        run("mkfs.ext4", "-q", str(image))
        run("mount", "-o", "loop", str(image), str(self.mount))
        self.disk = self.mount / "disk.raw"
        self.disk.write_bytes(os.urandom(16 << 20))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        run("fsfreeze", "--freeze", str(self.mount))
        try:
            yield
        finally:
            run("fsfreeze", "--unfreeze", str(self.mount))

    def close(self) -> None:
        run("umount", str(self.mount))


def run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} exits {done.returncode}: {done.stderr}"


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[FrozenDisk]:
    for program in ("mkfs.ext4", "mount", "fsfreeze"):
        assert shutil.which(program), f"{program} is missing: e2fsprogs and util-linux have it"
    made = FrozenDisk(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("direct", ["off", "on"])
def test_no_successor_writes_while_the_kernel_holds_writes_of_the_dead(
    tmp_path: Path, slow: FrozenDisk, direct: str
) -> None:
    """With O_DIRECT a held write lands even after SIGKILL. The fence is waitid: it ends when the last one has."""
    disk = f"path={slow.disk},direct={direct}"
    with Vmm.guest(tmp_path, "mode=blkload depth=8 trim=0 report_ms=100", "--disk", disk) as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        dead = vmm.pid_of("_disk0")
        with slow.frozen():
            poll(lambda: held(dead))
            os.kill(dead, signal.SIGKILL)
            for _ in range(LOOKS):
                row = vmm.fleet().get("_disk0")
                assert row is None or row["pid"] in (0, dead), f"{row} beside the writes of {dead}"
                assert os.path.exists(f"/proc/{dead}")
        poll(lambda: vmm.fleet().get("_disk0", {}).get("pid", dead) not in (0, dead))
        vmm.more("blk ok ")
        vmm.more("blk ok ")
        vmm.ask("pause")
        assert not list(damage(slow.disk, 4096, 8))
        vmm.ask("resume")
        assert b"BAD" not in vmm.output


def held(pid: int) -> bool:
    """Whether one of its threads waits in the kernel and can't be interrupted."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D":
            return True
    return False
