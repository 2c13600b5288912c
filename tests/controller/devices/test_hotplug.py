from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.devices.hotplug import CpuHotplug, PciHotplug
from shared.errors import ProtocolError


def test_pci_bitmaps_are_per_segment_and_cleared_by_reading() -> None:
    hotplug = PciHotplug(2, lambda segment, slot: None)
    hotplug.mark_up(0, 5)
    hotplug.mark_up(1, 31)
    hotplug.mark_down(1, 2)
    assert hotplug.pending
    assert (hotplug.read(0, 4), hotplug.read(0, 4), hotplug.read(4, 4)) == (1 << 5, 0, 0)
    hotplug.write(12, 4, 1)
    assert hotplug.read(12, 4) == 1
    assert (hotplug.read(0, 4), hotplug.read(4, 4)) == (1 << 31, 4)
    assert not hotplug.pending


def test_pci_eject_names_every_slot_of_the_selected_segment() -> None:
    ejected: list[tuple[int, int]] = []
    hotplug = PciHotplug(2, lambda segment, slot: ejected.append((segment, slot)))
    hotplug.write(8, 4, 0x8000_0004)
    hotplug.write(12, 4, 1)
    hotplug.write(8, 4, 2)
    assert ejected == [(0, 2), (0, 31), (1, 1)]
    assert hotplug.read(8, 4) == 0


def test_pci_registers_are_dwords_and_the_segment_must_exist() -> None:
    hotplug = PciHotplug(1, lambda segment, slot: None)
    hotplug.mark_up(0, 1)
    assert hotplug.read(0, 1) is None
    hotplug.write(12, 4, 1)
    hotplug.write(0, 4, 0)
    hotplug.write(8, 1, 2)
    assert (hotplug.read(12, 4), hotplug.read(0, 4)) == (0, 2)


def test_pci_state() -> None:
    hotplug = PciHotplug(2, lambda segment, slot: None)
    hotplug.mark_up(1, 3)
    hotplug.write(12, 4, 1)
    other = PciHotplug(2, lambda segment, slot: None)
    other.load({})
    other.load(hotplug.save())
    assert (other.read(12, 4), other.read(0, 4)) == (1, 8)
    with pytest.raises(ProtocolError):
        PciHotplug(1, lambda segment, slot: None).load(hotplug.save())


def cpus(boot: int = 2, most: int = 4) -> tuple[CpuHotplug, list[int]]:
    ejected: list[int] = []
    return CpuHotplug(boot, most, ejected.append), ejected


def test_cpu_status_of_the_selected_cpu() -> None:
    hotplug, _ = cpus()
    status = []
    for cpu in range(6):
        hotplug.write(0, 4, cpu)
        status.append(hotplug.read(4, 1))
    assert status == [1, 1, 0, 0, 0, 0]
    assert (hotplug.read(0, 4), hotplug.read(8, 4), hotplug.read(0, 1)) == (5, 0, 0)


def test_a_cpu_comes_and_is_acknowledged() -> None:
    hotplug, _ = cpus()
    hotplug.mark_inserting(2)
    hotplug.write(0, 4, 2)
    assert (hotplug.read(4, 1), hotplug.pending) == (3, True)
    hotplug.write(4, 1, 2)
    assert (hotplug.read(4, 1), hotplug.pending) == (1, False)


def test_a_cpu_goes_in_the_order_of_the_guests_methods() -> None:
    """CSCN notifies and acknowledges at once; _EJ0 comes later."""
    hotplug, ejected = cpus()
    hotplug.mark_removing(1)
    hotplug.write(0, 4, 1)
    assert hotplug.read(4, 1) == 5
    hotplug.write(4, 1, 4)
    assert (hotplug.read(4, 1), hotplug.pending) == (1, False)
    hotplug.write(4, 1, 8)
    assert (hotplug.read(4, 1), ejected) == (0, [1])
    hotplug.write(4, 1, 8)
    assert ejected == [1], "once"


def test_nobody_ejects_what_was_not_to_go_nor_the_boot_cpu() -> None:
    hotplug, ejected = cpus()
    hotplug.mark_removing(0)
    for cpu in range(4):
        hotplug.write(0, 4, cpu)
        hotplug.write(4, 1, 8)
    assert ejected == []


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 11), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1)
        )
    )
)
def test_no_access_raises_and_any_state_comes_back(accesses: list[tuple[bool, int, int, int]]) -> None:
    hotplug, _ = cpus()
    hotplug.mark_inserting(3)
    hotplug.mark_removing(1)
    for is_write, offset, size, value in accesses:
        if is_write:
            hotplug.write(offset, size, value)
        else:
            assert hotplug.read(offset, size) is not None
    other, _ = cpus()
    other.load(hotplug.save())
    assert other.save() == hotplug.save()


def test_cpu_state_is_checked() -> None:
    hotplug, _ = cpus()
    other = CpuHotplug(2, 8, lambda cpu: None)
    before = other.save()
    with pytest.raises(ProtocolError):
        other.load(hotplug.save())
    other.load({})
    assert other.save() == before
