"""The address map: figures measured on Cloud Hypervisor v53.0 (its machine page, sections 1.1 to 1.7)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.machine import layout as lo
from controller.machine.layout import E820Entry, Range, compute
from shared.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30


def test_fixed_windows_do_not_move() -> None:
    assert (lo.MEM_32BIT_DEVICES_START, lo.RAM_64BIT_START) == (0xC000_0000, 0x1_0000_0000)
    assert lo.MEM_32BIT_DEVICES_START + lo.MEM_32BIT_DEVICES_SIZE == lo.PCI_MMCONFIG_START == 0xE800_0000
    assert lo.PCI_MMCONFIG_START + lo.PCI_MMCONFIG_SIZE == lo.KVM_TSS_START == 0xF800_0000
    assert lo.KVM_TSS_START + lo.KVM_TSS_SIZE == lo.KVM_IDENTITY_MAP_START == 0xF800_3000
    assert (lo.IOAPIC_START, lo.APIC_START, lo.TPM_START) == (0xFEC0_0000, 0xFEE0_0000, 0xFED4_0000)


def test_4_gib_are_two_ranges_and_four_e820_entries() -> None:
    layout = compute(4 * GIB, 48)
    assert layout.ram == (Range(0, 3 * GIB), Range(4 * GIB, GIB))
    assert layout.e820 == (
        E820Entry(0, 0xA0000, 1),
        E820Entry(0x100000, 0xBFF00000, 1),
        E820Entry(0x1_0000_0000, 0x4000_0000, 1),
        E820Entry(0xE800_0000, 0x1000_0000, 2),
    )
    assert layout.device_area.start == 0x1_4000_0000


@pytest.mark.parametrize("size", [512 * MIB, 3 * GIB])
def test_ram_up_to_3_gib_is_one_range_and_devices_start_at_4_gib(size: int) -> None:
    layout = compute(size, 48)
    assert layout.ram == (Range(0, size),)
    assert layout.device_area.start == 0x1_0000_0000
    assert len(layout.e820) == 3


def test_46_bits_without_memory_hotplug() -> None:
    layout = compute(GIB, 52, 46)
    assert layout.phys_bits == 46
    assert layout.device_area.last == 0x3FFF_FFEE_FFFF
    assert layout.memory_hotplug is None
    assert layout.pci_hotplug == Range(0x3FFF_FFFE_F000, 0x10)
    assert layout.cpu_hotplug == Range(0x3FFF_FFFE_E000, 0x0C)
    assert layout.ged == Range(0x3FFF_FFFE_D000, 0x01)


def test_46_bits_with_acpi_memory_hotplug() -> None:
    layout = compute(GIB, 46, acpi_hotplug_size=2 * GIB)
    assert layout.memory_hotplug == Range(0x3FFF_FFFE_F000, 0x18)
    assert layout.pci_hotplug.start == 0x3FFF_FFFE_E000
    assert layout.cpu_hotplug.start == 0x3FFF_FFFE_D000
    assert layout.ged.start == 0x3FFF_FFFE_C000
    assert layout.device_area.start == 0x1_8000_0000


def test_40_bits_by_the_hosts_or_by_the_option() -> None:
    assert compute(GIB, 40, 46) == compute(GIB, 52, 40)
    layout = compute(GIB, 40, 46)
    assert layout.device_area.last == 0xFF_FFEE_FFFF
    assert layout.pci_hotplug.start == 0xFF_FFFE_F000
    assert layout.cpu_hotplug.start == 0xFF_FFFE_E000
    assert layout.ged.start == 0xFF_FFFE_D000


def test_hotplug_room_starts_at_a_multiple_of_128_mib_above_3_gib() -> None:
    layout = compute(3 * GIB + 5 * MIB, 46, acpi_hotplug_size=GIB)
    assert layout.device_area.start == 0x1_0000_0000 + 128 * MIB + GIB


def test_a_migrated_vm_keeps_the_start_of_its_device_area() -> None:
    assert compute(GIB, 46, device_area_start=0x2_0000_0000).device_area.start == 0x2_0000_0000


def test_one_segment_takes_both_windows() -> None:
    (segment,) = compute(GIB, 46).segments
    assert segment.mmconfig == Range(0xE800_0000, 0x10_0000)
    assert (segment.mmio32.start, segment.mmio32.last) == (0xC000_0000, 0xE7FF_FFFF)
    assert (segment.mmio64.start, segment.mmio64.last) == (0x1_0000_0000, 0x3FFF_FFEE_FFFF)


def test_two_segments_share_the_windows() -> None:
    first, second = compute(GIB, 46, mmio32_weights=(1, 1), mmio64_weights=(1, 1)).segments
    assert (first.mmio32.last, first.mmio64.last) == (0xD3FF_FFFF, 0x1FFF_FFFF_FFFF)
    assert (second.mmio32.last, second.mmio64.last) == (0xE7FF_FFFF, 0x3FFF_FFEE_FFFF)
    assert second.mmconfig.start == 0xE810_0000


@given(
    size=st.integers(2 * MIB, 64 * GIB),
    bits=st.integers(38, 52),
    weights=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
)
def test_nothing_overlaps_and_nothing_is_lost(size: int, bits: int, weights: list[tuple[int, int]]) -> None:
    try:
        layout = compute(
            size, bits, 52, mmio32_weights=[low for low, _ in weights], mmio64_weights=[high for _, high in weights]
        )
    except ConfigError:
        # A weight is at least one granule of 4 GiB.
        assert (1 << bits) - size < (sum(high for _, high in weights) + 2) * 4 * GIB
        return
    assert layout.ram_size == size
    assert layout.ram[-1].end <= layout.device_area.start
    registers = (layout.ged, layout.cpu_hotplug, layout.pci_hotplug)
    assert len({register.start >> 12 for register in registers}) == 3
    assert all(
        layout.platform_area.start <= register.start and register.end <= layout.platform_area.end
        for register in registers
    )
    for windows, area in (
        ([segment.mmio32 for segment in layout.segments], Range(0xC000_0000, 640 * MIB)),
        ([segment.mmio64 for segment in layout.segments], layout.device_area),
    ):
        assert windows[0].start == area.start and windows[-1].end == area.end
        assert all(before.end == after.start for before, after in itertools.pairwise(windows))
        assert all(window.size > 0 for window in windows)


@pytest.mark.parametrize(("size", "bits", "flag"), [
    (0, 46, "--memory size=0"),
    (MIB, 46, "--memory size=1048576"),
    (1 << 46, 46, "--memory size=70368744177664"),
    (GIB, 32, "--memory size=1073741824"),
    (GIB, 0, "--memory size=1073741824"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_flag(size: int, bits: int, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        compute(size, bits)


def test_a_segment_without_room_for_its_bars_is_refused() -> None:
    weights = (1, 63)
    assert compute(GIB, 40, mmio64_weights=weights, mmio32_weights=weights).segments[0].mmio64.size == 12 * GIB
    with pytest.raises(ConfigError, match="--pci-segment"):
        compute(GIB, 37, mmio64_weights=weights, mmio32_weights=weights)


def test_pci_slots_share_eight_interrupts() -> None:
    assert [lo.pci_slot_gsi(slot) for slot in (0, 1, 7, 8, 31)] == [5, 6, 12, 5, 12]
