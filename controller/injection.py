"""One system call in another process, made by that process: what code that has taken it over could do.

    seize ──▶ stopped where it waits, behind a syscall instruction ──▶ that instruction again, with our registers
                                                                          ├─▶ its answer, and everything as it was
                                                                          └─▶ dead: the filter's verdict

For `flotilla doctor --sandbox` and the tests. Only a process that waits in a system call can be used, which a worker's
first thread and a vCPU's nearly always do. Signals that come meanwhile are lost to it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from types import TracebackType
from typing import Final

from controller.supervision import process_state
from shared.errors import HostError
from shared.ptrace import (
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_GETREGS,
    PTRACE_INTERRUPT,
    PTRACE_SEIZE,
    PTRACE_SETREGS,
    PTRACE_SINGLESTEP,
    WALL,
    ptrace,
    user_regs_struct,
)
from shared.syscall_numbers import NUMBERS

SYSCALL: Final = b"\x0f\x05"
SECONDS: Final = 30.0  # for a process to come to its next system call
TURN: Final = 0.01  # that one which computes has in between, unless it waits before
SCRATCH: Final = 1024  # bytes below the stack, where its red zone has long ended


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
        end = time.monotonic() + SECONDS
        ptrace(PTRACE_SEIZE, self.pid)
        try:
            while True:
                ptrace(PTRACE_INTERRUPT, self.pid)
                self._wait()
                ptrace(PTRACE_GETREGS, self.pid, ctypes.addressof(self._regs))
                if self._memory(self._regs.rip - len(SYSCALL), len(SYSCALL)) == SYSCALL:
                    return self
                if time.monotonic() > end:
                    raise HostError(f"process {self.pid} never waits in a system call")
                ptrace(PTRACE_CONT, self.pid)
                self._let_run()
        except BaseException:
            self._let_go()
            raise

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if not self._dead:
            ptrace(PTRACE_SETREGS, self.pid, ctypes.addressof(self._regs))
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
        ptrace(PTRACE_SETREGS, self.pid, ctypes.addressof(regs))
        while True:
            ptrace(PTRACE_SINGLESTEP, self.pid)
            if self._wait() == signal.SIGTRAP:
                break
        ptrace(PTRACE_GETREGS, self.pid, ctypes.addressof(regs))
        return ctypes.c_int64(regs.rax).value

    def _let_run(self) -> None:
        """An interrupt that comes before it has a CPU again stops it where it was: it has to get on in between."""
        end = time.monotonic() + TURN
        while time.monotonic() < end and process_state(self.pid)[0] not in "SD":
            time.sleep(TURN / 10)

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
            ptrace(PTRACE_DETACH, self.pid)
