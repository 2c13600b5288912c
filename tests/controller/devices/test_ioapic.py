from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.devices.ioapic import PINS, Ioapic, msi_message
from controller.irq import IrqRouting
from shared.errors import ProtocolError
from shared.reactor import drain_eventfd
from tests.controller.fakes import RecordingVm

SELECT, WINDOW = 0, 0x10


class Chip:
    def __init__(self) -> None:
        self.vm = RecordingVm()
        self.ioapic = Ioapic(IrqRouting(self.vm))

    def get(self, register: int) -> int:
        self.ioapic.write(SELECT, 4, register)
        value = self.ioapic.read(WINDOW, 4)
        assert value is not None
        return value

    def set(self, register: int, value: int) -> None:
        self.ioapic.write(SELECT, 4, register)
        self.ioapic.write(WINDOW, 4, value)

    def program(self, pin: int, entry: int) -> None:
        self.set(0x11 + 2 * pin, entry >> 32)
        self.set(0x10 + 2 * pin, entry & 0xFFFF_FFFF)


@pytest.fixture
def chip() -> Iterator[Chip]:
    made = Chip()
    yield made
    made.ioapic.close()
    assert not made.vm.irqfds


def test_registers_at_power_on(chip: Chip) -> None:
    assert (chip.get(0), chip.get(1), chip.get(2)) == (0, 0x0017_0011, 0)
    assert [chip.get(0x10 + n) for n in range(2 * PINS)] == [0x10000, 0] * PINS
    assert chip.get(0x40) == 0


def test_id_register_has_four_bits(chip: Chip) -> None:
    chip.set(0, 0xFFFF_FFFF)
    assert (chip.get(0), chip.get(2)) == (0x0F00_0000, 0x0F00_0000)


def test_read_only_registers_and_bits(chip: Chip) -> None:
    chip.set(1, 0)
    chip.set(1, 5)
    chip.set(0x10, 0xFFFF_FFFF)
    assert chip.get(1) == 0x0017_0011
    assert chip.get(0x10) == 0xFFFF_AFFF


def test_only_dwords_count(chip: Chip) -> None:
    for size in (1, 2, 8):
        assert chip.ioapic.read(SELECT, size) is None
        chip.ioapic.write(SELECT, size, 1)
    assert chip.ioapic.read(4, 4) is None
    chip.ioapic.write(4, 4, 1)
    assert chip.ioapic.read(SELECT, 4) == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (0x0000_0000_0000_0034, (0xFEE0_0008, 0x34)),
        (0x0300_0000_0000_0034, (0xFEE0_3008, 0x34)),  # destination 3
        (0xFF00_0000_0000_0834, (0xFEEF_F00C, 0x34)),  # logical
        (0x0000_0000_0000_8134, (0xFEE0_0008, 0x8134)),  # level, lowest priority
        (0x0000_0000_0000_C034, (0xFEE0_0008, 0xC034)),  # remote IRR
        (0x0000_0000_0000_2434, (0xFEE0_0008, 0x0434)),  # NMI; polarity is not modelled
        (0x0102_0000_0000_0034, (0xFEE0_1028, 0x34)),  # destination 257
    ],
)
def test_messages(entry: int, message: tuple[int, int]) -> None:
    assert msi_message(entry) == message


def test_a_pin_that_the_guest_unmasks_becomes_an_irqfd_on_a_gsi_from_24(chip: Chip) -> None:
    chip.program(4, 0x0000_0000_0001_0034)
    assert (chip.vm.routes, chip.vm.irqfds) == ({}, set())
    chip.program(4, 0x34)
    chip.program(13, 0x35)
    assert chip.vm.routes == {24: (0xFEE0_0008, 0, 0x34), 25: (0xFEE0_0008, 0, 0x35)}
    assert chip.vm.irqfds == {(chip.ioapic.eventfd(4), 24), (chip.ioapic.eventfd(13), 25)}


def test_reprogramming_changes_the_route_and_masking_takes_the_irqfd(chip: Chip) -> None:
    chip.program(4, 0x34)
    chip.set(0x19, 0x0200_0000)
    assert chip.vm.routes == {24: (0xFEE0_2008, 0, 0x34)}
    chip.set(0x18, 0x1_0034)
    assert not chip.vm.irqfds
    chip.set(0x18, 0x55)
    assert chip.vm.routes == {24: (0xFEE0_2008, 0, 0x55)}
    assert len(chip.vm.irqfds) == 1


