"""A reactor, a zygote and a fleet for tests that fork real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from controller.fleet import Fleet
from controller.spawn import Zygote
from shared import control
from shared.reactor import Reactor, sleep

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
        close_sockets()


def close_sockets() -> None:
    """Returns when none of zmq's is open: it closes what a test has let go of in threads of its own, and the next one
    may count descriptors."""
    if control._context is not None:
        control._context.destroy(linger=0)
        control._context = None


class Turned:
    """A rig whose reactor turns only while it waits for something, for `seconds` at most."""

    seconds = SECONDS

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor

    def run(self, awaitable: Any) -> Any:
        return self.reactor.run_until(awaitable, self.seconds)

    def until(self, condition: Callable[[], object]) -> None:
        async def turn() -> None:
            while not condition():
                await sleep(self.reactor, 0.002)

        self.run(turn())
