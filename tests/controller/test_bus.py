from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.bus import Bus
from shared.errors import HostError


class Register:
    """Remembers writes, answers with its own number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int | None:
        return self.number + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


def test_an_access_reaches_the_device_that_holds_its_first_byte() -> None:
    bus, low, high = Bus("pio"), Register(100), Register(200)
    bus.register(0x3F8, 8, high)
    bus.register(0x70, 2, low)
    assert bus.read(0x71, 1) == 101
    assert bus.read(0x3FF, 4) == 207
    bus.write(0x3F8, 1, 65)
    assert high.written == [(0, 1, 65)]
    assert bus.find(0x3FA) == (high, 2)


def test_an_unclaimed_address_reads_nothing_and_takes_every_write() -> None:
    bus = Bus("pio")
    bus.register(0x70, 2, Register(0))
    for address in (0, 0x6F, 0x72, 0xFFFF):
        assert bus.read(address, 1) is None
        assert bus.write(address, 1, 0) is None
        assert bus.find(address) is None


@pytest.mark.parametrize(("base", "size"), [(0x10, 1), (0x0F, 2), (0x1F, 8), (0x0, 0x100), (0x18, 2)])
def test_overlapping_ranges_are_refused(base: int, size: int) -> None:
    bus = Bus("mmio")
    bus.register(0x10, 0x10, Register(0))
    with pytest.raises(HostError, match="mmio bus"):
        bus.register(base, size, Register(1))
    assert len(bus.ranges()) == 1


@pytest.mark.parametrize(("base", "size"), [(0, 0), (-1, 4)])
def test_an_empty_range_is_refused(base: int, size: int) -> None:
    with pytest.raises(HostError):
        Bus("mmio").register(base, size, Register(0))


def test_a_moved_range_answers_only_at_its_new_place() -> None:
    bus = Bus("mmio")
    bus.register(0x1000, 0x100, Register(7))
    bus.move(0x1000, 0x1080)  # overlaps its old place
    assert bus.read(0x1000, 4) is None
    assert bus.read(0x1080, 4) == 7


def test_a_range_that_cannot_move_stays() -> None:
    bus = Bus("mmio")
    bus.register(0x1000, 0x100, Register(1))
    bus.register(0x2000, 0x100, Register(2))
    with pytest.raises(HostError):
        bus.move(0x1000, 0x20F0)
    assert (bus.read(0x1000, 4), bus.read(0x2000, 4)) == (1, 2)


def test_only_what_is_registered_can_go() -> None:
    bus = Bus("mmio")
    bus.register(0x1000, 0x100, Register(1))
    with pytest.raises(HostError):
        bus.unregister(0x1001)
    with pytest.raises(HostError):
        bus.move(0x2000, 0x3000)
    bus.unregister(0x1000)
    assert bus.read(0x1000, 1) is None


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 16)), max_size=30), st.integers(-1, 300))
def test_decoding_agrees_with_a_linear_search(ranges: list[tuple[int, int]], address: int) -> None:
    bus = Bus("any")
    accepted: list[tuple[int, int, Register]] = []
    for number, (base, size) in enumerate(ranges):
        fits = all(base + size <= b or b + s <= base for b, s, _ in accepted)
        device = Register(1000 * number)
        if fits:
            bus.register(base, size, device)
            accepted.append((base, size, device))
        else:
            with pytest.raises(HostError):
                bus.register(base, size, device)
    expected = [d.number + address - b for b, s, d in accepted if b <= address < b + s]
    assert bus.read(address, 1) == (expected[0] if expected else None)
