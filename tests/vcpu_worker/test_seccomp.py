"""vcpu_worker.seccomp: what the kernel does with the filter, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from shared.seccomp import Forbidden
from tests.vmm import environment
from vcpu_worker.seccomp import vcpu_filter

# Exit 0: the call was carried out; 1: EPERM. Afterwards exit_group, which the filter allows.
TRY = """
import ctypes, os, sys
from shared.seccomp import Forbidden
from vcpu_worker.seccomp import vcpu_filter
libc = ctypes.CDLL(None, use_errno=True)
program, pid = vcpu_filter(Forbidden[sys.argv[1]]), os.getpid()
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
answer = libc.syscall({number})
os._exit(0 if answer == {wanted} else 1 if answer == -1 and ctypes.get_errno() == 1 else 2)
"""
GETPID, CLOCK_GETTIME = 39, "228, 1, ctypes.byref(ctypes.create_string_buffer(16))"


def attempt(forbidden: Forbidden, number: object, wanted: str) -> int:
    code = TRY.format(number=number, wanted=wanted)
    command = [sys.executable, "-c", code, forbidden.name]
    return subprocess.run(command, env=environment(), timeout=30, check=False).returncode


@pytest.mark.parametrize(
    ("forbidden", "status"), [(Forbidden.KILL, -signal.SIGSYS), (Forbidden.ERRNO, 1), (Forbidden.LOG, 0)]
)
def test_a_forbidden_call(forbidden: Forbidden, status: int) -> None:
    assert attempt(forbidden, GETPID, "pid") == status


@pytest.mark.parametrize("forbidden", Forbidden)
def test_an_allowed_call(forbidden: Forbidden) -> None:
    assert attempt(forbidden, CLOCK_GETTIME, "0") == 0


@pytest.mark.parametrize("forbidden", Forbidden)
def test_the_filters_jumps_stay_inside(forbidden: Forbidden) -> None:
    program = vcpu_filter(forbidden)
    for at in range(program.len):
        instruction = program.filter[at]
        if instruction.code == 0x15:
            assert at + 1 + max(instruction.jt, instruction.jf) < program.len
