"""The DSDT: PCI segments and slots, COM1, power button, sleep state, and the hotplug controllers with their registers.

Objects and their order are Cloud Hypervisor's; the guest keeps these addresses for life, across migrations.
"""

from __future__ import annotations

from collections.abc import Iterable

from controller.machine import layout as lo
from controller.machine.acpi import aml
from controller.machine.acpi.description import Description
from controller.machine.acpi.madt import X2APIC_ENABLED, x2apic_entry
from controller.machine.layout import Layout, PciSegment
from controller.machine.topology import x2apic_id

# PCI firmware specification 3.3, 4.6: e5c937d0-3553-4d7a-9117-ea4d19c3434d with its first three fields little-endian.
PCI_DSM_UUID = bytes.fromhex("d037c9e553357a4d9117ea4d19c3434d")
PRESENT_AND_WORKING = 0x0F
DEVICE_CHECK, EJECT_REQUEST = 1, 3
POWER_BUTTON_PRESSED = 0x80


def dsdt_terms(layout: Layout, description: Description) -> bytes:
    """The body of the DSDT, without its header."""
    return b"".join(
        (
            _pci_hotplug(layout),
            *(_pci_segment(segment) for segment in layout.segments),
            _motherboard(layout),
            _com1() if description.serial else b"",
            aml.name("_S5_", aml.package(aml.integer(5), aml.integer(5), aml.ZERO, aml.ZERO)),
            aml.device("_SB_.PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.ZERO)),
            _generic_event_controller(layout),
            _generic_event_device(),
            _cpu_hotplug(layout),
            _cpus(description),
            _memory_hotplug(layout),
        )
    )


def _registers(window: lo.Range) -> bytes:
    return aml.name("_CRS", aml.resource_template(aml.qword_memory(window.start, window.last)))


def _pci_hotplug(layout: Layout) -> bytes:
    window = layout.pci_hotplug
    return aml.device(
        "_SB_.PHPR",
        aml.name("_HID", aml.eisa_id("PNP0A06")),
        aml.name("_STA", aml.integer(0x0B)),
        aml.name("_UID", aml.string("PCI Hotplug Controller")),
        aml.mutex("BLCK"),
        _registers(window),
        aml.op_region("PCST", window.start, window.size),
        aml.field(
            "PCST", aml.DWORD_ACCESS, aml.WRITE_AS_ZEROS,
            ("PCIU", 32), ("PCID", 32), ("B0EJ", 32), ("PSEG", 32),
        ),
        aml.method(
            "PCEJ", 2,
            aml.acquire("BLCK"),
            aml.store(aml.arg(1), aml.path("PSEG")),
            aml.shift_left(aml.ONE, aml.arg(0), aml.path("B0EJ")),
            aml.release("BLCK"),
            aml.return_(aml.ZERO),
        ),
        aml.method("PSCN", 0, *(aml.call(f"\\_SB_.PC{segment.id:02X}.PCNT") for segment in layout.segments)),
    )  # fmt: skip


def _pci_segment(segment: PciSegment) -> bytes:
    return aml.device(
        f"_SB_.PC{segment.id:02X}",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_ADR", aml.ZERO),
        aml.name("_SEG", aml.integer(segment.id)),
        aml.name("_UID", aml.integer(segment.id)),
        aml.name("_CCA", aml.ONE),
        aml.name("SUPP", aml.ZERO),
        aml.method("_PXM", 0, aml.return_(aml.ZERO), serialized=False),
        _pci_dsm(),
        _pci_windows(segment),
        *(_pci_slot(slot) for slot in range(lo.PCI_SLOTS)),
        _pci_slot_notifications(),
        aml.method(
            "PCNT", 0,
            aml.acquire("\\_SB_.PHPR.BLCK"),
            aml.store(aml.path("_SEG"), aml.path("\\_SB_.PHPR.PSEG")),
            aml.call("DVNT", aml.path("\\_SB_.PHPR.PCIU"), aml.integer(DEVICE_CHECK)),
            aml.call("DVNT", aml.path("\\_SB_.PHPR.PCID"), aml.integer(EJECT_REQUEST)),
            aml.release("\\_SB_.PHPR.BLCK"),
        ),
        aml.name(
            "_PRT",
            aml.package(
                *(
                    aml.package(
                        aml.integer(slot << 16 | 0xFFFF), aml.ZERO, aml.ZERO, aml.integer(lo.pci_slot_gsi(slot))
                    )
                    for slot in range(lo.PCI_SLOTS)
                )
            ),
        ),
    )  # fmt: skip


def _pci_dsm() -> bytes:
    """Function 0 names the functions there are, function 5 keeps the OS from reassigning the BARs."""
    return aml.method(
        "_DSM", 4,
        aml.if_(
            aml.equal(aml.arg(0), aml.buffer(PCI_DSM_UUID)),
            aml.if_(aml.equal(aml.arg(2), aml.ZERO), aml.return_(aml.buffer(b"\x21"))),
            aml.if_(aml.equal(aml.arg(2), aml.integer(5)), aml.return_(aml.ZERO)),
        ),
        aml.return_(aml.buffer(b"\x00")),
        serialized=False,
    )  # fmt: skip


def _pci_windows(segment: PciSegment) -> bytes:
    """What the bridge decodes. Only segment 0 has I/O ports: those around the configuration mechanism."""
    memory = (
        aml.memory32_fixed(segment.mmconfig.start, segment.mmconfig.size),
        aml.qword_memory(segment.mmio32.start, segment.mmio32.last),
        aml.qword_memory(segment.mmio64.start, segment.mmio64.last),
    )
    bus = aml.word_bus_numbers(0, 0)
    if segment.id:
        return aml.name("_CRS", aml.resource_template(bus, *memory))
    return aml.name(
        "_CRS",
        aml.resource_template(
            bus,
            aml.io_port(lo.PCI_CONFIG_PORT, 1, lo.PCI_CONFIG_SIZE),
            *memory,
            aml.word_io(0, lo.PCI_CONFIG_PORT - 1),
            aml.word_io(lo.PCI_CONFIG_PORT + lo.PCI_CONFIG_SIZE, 0xFFFF),
        ),
    )


def _pci_slot(slot: int) -> bytes:
    return aml.device(
        f"S{slot:03}",
        aml.name("_SUN", aml.integer(slot)),
        aml.name("_ADR", aml.integer(slot << 16)),
        aml.method("_EJ0", 1, aml.call("\\_SB_.PHPR.PCEJ", aml.path("_SUN"), aml.path("_SEG"))),
    )


def _pci_slot_notifications() -> bytes:
    """DVNT(bitmap, code): notify every slot whose bit is set."""
    terms: list[bytes] = []
    for slot in range(lo.PCI_SLOTS):
        bit = aml.integer(1 << slot)
        terms += (
            aml.and_(aml.arg(0), bit, aml.local(0)),
            aml.if_(aml.equal(aml.local(0), bit), aml.notify(f"S{slot:03}", aml.arg(1))),
        )
    return aml.method("DVNT", 2, *terms)


def _motherboard(layout: Layout) -> bytes:
    return aml.device(
        "_SB_.MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.ZERO),
        aml.name(
            "_CRS",
            aml.resource_template(
                *(aml.memory32_fixed(segment.mmconfig.start, segment.mmconfig.size) for segment in layout.segments)
            ),
        ),
    )


def _com1() -> bytes:
    return aml.device(
        "_SB_.COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.ZERO),
        aml.name("_DDN", aml.string("COM1")),
        aml.name(
            "_CRS",
            aml.resource_template(aml.interrupt(lo.COM1_GSI), aml.io_port(lo.COM1_PORT, 0, lo.COM1_SIZE)),
        ),
    )


def _generic_event_controller(layout: Layout) -> bytes:
    """ESCN reads the event byte once (reading clears it) and runs what each bit stands for."""
    window = layout.ged
    events = (
        (1, aml.call("\\_SB_.CPUS.CSCN")),
        (2, aml.call("\\_SB_.MHPC.MSCN")),
        (4, aml.call("\\_SB_.PHPR.PSCN")),
        (8, aml.notify("\\_SB_.PWRB", aml.integer(POWER_BUTTON_PRESSED))),
    )
    terms = [aml.store(aml.path("GDAT"), aml.local(0))]
    for bit, action in events:
        terms += (
            aml.and_(aml.local(0), aml.integer(bit), aml.local(1)),
            aml.if_(aml.equal(aml.local(1), aml.integer(bit)), action),
        )
    return aml.device(
        "_SB_.GEC_",
        aml.name("_HID", aml.eisa_id("PNP0A06")),
        aml.name("_UID", aml.string("Generic Event Controller")),
        _registers(window),
        aml.op_region("GDST", window.start, window.size),
        aml.field("GDST", aml.BYTE_ACCESS, aml.WRITE_AS_ZEROS, ("GDAT", 8)),
        aml.method("ESCN", 0, *terms),
    )


def _generic_event_device() -> bytes:
    return aml.device(
        "_SB_.GED_",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resource_template(aml.interrupt(lo.GED_GSI))),
        aml.method("_EVT", 1, aml.call("\\_SB_.GEC_.ESCN")),
    )


