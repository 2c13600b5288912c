from __future__ import annotations

import pytest

from controller.devices.acpi import AcpiShutdown, Ged, GedEvent, PmTimer, pm_timer_ticks
from controller.devices.events import GuestEvent
from shared.errors import ProtocolError
from vcpu_worker.layout import TimerPage

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("size", "value", "event"),
    [
        (1, 0x01, GuestEvent.RESET),
        (1, 0x34, GuestEvent.POWER_OFF),
        (1, 0x00, None),
        (1, 0x14, None),
        (2, 0x01, None),
        (4, 0x34, None),
    ],
)
def test_sleep_and_reset_register(size: int, value: int, event: GuestEvent | None) -> None:
    events: list[GuestEvent] = []
    register = AcpiShutdown(events.append)
    register.write(0, size, value)
    assert events == ([event] if event else [])
    assert (register.read(0, 1), register.read(0, 4)) == (0, None)


@pytest.mark.parametrize(
    ("ns", "ticks"), [(0, 0), (SECOND, 3_579_545), (1200 * SECOND, 486_704), (279, 0), (280, 1)]
)
def test_pm_timer_frequency_and_wrap(ns: int, ticks: int) -> None:
    assert pm_timer_ticks(ns) == ticks


class Clock:
    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def test_pm_timer_counts_from_its_creation_and_publishes_its_start() -> None:
    clock, page = Clock(5 * SECOND), TimerPage()
    timer = PmTimer(page, clock)
    assert (page.start, page.present) == (5 * SECOND, 1)
    clock.now += SECOND
    assert timer.read(0, 4) == 3_579_545
    assert [timer.read(0, size) for size in (1, 2)] == [None, None]
    timer.write(0, 4, 0)
    assert timer.read(0, 4) == 3_579_545


def test_pm_timer_goes_on_on_a_host_that_has_just_booted() -> None:
    clock = Clock(1000 * SECOND)
    timer = PmTimer(TimerPage(), clock)
    clock.now += 500 * SECOND
    state = timer.save()
    young, page = Clock(2 * SECOND), TimerPage()
    other = PmTimer(page, young)
    other.load(state)
    assert other.read(0, 4) == pm_timer_ticks(500 * SECOND)
    young.now += SECOND
    assert other.read(0, 4) == pm_timer_ticks(501 * SECOND)
    other.load({})
    assert other.save() == {"flotilla": {"elapsed_ns": 501 * SECOND}}


def test_ged_accumulates_until_it_is_read() -> None:
    pulses: list[int] = []
    ged = Ged(lambda: pulses.append(1))
    ged.notify(GedEvent.PCI)
    ged.press_power_button()
    assert len(pulses) == 2
    assert ged.read(0, 4) is None
    assert ged.read(0, 1) == 12
    assert ged.read(0, 1) == 0
    ged.write(0, 1, 0xFF)
    assert ged.read(0, 1) == 0


def test_an_event_that_the_guest_has_not_read_survives_a_migration() -> None:
    ged, pulses = Ged(lambda: None), list[int]()
    ged.notify(GedEvent.CPU)
    other = Ged(lambda: pulses.append(1))
    other.load(ged.save())
    assert (other.read(0, 1), pulses) == (1, [])
    other.load({})
    with pytest.raises(ProtocolError):
        other.load({"flotilla": {"events": 16}})
