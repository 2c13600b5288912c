from __future__ import annotations

import calendar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.devices.cmos import Cmos
from controller.devices.events import GuestEvent
from shared.errors import ProtocolError

MIB, GIB = 1 << 20, 1 << 30
# Sunday
MOMENT = calendar.timegm((2026, 11, 22, 23, 59, 58)) * 1_000_000_000


def cmos(below: int = GIB, above: int = 0, now: int = MOMENT) -> tuple[Cmos, list[GuestEvent]]:
    events: list[GuestEvent] = []
    return Cmos(below, above, events.append, lambda: now), events


def cell(device: Cmos, index: int) -> int:
    device.write(0, 1, index)
    value = device.read(1, 1)
    assert value is not None
    return value


def test_the_clock_is_utc_bcd_24_hours() -> None:
    device, _ = cmos()
    values = {index: cell(device, index) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)}
    assert values == {0: 0x58, 2: 0x59, 4: 0x23, 6: 1, 7: 0x22, 8: 0x11, 9: 0x26, 0x32: 0x20}


def test_status_registers() -> None:
    device, _ = cmos()
    assert (cell(device, 0x0A), cell(device, 0x0B), cell(device, 0x0D)) == (0x20, 0, 0x80)
    device.write(0, 1, 0x0B)
    device.write(1, 1, 0x02)
    assert cell(device, 0x0B) == 0x02


@pytest.mark.parametrize(("fraction", "expected"), [(0, 0x20), (999_755_859, 0x20), (999_755_860, 0xA0)])
def test_update_in_progress_before_the_full_second(fraction: int, expected: int) -> None:
    device, _ = cmos(now=MOMENT + fraction)
    assert cell(device, 0x0A) == expected


@pytest.mark.parametrize(
    ("below", "above", "low", "high"),
    [
        (512 * MIB, 0, (0x00, 0x1F), (0, 0, 0)),
        (16 * MIB, 0, (0, 0), (0, 0, 0)),
        (8 * MIB, 0, (0, 0), (0, 0, 0)),
        (3 * GIB, GIB, (0x00, 0xBF), (0x00, 0x40, 0x00)),
        (3 * GIB, 2 * 1024 * GIB, (0x00, 0xBF), (0xFF, 0xFF, 0xFF)),
    ],
)
def test_memory_sizes(below: int, above: int, low: tuple[int, ...], high: tuple[int, ...]) -> None:
    device, _ = cmos(below, above)
    assert (cell(device, 0x34), cell(device, 0x35)) == low
    assert tuple(cell(device, index) for index in (0x5B, 0x5C, 0x5D)) == high


def test_other_cells_are_memory_and_the_index_keeps_bit_7() -> None:
    device, events = cmos()
    device.write(0, 1, 0xC0)
    device.write(1, 1, 0x77)
    assert device.read(0, 1) == 0xC0
    assert cell(device, 0x40) == 0x77
    assert events == []


def test_the_shutdown_byte_resets() -> None:
    device, events = cmos()
    device.write(0, 1, 0x8F)
    device.write(1, 1, 1)
    assert events == []
    device.write(1, 1, 0)
    assert events == [GuestEvent.RESET]
    device.write(0, 1, 0x0F)
    device.write(1, 1, 0)
    assert events == [GuestEvent.RESET]


def test_only_bytes_count() -> None:
    device, _ = cmos()
    device.write(0, 2, 0x1234)
    assert (device.read(0, 1), device.read(0, 2)) == (0, None)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=40))
def test_state_carries_every_cell(writes: list[tuple[int, int]]) -> None:
    device, _ = cmos()
    for index, value in writes:
        device.write(0, 1, index)
        device.write(1, 1, value)
    other, _ = cmos(below=2 * GIB)
    other.load(device.save())
    assert other.save() == device.save()
    assert all(cell(device, index) == cell(other, index) for index in range(256))


def test_a_state_of_cloud_hypervisor_carries_nothing() -> None:
    device, _ = cmos()
    before = device.save()
    device.load({})
    assert device.save() == before
    with pytest.raises(ProtocolError, match=r"CMOS\.flotilla: cells"):
        device.load({"flotilla": {"index": 0, "cells": [0] * 127}})
