from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.pci.allocator import AddressAllocator
from shared.errors import HostError


def test_32_bit_bars_go_down_from_the_top_of_the_window() -> None:
    window = AddressAllocator("32-bit", 0xC000_0000, 0xE800_0000)
    addresses = [window.allocate(0x8_0000, 0x8_0000) for _ in range(3)]
    assert addresses == [0xE7F8_0000, 0xE7F0_0000, 0xE7E8_0000]


def test_64_bit_bars_are_aligned_to_8_mib() -> None:
    window = AddressAllocator("64-bit", 0x1_0000_0000, 0x3FFF_FFEF_0000)
    addresses = [window.allocate(0x8_0000, 0x80_0000) for _ in range(3)]
    assert addresses == [0x3FFF_FF80_0000, 0x3FFF_FF00_0000, 0x3FFF_FE80_0000]


def test_a_bar_fits_below_an_earlier_pmem_region() -> None:
    window = AddressAllocator("64-bit", 0x1_0000_0000, 0x3FFF_FFEF_0000)
    assert window.allocate(4 << 20, 2 << 20) == 0x3FFF_FFA0_0000
    assert window.allocate(0x8_0000, 0x80_0000) == 0x3FFF_FF80_0000


def test_the_first_gap_from_the_top_that_fits_is_taken() -> None:
    window = AddressAllocator("test", 0, 0x1000)
    window.claim(0x800, 0x100)
    window.claim(0xF00, 0x80)
    assert window.allocate(0x80, 0x80) == 0xF80
    assert window.allocate(0x600, 0x100) == 0x900
    assert window.allocate(0x100, 0x100) == 0x700
    with pytest.raises(HostError, match="test window"):
        window.allocate(0x800, 0x100)


def test_what_is_freed_can_be_had_again() -> None:
    window = AddressAllocator("test", 0, 0x1000)
    address = window.allocate(0x1000, 0x1000)
    with pytest.raises(HostError):
        window.free(address, 0x800)
    window.free(address, 0x1000)
    window.claim(0x400, 0x400, 0x400)
    with pytest.raises(HostError):
        window.allocate(0x1000, 0x1000)


@pytest.mark.parametrize(
    ("address", "size", "align"),
    [(0xFFF, 2, 1), (0x2000, 1, 1), (0x14, 4, 8), (0x400, 1, 1), (0x3F0, 0x20, 16)],
)
def test_a_claim_must_be_inside_aligned_and_free(address: int, size: int, align: int) -> None:
    window = AddressAllocator("test", 0x10, 0x1000)
    window.claim(0x400, 0x100)
    with pytest.raises(HostError):
        window.claim(address, size, align)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 8)), max_size=30))
def test_allocations_never_overlap_and_keep_their_alignment(requests: list[tuple[int, int]]) -> None:
    window = AddressAllocator("test", 0x100, 0x900)
    taken: set[int] = set()
    for size, exponent in requests:
        try:
            address = window.allocate(size, 1 << exponent)
        except HostError:
            starts = range(0x100, 0x900 - size + 1)
            free = (a for a in starts if a % (1 << exponent) == 0 and taken.isdisjoint(range(a, a + size)))
            assert next(free, None) is None, "a gap was overlooked"
            continue
        span = set(range(address, address + size))
        assert address % (1 << exponent) == 0
        assert address >= 0x100 and address + size <= 0x900 and not span & taken
        taken |= span
