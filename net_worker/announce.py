"""Telling switches where a MAC now lives: reverse ARP requests (RFC 903), as other VMMs send them after a migration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from shared.reactor import Reactor, Timer

ETHERTYPE: Final = 0x8035
SHORTEST_FRAME: Final = 60
# A switch may lose a frame, or not be ready yet: seconds after the first one.
AGAIN: Final = (0.05, 0.2, 0.45, 0.8)


def rarp(mac: bytes) -> bytes:
    """A broadcast from `mac` that asks for its own address: Ethernet, IPv4, reverse request."""
    who = mac + bytes(4)
    request = b"\0\1\x08\0\6\4\0\3" + who + who
    return (b"\xff" * 6 + mac + ETHERTYPE.to_bytes(2, "big") + request).ljust(SHORTEST_FRAME, b"\0")


class Announcer:
    """Calls `send` at once and a few times more, until told to stop."""

    def __init__(self, reactor: Reactor, send: Callable[[], None]) -> None:
        self._reactor = reactor
        self._send = send
        self._timers: list[Timer] = []

    def start(self) -> None:
        self.stop()
        self._send()
        self._timers = [self._reactor.call_later(seconds, self._send) for seconds in AGAIN]

    def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers = []
