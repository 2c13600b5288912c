"""Accesses that make no sense: counted per device, logged at 1, 2, 4, 8, …, so that no guest can fill a log."""

from __future__ import annotations

from shared import log


class Misuse:
    __slots__ = ("count", "who")

    def __init__(self, who: str) -> None:
        self.who = who
        self.count = 0

    def report(self, what: str) -> None:
        self.count += 1
        if self.count & (self.count - 1) == 0:
            log.warn(f"{self.who}: {what} (guest error {self.count} of this device)")
