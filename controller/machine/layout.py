"""The guest's physical address map, I/O ports and interrupt numbers.

Cloud Hypervisor's values (arch/x86_64/layout.rs and the memory and device managers of v53.0): constants first, then
`compute`, which gives what depends on the RAM size and on the physical address bits. Addresses and sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import ConfigError
from shared.memory import HIGH_RAM_START, LOW_RAM_END, PAGE_SIZE
from shared.records import NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Low memory, as it is when the first vCPU starts.
EBDA_POINTER = 0x40E
BOOT_GDT_START = 0x500
BOOT_IDT_START = 0x520
PVH_INFO_START = 0x6000
PVH_MODLIST_START = 0x6040
PVH_MEMMAP_START = 0x7000
ZERO_PAGE_START = 0x7000
BOOT_STACK_POINTER = 0x8FF0
CMDLINE_START = 0x2_0000
CMDLINE_MAX_SIZE = 0x1_0000
EBDA_START = 0xA_0000
RSDP_START = EBDA_START
SMBIOS_START = 0xF_0000
KERNEL_START = 0x10_0000

# The gap between LOW_RAM_END and RAM_64BIT_START.
RAM_64BIT_START = HIGH_RAM_START
MEM_32BIT_DEVICES_START = 0xC000_0000
MEM_32BIT_DEVICES_SIZE = 640 * MIB
PCI_MMCONFIG_START = 0xE800_0000
PCI_MMCONFIG_SIZE = 256 * MIB
PCI_MMCONFIG_SEGMENT_SIZE = MIB
KVM_TSS_START = 0xF800_0000
KVM_TSS_SIZE = 3 * PAGE_SIZE
KVM_IDENTITY_MAP_START = 0xF800_3000
KVM_IDENTITY_MAP_SIZE = PAGE_SIZE
IOAPIC_START = 0xFEC0_0000
IOAPIC_SIZE = 0x20
TPM_START = 0xFED4_0000
TPM_SIZE = 0x1000
APIC_START = 0xFEE0_0000
MSI_WINDOW_SIZE = MIB

# The top of the address space: 64 KiB stay free (Linux and Windows stumble over devices at the very end), below them
# lies the platform area with the ACPI registers, one page each.
RESERVED_TOP_SIZE = 0x1_0000
PLATFORM_AREA_SIZE = MIB
MEMORY_HOTPLUG_SIZE = 0x18
PCI_HOTPLUG_SIZE = 0x10
CPU_HOTPLUG_SIZE = 0x0C
GED_SIZE = 0x01
MEMORY_HOTPLUG_SLOTS = 8
MEMORY_HOTPLUG_ALIGNMENT = 128 * MIB

# I/O ports.
I8042_PORT, I8042_SIZE = 0x61, 4
CMOS_PORT, CMOS_SIZE = 0x70, 2
POST_PORT = 0x80
DEBUG_CONSOLE_PORT = 0xE9
COM1_PORT, COM1_SIZE = 0x3F8, 8
FIRMWARE_DEBUG_PORT = 0x402
ACPI_SHUTDOWN_PORT, ACPI_SHUTDOWN_SIZE = 0x600, 4
ACPI_PM_TIMER_PORT, ACPI_PM_TIMER_SIZE = 0x608, 4
PCI_CONFIG_PORT, PCI_CONFIG_SIZE = 0xCF8, 8

# Interrupts.
COM1_GSI = 4
PCI_GSI_BASE, PCI_GSI_COUNT = 5, 8
GED_GSI = 13
IOAPIC_PINS = 24
MSI_GSI_BASE = 24

# Base address registers.
PCI_SLOTS = 32
VIRTIO_BAR_SIZE = 0x8_0000
VIRTIO_BAR32_ALIGNMENT = 0x8_0000
VIRTIO_BAR64_ALIGNMENT = 0x80_0000
MMIO32_GRANULE = 4 * KIB
MMIO64_GRANULE = 4 * GIB

DEFAULT_MAX_PHYS_BITS = 46
MIN_RAM_SIZE = 2 * MIB

E820_RAM = 1
E820_RESERVED = 2


def pci_slot_gsi(slot: int) -> int:
    """The GSI that _PRT gives slot `slot`. No virtio device raises it."""
    return PCI_GSI_BASE + slot % PCI_GSI_COUNT


class Range(NamedTuple):
    """Guest addresses from `start` on, `size` bytes; `end` is exclusive, `last` inclusive."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def last(self) -> int:
        return self.start + self.size - 1


class E820Entry(NamedTuple):
    address: int
    size: int
    type: int


class PciSegment(NamedTuple):
    """A PCI segment (one bus): its MMCONFIG window and the windows its BARs are allocated from, top down."""

    id: int
    mmconfig: Range
    mmio32: Range
    mmio64: Range


class Layout(NamedTuple):
    """What follows from RAM size and address width. `memory_hotplug` is None without ACPI memory hotplug."""

    ram: tuple[Range, ...]
    phys_bits: int
    device_area: Range
    platform_area: Range
    memory_hotplug: Range | None
    pci_hotplug: Range
    cpu_hotplug: Range
    ged: Range
    segments: tuple[PciSegment, ...]
    e820: tuple[E820Entry, ...]

    @property
    def ram_size(self) -> int:
        return sum(part.size for part in self.ram)


