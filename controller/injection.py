"""One system call in another process, made by that process: what code that has taken it over could do.

    seize ──▶ stopped where it waits, behind a syscall instruction ──▶ that instruction again, with our registers
                                                                          ├─▶ its answer, and everything as it was
                                                                          └─▶ dead: the filter's verdict

For `flotilla doctor --sandbox` and the tests. Only a process that waits in a system call can be used, which a worker's
first thread and a vCPU's nearly always do. Signals that come meanwhile are lost to it.

Sources: ptrace(2), arch/x86/include/uapi/asm/ptrace-abi.h, sys/user.h.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from types import TracebackType
from typing import Final

from shared.errors import HostError
from shared.linux import check, libc
from shared.syscall_numbers import NUMBERS

PTRACE_SINGLESTEP, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_CONT = 9, 12, 13, 7
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL: Final = 0x4000_0000
SYSCALL: Final = b"\x0f\x05"
ATTEMPTS: Final = 200
SCRATCH: Final = 1024  # bytes below the stack, where its red zone has long ended

libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class user_regs_struct(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
            "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
        )
    )  # fmt: skip


class Killed(HostError):
    """The process did not survive the call; `signal` is what it died of."""

    def __init__(self, number: int) -> None:
        super().__init__(f"killed by {signal.Signals(number).name}")
        self.signal = number


class Captive:
    """A process that does what it is told, between __enter__ and __exit__. Raises HostError, OSError and Killed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._regs = user_regs_struct()
        self._dead = False

    def __enter__(self) -> Captive:
        self._ptrace(PTRACE_SEIZE)
        try:
            for _ in range(ATTEMPTS):
                self._ptrace(PTRACE_INTERRUPT)
                self._wait()
                self._ptrace(PTRACE_GETREGS, data=ctypes.addressof(self._regs))
                if self._memory(self._regs.rip - len(SYSCALL), len(SYSCALL)) == SYSCALL:
                    return self
                self._ptrace(PTRACE_CONT)
        except BaseException:
            self._let_go()
            raise
        self._let_go()
        raise HostError(f"process {self.pid} never waits in a system call")

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if not self._dead:
            self._ptrace(PTRACE_SETREGS, data=ctypes.addressof(self._regs))
            self._let_go()

    def call(self, name: str, *arguments: int | bytes) -> int:
        """Its answer, an errno negated. Bytes are put into its memory, with a zero behind them."""
        regs = user_regs_struct.from_buffer_copy(self._regs)
        at = (self._regs.rsp - SCRATCH) & -16
        words: list[int] = []
        for argument in arguments:
            if isinstance(argument, bytes):
                self._poke(at, argument + b"\0")
                words.append(at)
                at += (len(argument) + 16) & -16
            else:
                words.append(argument & (1 << 64) - 1)
        for register, word in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), words, strict=False):
            setattr(regs, register, word)
        regs.rax, regs.orig_rax = (
            NUMBERS[name],
            (1 << 64) - 1,
        )  # no call of its own that the kernel could restart
        regs.rip = self._regs.rip - len(SYSCALL)
        self._ptrace(PTRACE_SETREGS, data=ctypes.addressof(regs))
        while True:
            self._ptrace(PTRACE_SINGLESTEP)
            if self._wait() == signal.SIGTRAP:
                break
        self._ptrace(PTRACE_GETREGS, data=ctypes.addressof(regs))
        return ctypes.c_int64(regs.rax).value

    def _ptrace(self, request: int, data: int = 0) -> None:
        check(libc.ptrace(request, self.pid, None, data), f"ptrace of process {self.pid}")

    def _wait(self) -> int:
        """The signal with which it has stopped."""
        _, status = os.waitpid(self.pid, WALL)
        if os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        self._dead = True
        raise Killed(os.WTERMSIG(status) if os.WIFSIGNALED(status) else signal.SIGKILL)

    def _memory(self, address: int, size: int) -> bytes:
        fd = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, size, address)
        finally:
            os.close(fd)

    def _poke(self, address: int, data: bytes) -> None:
        fd = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, data, address)
        finally:
            os.close(fd)

    def _let_go(self) -> None:
        with suppress(OSError):
            self._ptrace(PTRACE_DETACH)
