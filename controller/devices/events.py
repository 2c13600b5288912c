"""What a guest can ask of its VMM through a device register."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto


class GuestEvent(Enum):
    POWER_OFF = auto()
    RESET = auto()
    PANIC = auto()
    CRASH_LOADED = auto()  # the guest panicked and a crash kernel of its own takes over


OnEvent = Callable[[GuestEvent], None]