def _cpu_hotplug(layout: Layout) -> bytes:
    window = layout.cpu_hotplug
    return aml.device(
        "_SB_.PRES",
        aml.name("_HID", aml.eisa_id("PNP0A06")),
        aml.name("_UID", aml.string("CPU Hotplug Controller")),
        aml.mutex("CPLK"),
        _registers(window),
        aml.op_region("PRST", window.start, window.size),
        aml.field(
            "PRST", aml.BYTE_ACCESS, aml.WRITE_AS_ZEROS,
            ("", 32), ("CPEN", 1), ("CINS", 1), ("CRMV", 1), ("CEJ0", 1), ("", 4), ("CCMD", 8),
        ),
        aml.field("PRST", aml.DWORD_ACCESS, aml.PRESERVE, ("CSEL", 32), ("", 32), ("CDAT", 32)),
    )  # fmt: skip


def _cpus(description: Description) -> bytes:
    vcpus = range(description.max_vcpus)
    select = aml.store(aml.arg(0), aml.path("\\_SB_.PRES.CSEL"))
    lock, unlock = aml.acquire("\\_SB_.PRES.CPLK"), aml.release("\\_SB_.PRES.CPLK")
    return aml.device(
        "_SB_.CPUS",
        aml.name("_HID", aml.string("ACPI0010")),
        aml.name("_CID", aml.eisa_id("PNP0A05")),
        aml.method(
            "CSTA", 1,
            lock,
            select,
            aml.store(aml.ZERO, aml.local(0)),
            aml.if_(
                aml.equal(aml.path("\\_SB_.PRES.CPEN"), aml.ONE),
                aml.store(aml.integer(PRESENT_AND_WORKING), aml.local(0)),
            ),
            unlock,
            aml.return_(aml.local(0)),
        ),
        _notifications("CTFY", ((vcpu, f"C{vcpu:03X}") for vcpu in vcpus)),
        aml.method("CEJ0", 1, lock, select, aml.store(aml.ONE, aml.path("\\_SB_.PRES.CEJ0")), unlock),
        aml.method(
            "CSCN", 0,
            lock,
            _scan("CTFY", "\\_SB_.PRES.CSEL", "\\_SB_.PRES.CINS", "\\_SB_.PRES.CRMV", description.max_vcpus),
            unlock,
        ),
        *(_cpu(vcpu, x2apic_id(vcpu, description.topology)) for vcpu in vcpus),
    )  # fmt: skip


