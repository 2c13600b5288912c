"""ACPI registers: sleep and reset (port 0x600), the PM timer (0x608), the generic event device's byte (MMIO).

Source: ACPI 6.4, sections 4.8.3.3 (PM timer), 4.8.3.6 (reset), 4.8.3.7 (sleep control), 5.6.9 (GED); the reference's
cloud-hypervisor-machine page, section 4.7.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntFlag

from controller.devices.events import GuestEvent, OnEvent
from controller.devices.misuse import Misuse
from controller.devices.state import PRIVATE, Fields, State
from shared.typed import Final
from vcpu_worker.layout import TimerPage

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
    """Port 0x608, 4-byte reads. The vCPU loops answer it themselves from the page's start, the CLOCK_MONOTONIC time
    in nanoseconds at which the counter was 0."""

    def __init__(self, page: TimerPage, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._page = page
        self._clock = clock
        page.start = clock()
        page.present = 1

    @property
    def _elapsed_ns(self) -> int:
        return self._clock() - int(self._page.start) & (1 << 64) - 1

    def read(self, offset: int, size: int) -> int | None:
        return pm_timer_ticks(self._elapsed_ns) if size == 4 and offset == 0 else None

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""

    def save(self) -> State:
        """Cloud Hypervisor's timer starts again from 0; ours goes on where it was."""
        return {PRIVATE: {"elapsed_ns": self._elapsed_ns}}

    def load(self, state: object) -> None:
        private = Fields("PM timer", state).private()
        if "elapsed_ns" in private:
            # Modulo 2^64, as the loops subtract: this host may have been up for less than the guest.
            self._page.start = self._clock() - private.integer("elapsed_ns", 63) & (1 << 64) - 1


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