def test_a_pulse_of_a_masked_pin_waits_in_its_eventfd(chip: Chip) -> None:
    chip.ioapic.pulse(4)
    chip.program(4, 0x34)
    assert drain_eventfd(chip.ioapic.eventfd(4)) == 1


def test_remote_irr_of_a_level_pin_is_set_by_a_pulse_and_cleared_by_eoi(chip: Chip) -> None:
    chip.program(5, 0x8040)
    chip.program(6, 0x0040)
    chip.ioapic.pulse(5)
    chip.ioapic.pulse(6)
    assert (chip.get(0x1A), chip.get(0x1C)) == (0xC040, 0x0040)
    chip.ioapic.end_of_interrupt(0x41)
    assert chip.get(0x1A) == 0xC040
    chip.ioapic.end_of_interrupt(0x40)
    assert chip.get(0x1A) == 0x8040


def test_state(chip: Chip) -> None:
    chip.program(4, 0x34)
    chip.program(13, 0x1_0035)
    chip.set(0, 0x0200_0000)
    chip.ioapic.pulse(13)
    chip.ioapic.pulse(7)
    state = chip.ioapic.save()
    assert list(state)[:5] == ["id_reg", "reg_sel", "reg_entries", "used_entries", "apic_address"]
    assert (state["id_reg"], state["reg_sel"], state["apic_address"]) == (2, 0, 4276092928)
    entries, used = state["reg_entries"], state["used_entries"]
    assert isinstance(entries, list) and isinstance(used, list)
    assert (entries[4], entries[13], entries[0]) == (0x34, 0x1_0035, 0x1_0000)
    assert [pin for pin, flag in enumerate(used) if flag] == [4, 13]
    other = Chip()
    other.ioapic.load(state)
    assert other.vm.routes == {24: (0xFEE0_0008, 0, 0x34)}
    assert other.vm.commits == 1
    assert other.ioapic.save() == state
    other.set(0x2A, 0x35)
    assert drain_eventfd(other.ioapic.eventfd(13)) == 1, "the masked pulse came along"
    assert drain_eventfd(other.ioapic.eventfd(7)) == 1
    other.ioapic.close()
    # The source goes on when the migration fails: saving has taken nothing away.
    chip.set(0x2A, 0x35)
    assert drain_eventfd(chip.ioapic.eventfd(13)) == 1


def test_a_state_of_cloud_hypervisor_has_no_pending_pulses(chip: Chip) -> None:
    state = chip.ioapic.save()
    del state["flotilla"]
    chip.ioapic.load(state)
    assert chip.ioapic.save()["flotilla"] == {"pending": [False] * PINS}


@pytest.mark.parametrize(
    ("key", "value"),
    [("reg_entries", [0] * 23), ("used_entries", [1] * 24), ("reg_entries", [1 << 64] * 24), ("id_reg", 16)],
)
def test_a_bad_state_changes_nothing(chip: Chip, key: str, value: object) -> None:
    chip.program(4, 0x34)
    before = chip.ioapic.save()
    with pytest.raises(ProtocolError, match=f"__ioapic: {key}"):
        chip.ioapic.load({**before, key: value})
    assert chip.ioapic.save() == before


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([0, 0, 0x10, 0x10, 4, 0x1F]),
            st.sampled_from([4, 4, 4, 1, 8]),
            st.integers(0, 0x45) | st.integers(0, 2**32 - 1),
        ),
        max_size=60,
    )
)
def test_no_access_raises_and_irqfds_are_exactly_the_unmasked_pins(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    chip = Chip()
    try:
        for is_write, offset, size, value in accesses:
            if is_write:
                chip.ioapic.write(offset, size, value)
            else:
                chip.ioapic.read(offset, size)
        state = chip.ioapic.save()
        entries, used = state["reg_entries"], state["used_entries"]
        assert isinstance(entries, list) and isinstance(used, list)
        unmasked = {chip.ioapic.eventfd(p) for p in range(PINS) if used[p] and not entries[p] & 0x10000}
        assert {fd for fd, _ in chip.vm.irqfds} == unmasked
    finally:
        chip.ioapic.close()
