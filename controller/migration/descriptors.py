"""What a descriptor from the peer really is, before anything relies on it."""

from __future__ import annotations

import fcntl
import os

from shared.errors import ProtocolError
from shared.linux import F_GET_SEALS, F_SEAL_SHRINK


def _info(fd: int) -> dict[str, str]:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        pairs = (line.partition(":") for line in file)
        return {name: value.strip() for name, _, value in pairs}


def check_eventfd(fd: int) -> None:
    if "eventfd-count" not in _info(fd):
        raise ProtocolError("the peer sent something else where an eventfd belongs")
    os.set_blocking(fd, False)  # or a peer that filled it could stop us


def pidfd_pid(fd: int) -> int:
    """The pid behind a pidfd, in our own namespace: 0 or less when it is of another one or gone."""
    info = _info(fd)
    if "Pid" not in info:
        raise ProtocolError("the peer sent something else where a pidfd belongs")
    return int(info["Pid"])


def check_ram(fd: int, size: int) -> None:
    """Guest RAM must be a memfd that nobody can shrink: one ftruncate would kill this process by SIGBUS."""
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:
        seals = 0
    if not seals & F_SEAL_SHRINK:
        raise ProtocolError("guest RAM from the peer is not a memfd that is sealed against shrinking")
    if os.fstat(fd).st_size < size:
        raise ProtocolError(f"guest RAM from the peer has {os.fstat(fd).st_size} bytes where {size} are announced")
