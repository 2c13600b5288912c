"""Network namespaces of a test's own. They have no name, so nothing of them can stay behind."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x4000_0000
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def network_namespace() -> Iterator[None]:
    """This process, and what it starts meanwhile, has a network of its own: lo, up, and nothing else."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(CLONE_NEWNET) < 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        ip("link", "set", "lo", "up")
        yield
    finally:
        if _libc.setns(before, CLONE_NEWNET) < 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(before)


def ip(*words: str) -> str:
    """iproute2; what it prints."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