def _cpu(vcpu: int, apic_id: int) -> bytes:
    uid = aml.integer(vcpu)
    return aml.device(
        f"C{vcpu:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", uid),
        aml.method("_STA", 0, aml.return_(aml.call("CSTA", uid)), serialized=False),
        aml.method("_PXM", 0, aml.return_(aml.ZERO), serialized=False),
        # Linux wants the enabled bit here even for a CPU that the MADT lists as absent.
        aml.name("_MAT", aml.buffer(x2apic_entry(vcpu, apic_id, X2APIC_ENABLED))),
        aml.method("_EJ0", 1, aml.call("CEJ0", uid), serialized=False),
    )


def _notifications(target: str, objects: Iterable[tuple[int, str]]) -> bytes:
    """A method (index, code) that notifies the object of that index."""
    cases = (
        aml.if_(aml.equal(aml.arg(0), aml.integer(index)), aml.notify(label, aml.arg(1)))
        for index, label in objects
    )
    return aml.method(target, 2, *cases)


def _scan(notify: str, selector: str, inserting: str, removing: str, count: int) -> bytes:
    """Select each of `count` objects; announce and acknowledge what is being inserted or removed."""
    index = aml.local(0)

    def announce(flag: str, code: int) -> bytes:
        return aml.if_(
            aml.equal(aml.path(flag), aml.ONE),
            aml.call(notify, index, aml.integer(code)),
            aml.store(aml.ONE, aml.path(flag)),
        )

    return aml.store(aml.ZERO, index) + aml.while_(
        aml.less(index, aml.integer(count)),
        aml.store(index, aml.path(selector)),
        announce(inserting, DEVICE_CHECK),
        announce(removing, EJECT_REQUEST),
        aml.add(index, aml.ONE, index),
    )


