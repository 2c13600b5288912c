"""What a guest can make happen as often as it likes: counted per device, logged at the 1st, 2nd, 4th, 8th, … time.

No guest can fill a log that way.
"""

from __future__ import annotations

from collections.abc import Callable

from shared import log


class Misuse:
    """Accesses that make no sense, by default; `what` and `write` say otherwise."""

    __slots__ = ("_what", "_write", "count", "who")

    def __init__(self, who: str, what: str = "guest error", write: Callable[[str], None] = log.warn) -> None:
        self.who = who
        self.count = 0
        self._what = what
        self._write = write

    def report(self, text: str) -> None:
        self.count += 1
        if self.count & (self.count - 1) == 0:
            self._write(f"{self.who}: {text} ({self._what} {self.count} of this device)")
