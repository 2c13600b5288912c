"""Where a payload goes in guest RAM, and what to say when it does not fit."""

from __future__ import annotations

from shared.errors import BadGuestAddress, HostError
from shared.linux import madvise
from shared.memory import PAGE_SIZE, GuestMemory

MADV_REMOVE = 9


def room(memory: GuestMemory, gpa: int, size: int, name: str) -> memoryview:
    """A view of guest RAM for a part of `name`. Raises HostError when that is not RAM."""
    try:
        return memory.view(gpa, size)
    except BadGuestAddress as error:
        raise HostError(
            f"{name}: needs guest memory from {gpa:#x} to {gpa + size:#x}, which is not there",
            f"--memory size={memory.size} is too small, or the file is damaged",
        ) from error


def clear(memory: GuestMemory, gpa: int, size: int) -> None:
    """Zero a range that `room` has checked, without touching pages that nobody has touched yet.

    At a guest's reboot RAM is not fresh; on fresh RAM the hole costs one system call.
    """
    if not size:
        return
    end = gpa + size
    first, last = -(-gpa // PAGE_SIZE) * PAGE_SIZE, end // PAGE_SIZE * PAGE_SIZE
    if first >= last:
        memory.write(gpa, bytes(size))
        return
    memory.write(gpa, bytes(first - gpa))
    memory.write(last, bytes(end - last))
    madvise(memory.host_address(first, last - first), last - first, MADV_REMOVE)
