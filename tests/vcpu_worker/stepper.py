"""ptrace of a vCPU process: to kill it after a chosen number of its own instructions, not at a random instant.

All calls must come from one thread, the tracer's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable

from shared.ptrace import (
    PTRACE_GETREGS,
    PTRACE_INTERRUPT,
    PTRACE_O_TRACESYSGOOD,
    PTRACE_SEIZE,
    PTRACE_SINGLESTEP,
    PTRACE_SYSCALL,
    WALL,
    ptrace,
    user_regs_struct,
)
from tests.vmm import SECONDS
from vcpu_worker.process import Vcpu

SYS_IOCTL = 16


class Stepper:
    """Traces the present process of a vCPU. `serve` plays the controller while the process waits for it."""

    def __init__(self, vcpu: Vcpu, serve: Callable[[], None]) -> None:
        self.vcpu = vcpu
        self.pid = vcpu.pid
        self._serve = serve
        ptrace(PTRACE_SEIZE, self.pid, PTRACE_O_TRACESYSGOOD)
        ptrace(PTRACE_INTERRUPT, self.pid)
        self._wait()

    def _wait(self) -> int:
        """The signal of the next stop."""
        deadline = time.monotonic() + SECONDS
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG | WALL)
            if pid:
                assert os.WIFSTOPPED(status), f"the vCPU process ended: {status:#x}"
                return os.WSTOPSIG(status)
            assert time.monotonic() < deadline, "the traced vCPU neither stops nor needs us"
            self._serve()

    def regs(self) -> user_regs_struct:
        regs = user_regs_struct()
        ptrace(PTRACE_GETREGS, self.pid, ctypes.addressof(regs))
        return regs

    def run_to_exit(self) -> None:
        """Go on until KVM_RUN has just returned 0: an exit is there, and not one instruction has looked at it."""
        while True:
            ptrace(PTRACE_SYSCALL, self.pid)
            if self._wait() == signal.SIGTRAP | 0x80:
                regs = self.regs()
                if regs.orig_rax == SYS_IOCTL and regs.rax == 0 and regs.rdi == self.vcpu.fd:
                    return

    def step(self) -> None:
        ptrace(PTRACE_SINGLESTEP, self.pid)
        self._wait()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