def compute(
    ram_size: int,
    host_phys_bits: int,
    max_phys_bits: int = DEFAULT_MAX_PHYS_BITS,
    *,
    acpi_hotplug_size: int | None = None,
    device_area_start: int | None = None,
    mmio32_weights: Sequence[int] = (1,),
    mmio64_weights: Sequence[int] = (1,),
) -> Layout:
    """The address map of a VM with `ram_size` bytes.

    For a VM that arrives by migration `host_phys_bits` are those of its CPUID leaf 0x80000008, not the host's, and
    `device_area_start` is the stream's: the ACPI tables in its RAM name the addresses of the host it was born on.
    The weights share the BAR windows among PCI segments, one weight each. Raises ConfigError.
    """
    phys_bits = min(host_phys_bits, max_phys_bits)
    if ram_size < MIN_RAM_SIZE:
        raise ConfigError(f"--memory size={ram_size}: too little RAM", f"at least {MIN_RAM_SIZE} bytes are needed")

    top = (1 << phys_bits) - RESERVED_TOP_SIZE
    platform_area = Range(top - PLATFORM_AREA_SIZE, PLATFORM_AREA_SIZE)
    ram = _ram_ranges(ram_size)
    start = _device_area_start(ram, acpi_hotplug_size) if device_area_start is None else device_area_start
    if start >= platform_area.start:
        raise ConfigError(
            f"--memory size={ram_size}: RAM and devices do not fit in {phys_bits} physical address bits",
            "use less memory, or raise --cpus max_phys_bits if the host has more",
        )
    device_area = Range(start, platform_area.start - start)
    segments = _pci_segments(device_area, mmio32_weights, mmio64_weights)
    if not all(segment.mmio32.size and segment.mmio64.size for segment in segments):
        raise ConfigError(
            f"--pci-segment: {device_area.size:#x} bytes of device area leave a segment without a window for its BARs",
            "the windows are cut in pieces of 4 GiB; use fewer segments or smaller weights",
        )

    pages = iter(range(platform_area.end - PAGE_SIZE, platform_area.start, -PAGE_SIZE))
    memory_hotplug = Range(next(pages), MEMORY_HOTPLUG_SIZE) if acpi_hotplug_size else None
    return Layout(
        ram=ram,
        phys_bits=phys_bits,
        device_area=device_area,
        platform_area=platform_area,
        memory_hotplug=memory_hotplug,
        pci_hotplug=Range(next(pages), PCI_HOTPLUG_SIZE),
        cpu_hotplug=Range(next(pages), CPU_HOTPLUG_SIZE),
        ged=Range(next(pages), GED_SIZE),
        segments=segments,
        e820=_e820(ram),
    )


def _ram_ranges(ram_size: int) -> tuple[Range, ...]:
    low = Range(0, min(ram_size, LOW_RAM_END))
    if ram_size <= LOW_RAM_END:
        return (low,)
    return low, Range(RAM_64BIT_START, ram_size - LOW_RAM_END)


def _device_area_start(ram: tuple[Range, ...], acpi_hotplug_size: int | None) -> int:
    """Behind RAM, but never below 4 GiB; with ACPI memory hotplug also behind the room for it."""
    last = ram[-1].last
    start = RAM_64BIT_START
    if last >= LOW_RAM_END:
        start = (last | (MEMORY_HOTPLUG_ALIGNMENT - 1)) + 1 if acpi_hotplug_size is not None else last + 1
    return start + (acpi_hotplug_size or 0)


def _windows(area: Range, weights: Sequence[int], granule: int) -> list[Range]:
    """`area` cut in proportion to `weights`, at multiples of `granule`; the last part takes what is left."""
    unit = area.size // (granule * sum(weights)) * granule
    starts = [area.start + unit * sum(weights[:index]) for index in range(len(weights))]
    return [Range(start, end - start) for start, end in zip(starts, [*starts[1:], area.end], strict=True)]


def _mmconfig(segment: int) -> Range:
    return Range(PCI_MMCONFIG_START + segment * PCI_MMCONFIG_SEGMENT_SIZE, PCI_MMCONFIG_SEGMENT_SIZE)


def _pci_segments(
    device_area: Range, mmio32_weights: Sequence[int], mmio64_weights: Sequence[int]
) -> tuple[PciSegment, ...]:
    low = _windows(Range(MEM_32BIT_DEVICES_START, MEM_32BIT_DEVICES_SIZE), mmio32_weights, MMIO32_GRANULE)
    high = _windows(device_area, mmio64_weights, MMIO64_GRANULE)
    return tuple(
        PciSegment(index, _mmconfig(index), mmio32, mmio64)
        for index, (mmio32, mmio64) in enumerate(zip(low, high, strict=True))
    )


def _e820(ram: tuple[Range, ...]) -> tuple[E820Entry, ...]:
    """The memory map of both boot protocols. It leaves out 0xA0000 to 1 MiB, RAM that holds the firmware tables."""
    entries = [E820Entry(0, EBDA_START, E820_RAM), E820Entry(KERNEL_START, ram[0].end - KERNEL_START, E820_RAM)]
    entries += [E820Entry(part.start, part.size, E820_RAM) for part in ram[1:]]
    entries.append(E820Entry(PCI_MMCONFIG_START, PCI_MMCONFIG_SIZE, E820_RESERVED))
    return tuple(entries)
