"""controller.injection: a process that computes is met at its next system call."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from controller import injection
from controller.injection import Captive
from shared.errors import HostError
from shared.ptrace import PTRACE_CONT
from tests.vmm import poll

# Computes until it is told by shared memory, and some time longer: all that without a system call.
COMPUTING = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    words = mmap.mmap(file.fileno(), 4096)
words[0] = 1
while not words[1]:
    pass
for _ in range(int(sys.argv[2])):
    pass
sys.stdin.read()
"""


class Computing:
    """Such a process."""

    def __init__(self, path: Path, steps: int) -> None:
        path.write_bytes(bytes(4096))
        with open(path, "r+b") as file:
            self.words = mmap.mmap(file.fileno(), 4096)
        command = [sys.executable, "-c", COMPUTING, str(path), str(steps)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self.pid = self.process.pid
        poll(lambda: self.words[0])

    def tell(self) -> None:
        self.words[1] = 1

    def ends_well(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@pytest.mark.parametrize("steps", [0, 10_000_000])
def test_a_process_that_computes_is_met_at_its_next_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    computing, ptrace = Computing(tmp_path / "words", steps), injection.ptrace

    def traced(request: int, *arguments: int) -> int:
        if request == PTRACE_CONT:  # it has been found computing
            computing.tell()
        return ptrace(request, *arguments)

    monkeypatch.setattr(injection, "ptrace", traced)
    with Captive(computing.pid) as captive:
        assert captive.call("getpid") == computing.pid
    computing.ends_well()


def test_a_process_that_never_waits_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "SECONDS", 0.1)
    computing = Computing(tmp_path / "words", 0)
    with pytest.raises(HostError, match="never waits in a system call"), Captive(computing.pid):
        pass
    assert "TracerPid:\t0\n" in Path(f"/proc/{computing.pid}/status").read_text()
    computing.tell()
    computing.ends_well()
