"""`ch-remote worker-upgrade` to a VM whose guest verifies what it reads and writes all the time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(16 << 20))
    return path


def test_disk(tmp_path: Path, disk: Path) -> None:
    with Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        for _ in range(3):
            before = vmm.pid_of("_disk0")
            answer = vmm.ask("worker-upgrade", "_disk0")
            print(answer)
            assert answer["old_pid"] == before and vmm.pid_of("_disk0") == answer["new_pid"] != before
            vmm.more("blk ok ", 60)
        print(vmm.errors)
        print(vmm.ask("fleet"))
        assert b"BAD" not in vmm.output
