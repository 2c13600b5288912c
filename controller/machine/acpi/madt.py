"""Entries of the MADT. Their layout: ACPI specification 6.5, 5.2.12."""

from __future__ import annotations

import struct

from controller.machine import layout as lo
from controller.machine.acpi.description import Description
from controller.machine.topology import x2apic_id

X2APIC_ENABLED, X2APIC_ONLINE_CAPABLE = 1, 2


def x2apic_entry(vcpu: int, apic_id: int, flags: int) -> bytes:
    """Processor Local x2APIC, type 9; `vcpu` is the processor UID."""
    return struct.pack("<BBHIII", 9, 16, 0, apic_id, flags, vcpu)


def madt_body(description: Description) -> bytes:
    """All after the header: no PCAT_COMPAT flag, for there is no 8259; COM1's interrupt is not remapped."""
    entries = [struct.pack("<II", lo.APIC_START, 0)]
    for vcpu in range(description.max_vcpus):
        flags = X2APIC_ONLINE_CAPABLE | (X2APIC_ENABLED if vcpu < description.boot_vcpus else 0)
        entries.append(x2apic_entry(vcpu, x2apic_id(vcpu, description.topology), flags))
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, lo.IOAPIC_START, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, lo.COM1_GSI, lo.COM1_GSI, 0))
    return b"".join(entries)