def _memory_hotplug(layout: Layout) -> bytes:
    head = aml.name("_HID", aml.eisa_id("PNP0A06")) + aml.name("_UID", aml.string("Memory Hotplug Controller"))
    window = layout.memory_hotplug
    if window is None:
        # ESCN calls it whether or not there is such a controller.
        return aml.device("_SB_.MHPC", head, aml.method("MSCN", 0))
    slots = range(lo.MEMORY_HOTPLUG_SLOTS)
    return aml.device(
        "_SB_.MHPC",
        head,
        aml.mutex("MLCK"),
        _registers(window),
        aml.op_region("MHPR", window.start, window.size),
        aml.field(
            "MHPR", aml.DWORD_ACCESS, aml.PRESERVE, ("MHBL", 32), ("MHBH", 32), ("MHLL", 32), ("MHLH", 32)
        ),
        aml.field("MHPR", aml.DWORD_ACCESS, aml.PRESERVE, ("", 128), ("MHPX", 32)),
        aml.field(
            "MHPR", aml.BYTE_ACCESS, aml.WRITE_AS_ZEROS,
            ("", 160), ("MEN_", 1), ("MINS", 1), ("MRMV", 1), ("MEJ0", 1),
        ),
        aml.field("MHPR", aml.DWORD_ACCESS, aml.PRESERVE, ("MSEL", 32), ("MOEV", 32), ("MOSC", 32)),
        _notifications("MTFY", ((slot, f"M{slot:03}") for slot in slots)),
        aml.method(
            "MSCN", 0,
            aml.acquire("MLCK"),
            _scan("MTFY", "\\_SB_.MHPC.MSEL", "\\_SB_.MHPC.MINS", "\\_SB_.MHPC.MRMV", len(slots)),
            aml.release("MLCK"),
        ),
        _memory_status(),
        _memory_resources(),
        *(_memory_slot(slot) for slot in slots),
    )  # fmt: skip


def _memory_status() -> bytes:
    return aml.method(
        "MSTA", 1,
        aml.acquire("MLCK"),
        aml.store(aml.arg(0), aml.path("\\_SB_.MHPC.MSEL")),
        aml.store(aml.ZERO, aml.local(0)),
        aml.if_(
            aml.equal(aml.path("\\_SB_.MHPC.MEN_"), aml.ONE),
            aml.store(aml.integer(PRESENT_AND_WORKING), aml.local(0)),
        ),
        aml.release("MLCK"),
        aml.return_(aml.local(0)),
    )  # fmt: skip


def _memory_resources() -> bytes:
    """MCRS(slot): a QWord memory descriptor filled from the base and length registers, word by word."""
    minimum, maximum, length = 14, 22, 38  # offsets in the descriptor
    path = aml.path
    return aml.method(
        "MCRS", 1,
        aml.acquire("MLCK"),
        aml.store(aml.arg(0), path("\\_SB_.MHPC.MSEL")),
        aml.name("MR64", aml.resource_template(aml.qword_memory(0, (1 << 64) - 2, aml.CACHEABLE))),
        aml.create_qword_field("MR64", minimum, "MINL"),
        aml.create_dword_field("MR64", minimum + 4, "MINH"),
        aml.create_qword_field("MR64", maximum, "MAXL"),
        aml.create_dword_field("MR64", maximum + 4, "MAXH"),
        aml.create_qword_field("MR64", length, "LENL"),
        aml.create_dword_field("MR64", length + 4, "LENH"),
        aml.store(path("\\_SB_.MHPC.MHBL"), path("MINL")),
        aml.store(path("\\_SB_.MHPC.MHBH"), path("MINH")),
        aml.store(path("\\_SB_.MHPC.MHLL"), path("LENL")),
        aml.store(path("\\_SB_.MHPC.MHLH"), path("LENH")),
        aml.add(path("MINL"), path("LENL"), path("MAXL")),
        aml.add(path("MINH"), path("LENH"), path("MAXH")),
        aml.if_(aml.less(path("MAXL"), path("MINL")), aml.add(aml.ONE, path("MAXH"), path("MAXH"))),
        aml.subtract(path("MAXL"), aml.ONE, path("MAXL")),
        aml.release("MLCK"),
        aml.return_(path("MR64")),
    )  # fmt: skip


def _memory_slot(slot: int) -> bytes:
    uid = aml.integer(slot)
    return aml.device(
        f"M{slot:03}",
        aml.name("_HID", aml.eisa_id("PNP0C80")),
        aml.name("_UID", uid),
        aml.method("_STA", 0, aml.return_(aml.call("MSTA", uid)), serialized=False),
        aml.method("_CRS", 0, aml.return_(aml.call("MCRS", uid)), serialized=False),
    )
