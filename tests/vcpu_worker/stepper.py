"""ptrace of a vCPU process: to kill it after a chosen number of its own instructions, not at a random instant.

Sources: ptrace(2). All calls must come from one thread, the tracer's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable

from shared.linux import libc
from vcpu_worker.process import Vcpu

PTRACE_SINGLESTEP, PTRACE_GETREGS, PTRACE_SYSCALL, PTRACE_SEIZE, PTRACE_INTERRUPT = 9, 12, 24, 0x4206, 0x4207
PTRACE_O_TRACESYSGOOD = 1
WALL = 0x40000000
SYS_IOCTL = 16
SECONDS = 5.0


class user_regs_struct(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    )


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(0), ctypes.c_void_p(data)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x}: {os.strerror(number)}")


class Stepper:
    """Traces the present process of a vCPU. `serve` plays the controller while the process waits for it."""

    def __init__(self, vcpu: Vcpu, serve: Callable[[], None]) -> None:
        self.vcpu = vcpu
        self.pid = vcpu.pid
        self._serve = serve
        _ptrace(PTRACE_SEIZE, self.pid, PTRACE_O_TRACESYSGOOD)
        _ptrace(PTRACE_INTERRUPT, self.pid)
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
        _ptrace(PTRACE_GETREGS, self.pid, ctypes.addressof(regs))
        return regs

    def run_to_exit(self) -> None:
        """Go on until KVM_RUN has just returned 0: an exit is there, and not one instruction has looked at it."""
        while True:
            _ptrace(PTRACE_SYSCALL, self.pid)
            if self._wait() == signal.SIGTRAP | 0x80:
                regs = self.regs()
                if regs.orig_rax == SYS_IOCTL and regs.rax == 0 and regs.rdi == self.vcpu.fd:
                    return

    def step(self) -> None:
        _ptrace(PTRACE_SINGLESTEP, self.pid)
        self._wait()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
