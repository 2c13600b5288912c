"""A reactor, a zygote and a fleet for tests that fork real processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from controller.fleet import Fleet
from controller.spawn import Zygote
from shared.reactor import Reactor

SECONDS = 30.0


@contextmanager
def running(runtime_dir: str) -> Iterator[tuple[Reactor, Fleet]]:
    """Every process is killed and waited for at the end."""
    reactor = Reactor()
    zygote = Zygote()
    fleet = Fleet(reactor, zygote, runtime_dir)
    try:
        yield reactor, fleet
    finally:
        for process in list(fleet.processes):
            fleet.kill(process)
            reactor.run_until(process.ended.wait(), SECONDS)
        zygote.stop()
        reactor.close()
