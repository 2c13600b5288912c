"""A reactor that is turned by hand."""

from __future__ import annotations

from shared.reactor import Reactor


def settle(reactor: Reactor, rounds: int = 3) -> None:
    """Turn it, whether anything is ready or not; a failure of a callback is the caller's."""
    for _ in range(rounds):
        reactor.call_soon(lambda: None)
        reactor._round()
        if reactor._failure is not None:
            failure, reactor._failure = reactor._failure, None
            raise failure
