"""The MP table (Intel MultiProcessor Specification 1.4), for guests without ACPI."""

from __future__ import annotations

import struct

from controller.machine import layout as lo
from controller.machine.acpi.description import Description
from controller.machine.topology import x2apic_id

APIC_VERSION = 0x14
CPU_ENABLED, CPU_BOOT_PROCESSOR = 1, 2
CPU_SIGNATURE = 0x600
CPU_APIC_AND_FPU = 0x201
MAX_APIC_ID = 253
IOAPIC_ID = 0xFF
ISA_INTERRUPTS = 16
VECTORED, NMI, EXT_INT = 0, 1, 3
ALL_LOCAL_APICS = 0xFF


def mp_table(address: int, description: Description) -> bytes:
    """Floating pointer and configuration table for `address`; empty when an APIC id does not fit into 8 bits."""
    vcpus = range(description.boot_vcpus)
    if x2apic_id(vcpus[-1], description.topology) > MAX_APIC_ID:
        return b""
    entries = [
        struct.pack(
            "<BBBBII8x", 0, x2apic_id(vcpu, description.topology), APIC_VERSION,
            CPU_ENABLED | (0 if vcpu else CPU_BOOT_PROCESSOR), CPU_SIGNATURE, CPU_APIC_AND_FPU,
        )
        for vcpu in vcpus
    ]  # fmt: skip
    entries.append(struct.pack("<BB6s", 1, 0, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, IOAPIC_ID, APIC_VERSION, 1, lo.IOAPIC_START))
    entries += (struct.pack("<BBHBBBB", 3, VECTORED, 0, 0, pin, IOAPIC_ID, pin) for pin in range(ISA_INTERRUPTS))
    entries.append(struct.pack("<BBHBBBB", 4, EXT_INT, 0, 0, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", 4, NMI, 0, 0, 0, ALL_LOCAL_APICS, 1))
    body = b"".join(entries)

    header = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHII", b"PCMP", 44 + len(body), 4, 0, b"FC      ", b"0" * 12, 0, 0, 0, lo.APIC_START, 0
        )
    )
    header[7] = -(sum(header) + sum(body)) & 0xFF
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", address + 16, 1, 4, 0))
    pointer[10] = -sum(pointer) & 0xFF
    return bytes(pointer) + bytes(header) + body
