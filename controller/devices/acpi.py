"""ACPI registers: sleep and reset (port 0x600), the PM timer (0x608), the generic event device's byte (MMIO).

Source: ACPI 6.4, sections 4.8.3.3 (PM timer), 4.8.3.6 (reset), 4.8.3.7 (sleep control), 5.6.9 (GED); the reference's
cloud-hypervisor-machine page, section 4.7.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntFlag
from typing import Final

from controller.devices.events import GuestEvent, OnEvent
from controller.devices.misuse import Misuse
from controller.devices.state import PRIVATE, Fields, State

PM_TIMER_HZ: Final = 3_579_545
_SECOND_NS: Final = 1_000_000_000
_RESET: Final = 0x01
_SLEEP_S5: Final = 1 << 5 | 5 << 2  # SLP_EN, and SLP_TYP as \\_S5 has it


class AcpiShutdown:
    """Sleep control, sleep status and reset register in one, four ports from 0x600. Reads give 0."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def read(self, offset: int, size: int) -> int | None:
        return 0 if size == 1 else None

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1 and value == _RESET:
            self._on_event(GuestEvent.RESET)
        elif size == 1 and value == _SLEEP_S5:
            self._on_event(GuestEvent.POWER_OFF)


def pm_timer_ticks(elapsed_ns: int) -> int:
    """The 32-bit counter after so many nanoseconds."""
    return elapsed_ns * PM_TIMER_HZ // _SECOND_NS & 0xFFFF_FFFF


class PmTimer:
    """Port 0x608, 4-byte reads. The vCPU loops answer it themselves from the same base, published by `on_base`.

    The base is the CLOCK_MONOTONIC time, in nanoseconds, at which the counter was 0.
    """

    def __init__(self, on_base: Callable[[int], None] | None = None, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._on_base = on_base
        self._base_ns = 0
        self._set_base(clock())

    def _set_base(self, base_ns: int) -> None:
        self._base_ns = base_ns
        if self._on_base is not None:
            self._on_base(base_ns)

    def read(self, offset: int, size: int) -> int | None:
        return pm_timer_ticks(self._clock() - self._base_ns) if size == 4 and offset == 0 else None

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""

    def save(self) -> State:
        """Cloud Hypervisor's timer starts again from 0; ours goes on. The clock does not run while the VM is on its way."""
        return {PRIVATE: {"elapsed_ns": self._clock() - self._base_ns}}

    def load(self, state: object) -> None:
        private = Fields("PM timer", state).private()
        if "elapsed_ns" in private:
            self._set_base(self._clock() - private.integer("elapsed_ns", 63))


class GedEvent(IntFlag):
    """Bits of the event byte, as the DSDT's ESCN method tests them."""

    CPU = 1
    MEMORY = 2
    PCI = 4
    POWER_BUTTON = 8


class Ged:
    """The generic event device: one byte that says what happened and is cleared by reading."""

    def __init__(self, pulse: Callable[[], None]) -> None:
        """`pulse` gives an edge on the GED's pin (13)."""
        self._pulse = pulse
        self._events = GedEvent(0)
        self._misuse = Misuse("GED")

    def notify(self, event: GedEvent) -> None:
        self._events |= event
        self._pulse()

    def press_power_button(self) -> None:
        self.notify(GedEvent.POWER_BUTTON)

    def read(self, offset: int, size: int) -> int | None:
        if size != 1:
            self._misuse.report(f"read of {size} bytes")
            return None
        events, self._events = self._events, GedEvent(0)
        return int(events)

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""

    def save(self) -> State:
        """Cloud Hypervisor loses an event that the guest has not read yet."""
        return {PRIVATE: {"events": int(self._events)}}

    def load(self, state: object) -> None:
        private = Fields("GED", state).private()
        if "events" in private:
            self._events = GedEvent(private.integer("events", 4))
