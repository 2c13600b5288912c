"""What is left of the keyboard controller: port 0x61 and the reset line.

Four ports from 0x61, of which 0x62 and 0x63 are empty. Source: the reference's cloud-hypervisor-machine page,
section 5.2.
"""

from __future__ import annotations

from controller.devices.events import GuestEvent, OnEvent
from shared.typed import Final

_PORT_B: Final = 0  # 0x61; bit 5 is the output of timer 2, which Linux polls when it calibrates the TSC
_COMMAND: Final = 3  # 0x64
_PULSE_RESET: Final = 0xFE


class I8042:
    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def read(self, offset: int, size: int) -> int | None:
        if size != 1:
            return None
        return {_PORT_B: 0x20, _COMMAND: 0}.get(offset)

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1 and offset == _COMMAND and value == _PULSE_RESET:
            self._on_event(GuestEvent.RESET)
