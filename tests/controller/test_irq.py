from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.irq import FIRST_GSI, MAX_GSIS, IrqRouting, translate_destination
from shared.errors import HostError
from tests.controller.fakes import RecordingVm


def test_gsis_begin_at_24_and_are_handed_out_lowest_first() -> None:
    routing = IrqRouting(RecordingVm())
    assert [routing.allocate_gsi() for _ in range(3)] == [24, 25, 26]
    routing.free_gsi(24)
    routing.free_gsi(25)
    assert [routing.allocate_gsi() for _ in range(3)] == [24, 25, 27]


def test_a_full_table_is_a_host_error() -> None:
    routing = IrqRouting(RecordingVm())
    for _ in range(FIRST_GSI, MAX_GSIS):
        routing.allocate_gsi()
    with pytest.raises(HostError, match="4096"):
        routing.allocate_gsi()


def test_commit_sends_the_whole_table_once_and_only_when_it_changed() -> None:
    vm = RecordingVm()
    routing = IrqRouting(vm)
    routing.commit()
    assert vm.commits == 0
    routing.set_msi(24, 0xFEE0_0000, 0, 0x41)
    routing.set_msi(25, 0xFEE0_1000, 0, 0x42)
    routing.commit()
    routing.set_msi(25, 0xFEE0_1000, 0, 0x42)
    routing.commit()
    assert vm.commits == 1
    assert vm.routes == {24: (0xFEE0_0000, 0, 0x41), 25: (0xFEE0_1000, 0, 0x42)}
    routing.clear(24)
    routing.clear(24)
    routing.commit()
    assert (vm.commits, list(vm.routes)) == (2, [25])


def test_an_irqfd_is_assigned_after_its_route_is_in_force() -> None:
    vm = RecordingVm()
    routing = IrqRouting(vm)
    fd = os.eventfd(0)
    try:
        gsi = routing.allocate_gsi()
        routing.set_msi(gsi, 0xFEE0_0000, 0, 0x41)
        routing.assign_irqfd(gsi, fd)  # RecordingVm refuses an irqfd without a route
        assert vm.irqfds == {(fd, gsi)}
        routing.deassign_irqfd(gsi, fd)
        assert not vm.irqfds
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0xFEE0_1000, 0, (0xFEE0_1000, 0)),  # destination 1
        (0xFEEF_F000, 0, (0xFEEF_F000, 0)),  # destination 255
        (0xFEE0_1020, 0, (0xFEE0_1000, 0x100)),  # destination 257: bit 5 is bit 8 of the id
        (0xFEE0_0FE0, 0, (0xFEE0_0000, 0x7F00)),  # all seven extended bits
        (0xFEE0_1030, 0, (0xFEE0_1030, 0)),  # remappable format: not for us
        (0xFEE0_1020, 0x300, (0xFEE0_1020, 0x300)),  # in x2APIC form already
        (0xFEE0_100C, 0, (0xFEE0_100C, 0)),  # redirection hint and destination mode stay
    ],
)
def test_extended_destination_ids(low: int, high: int, expected: tuple[int, int]) -> None:
    assert translate_destination(low, high) == expected


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_no_address_makes_kvm_refuse_the_table(low: int, high: int) -> None:
    """KVM answers EINVAL for the whole table when bits 7:0 of a high word are set."""
    new_low, new_high = translate_destination(low, high)
    assert 0 <= new_low < 2**32 and 0 <= new_high < 2**32
    assert not new_high & 0xFF
