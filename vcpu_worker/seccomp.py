"""The system calls that a vCPU process may make: the six of its loop, and of ioctl only KVM_RUN.

It shares the controller's memory, so this is no wall against an attacker who has taken it over; it turns a loop that
has lost its way into a death with SIGSYS, which the fleet survives.

Sources: seccomp(2), linux/seccomp.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
from enum import IntEnum

from shared.kvm import KVM_RUN

AUDIT_ARCH_X86_64 = 0xC000003E
SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO = 0x8000_0000, 0x0005_0000
SECCOMP_RET_LOG, SECCOMP_RET_ALLOW = 0x7FFC_0000, 0x7FFF_0000
# offsets in struct seccomp_data
_NR, _ARCH, _ARGUMENT_1 = 0, 4, 24
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06

SYS_write, SYS_rt_sigreturn, SYS_ioctl, SYS_futex, SYS_clock_gettime, SYS_exit_group = 1, 15, 16, 202, 228, 231
ALLOWED = (SYS_write, SYS_futex, SYS_clock_gettime, SYS_rt_sigreturn, SYS_exit_group)


class Forbidden(IntEnum):
    """What a system call outside the list leads to: seccomp's return value."""

    KILL = SECCOMP_RET_KILL_PROCESS
    ERRNO = SECCOMP_RET_ERRNO | errno.EPERM
    LOG = SECCOMP_RET_LOG  # it is carried out, and the kernel's audit log names it


class sock_filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class sock_fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(sock_filter)))


def vcpu_filter(forbidden: Forbidden = Forbidden.KILL) -> sock_fprog:
    """The program. It is read when a process starts, so keep it as long as processes are started."""
    # ioctl first: it is nearly every call. Distances are to the last two instructions, allow and forbid.
    body = [
        (_LOAD, "", "", _ARCH),
        (_JUMP_IF_EQUAL, "next", "forbid", AUDIT_ARCH_X86_64),
        (_LOAD, "", "", _NR),
        (_JUMP_IF_EQUAL, "next", "others", SYS_ioctl),
        (_LOAD, "", "", _ARGUMENT_1),
        (_JUMP_IF_EQUAL, "allow", "forbid", KVM_RUN),
        *((_JUMP_IF_EQUAL, "allow", "next", number) for number in ALLOWED),
        (_RETURN, "", "", forbidden),
        (_RETURN, "", "", SECCOMP_RET_ALLOW),
    ]
    targets = {"": 0, "others": 6, "forbid": len(body) - 2, "allow": len(body) - 1}
    program = (sock_filter * len(body))()
    for at, (code, when_true, when_false, k) in enumerate(body):
        jumps = [0 if name in ("", "next") else targets[name] - at - 1 for name in (when_true, when_false)]
        program[at] = sock_filter(code, *jumps, k)
    return sock_fprog(len(body), program)
