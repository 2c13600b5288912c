"""`--seccomp`, read back from the running processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe

NONE, FILTER = "0", "2"


def mode(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Seccomp:"))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [((), FILTER), (("--seccomp", "true"), FILTER), (("--seccomp", "errno"), FILTER), (("--seccomp", "log"), FILTER),
     (("--seccomp", "false"), NONE)],
    ids=["default", "true", "errno", "log", "false"],
)  # fmt: skip
def test_mode_of_a_vcpu_process_and_of_its_successor(tmp_path: Path, words: tuple[str, ...], wanted: str) -> None:
    with Vmm.guest(tmp_path, "mode=rng", *words) as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        pid = vmm.pid_of("vcpu0")
        assert mode(pid) == wanted
        os.kill(pid, signal.SIGKILL)
        successor = poll(lambda: (now := vmm.pid_of("vcpu0")) != pid and now)
        vmm.more("rng ok ")  # it has entered the guest, so its filter is in place
        assert mode(successor) == wanted
        assert mode(vmm.process.pid) == NONE
