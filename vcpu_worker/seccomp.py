"""The system calls that a vCPU process may make: the six of its loop, and of ioctl only KVM_RUN.

It shares the controller's memory, so this is no wall against an attacker who has taken it over; it turns a loop that
has lost its way into a death with SIGSYS, which the fleet survives.
"""

from __future__ import annotations

from shared.kvm import KVM_RUN
from shared.seccomp import Forbidden, Rule, Test, assemble, sock_fprog

# ioctl first: it is nearly every call.
ALLOWED = (
    Rule("ioctl", (Test(1, "==", KVM_RUN),)),
    Rule("write"),
    Rule("futex"),
    Rule("clock_gettime"),
    Rule("rt_sigreturn"),
    Rule("exit_group"),
)


def vcpu_filter(forbidden: Forbidden = Forbidden.KILL) -> sock_fprog:
    """The program. It is read when a process starts, so keep it as long as processes are started."""
    return assemble(ALLOWED, forbidden)
