"""Which descriptors are open."""

from __future__ import annotations

import os
from contextlib import suppress


def descriptors() -> set[tuple[str, str]]:
    """Ours that are open, and what they are: zmq closes those of an earlier test whenever it comes to it, and a number
    that is free again may be somebody else's."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one of the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found
