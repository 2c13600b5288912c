"""CMOS memory and real-time clock at ports 0x70 and 0x71.

The clock is the host's, UTC, BCD, 24 hours; there is no alarm and no interrupt. Source: the reference's
cloud-hypervisor-machine page, section 5.2; Motorola MC146818 data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from controller.devices.events import GuestEvent, OnEvent
from controller.devices.misuse import Misuse
from controller.devices.state import PRIVATE, Fields, State
from shared.typed import Final

_INDEX: Final = 0
_DATA: Final = 1
_CELLS: Final = 128
_MIB16: Final = 16 << 20
_KIB64: Final = 64 << 10
_RESET_INDEX: Final = 0x8F
_SECOND_NS: Final = 1_000_000_000
_UPDATE_NS: Final = (
    8 * _SECOND_NS // 32768
)  # the update-in-progress bit is set for this long before each second


def _bcd(value: int) -> int:
    return value // 10 << 4 | value % 10


_CLOCK: Final[dict[int, Callable[[time.struct_time], int]]] = {
    0x00: lambda t: _bcd(t.tm_sec % 60),
    0x02: lambda t: _bcd(t.tm_min),
    0x04: lambda t: _bcd(t.tm_hour),
    0x06: lambda t: _bcd((t.tm_wday + 1) % 7 + 1),  # 1 is Sunday
    0x07: lambda t: _bcd(t.tm_mday),
    0x08: lambda t: _bcd(t.tm_mon),
    0x09: lambda t: _bcd(t.tm_year % 100),
    0x32: lambda t: _bcd(t.tm_year // 100 % 100),
}


class Cmos:
    """Two ports from 0x70. `ram_below_4g` and `ram_above_4g` in bytes; they are what firmware asks for.

    `clock` gives nanoseconds since the epoch.
    """

    def __init__(
        self,
        ram_below_4g: int,
        ram_above_4g: int,
        on_event: OnEvent,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._on_event = on_event
        self._clock = clock
        self._index = 0
        self._cells = bytearray(_CELLS)
        extended = min(0xFFFF, max(0, ram_below_4g - _MIB16) // _KIB64)
        self._cells[0x34:0x36] = extended.to_bytes(2, "little")
        high = min(0xFF_FFFF, ram_above_4g // _KIB64)
        self._cells[0x5B:0x5E] = high.to_bytes(3, "little")
        self._misuse = Misuse("CMOS")

    def read(self, offset: int, size: int) -> int | None:
        if size != 1:
            self._misuse.report(f"read of {size} bytes")
            return None
        return self._index if offset == _INDEX else self._read_cell()

    def _read_cell(self) -> int:
        now = self._clock()
        if clock := _CLOCK.get(self._index):
            return clock(time.gmtime(now // _SECOND_NS))
        if self._index == 0x0A:  # 32 kHz time base; update in progress
            return 0x20 | (0x80 if now % _SECOND_NS >= _SECOND_NS - _UPDATE_NS else 0)
        if self._index == 0x0D:  # the battery is good
            return 0x80
        return self._cells[self._index & 0x7F]

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            self._misuse.report(f"write of {size} bytes")
        elif offset == _INDEX:
            self._index = value
        elif self._index == _RESET_INDEX and value == 0:
            self._on_event(GuestEvent.RESET)
        else:
            self._cells[self._index & 0x7F] = value

    def save(self) -> State:
        """Cloud Hypervisor carries nothing of the CMOS."""
        return {PRIVATE: {"index": self._index, "cells": list(self._cells)}}

    def load(self, state: object) -> None:
        private = Fields("CMOS", state).private()
        if "cells" in private:
            index, cells = private.integer("index", 8), private.integers("cells", 8, _CELLS)
            self._index, self._cells[:] = index, bytes(cells)
