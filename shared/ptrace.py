"""ptrace(2), as far as somebody needs it who stops another process and looks at its registers.

Sources: ptrace(2), arch/x86/include/uapi/asm/ptrace-abi.h, sys/user.h. All calls of one tracee come from one thread.
"""

from __future__ import annotations

import ctypes

from shared.linux import check, libc

PTRACE_CONT, PTRACE_SINGLESTEP, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_DETACH = 7, 9, 12, 13, 17
PTRACE_SYSCALL, PTRACE_SEIZE, PTRACE_INTERRUPT = 24, 0x4206, 0x4207
PTRACE_O_TRACESYSGOOD = 1
WALL = 0x4000_0000  # __WALL of wait4(2): threads, too

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


def ptrace(request: int, pid: int, data: int = 0) -> None:
    """`data`: a number, or the address of a structure. Raises OSError."""
    check(libc.ptrace(request, pid, None, data), f"ptrace of process {pid}")
