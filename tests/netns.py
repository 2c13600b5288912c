"""Network namespaces of a test's own. They have no name, so nothing of them can stay behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from bench.wire import namespace


@contextmanager
def network_namespace() -> Iterator[None]:
    """This process, and what it starts meanwhile, has a network of its own: lo, up, and nothing else."""
    with namespace():
        ip("link", "set", "lo", "up")
        yield


def ip(*words: str) -> str:
    """iproute2; what it prints."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
