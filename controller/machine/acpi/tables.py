"""All firmware tables of a VM, written where the guest looks for them.

ACPI tables start at 0xA0000 with the RSDP and follow each other without padding: RSDP, DSDT, FACP, APIC, MCFG, XSDT.
SMBIOS is at 0xF0000, the MP table behind it. Layouts: ACPI specification 6.5, chapter 5.
"""

from __future__ import annotations

import struct

from controller.machine import layout as lo
from controller.machine.acpi.description import Description
from controller.machine.acpi.dsdt import dsdt_terms
from controller.machine.acpi.madt import madt_body
from controller.machine.acpi.mptable import mp_table
from controller.machine.acpi.smbios import smbios_tables
from controller.machine.layout import Layout
from shared.errors import ConfigError
from shared.memory import GuestMemory

OEM_ID = b"CLOUDH"
HEADER_SIZE = 36
RSDP_SIZE = 36
DSDT_START = lo.RSDP_START + RSDP_SIZE
SYSTEM_IO = 1
FADT_TMR_VAL_EXT, FADT_RESET_REG_SUP, FADT_HW_REDUCED = 1 << 8, 1 << 10, 1 << 20


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes zero modulo 256."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, oem_table_id: bytes, body: bytes) -> bytes:
    """A system description table: the 36-byte header with its checksum, then `body`."""
    data = bytearray(
        struct.pack(
            "<4sIBB6s8sI4s4s",
            signature, HEADER_SIZE + len(body), revision, 0, OEM_ID, oem_table_id, 1, b"RVAT", b"\x00\x00\x00\x01",
        )
    )  # fmt: skip
    data += body
    data[9] = checksum(data)
    return bytes(data)


def _register(bits: int, access_size: int, port: int) -> bytes:
    """A Generic Address Structure of an I/O port."""
    return struct.pack("<BBBBQ", SYSTEM_IO, bits, 0, access_size, port)


def _facp() -> bytes:
    """Hardware-reduced: no PM1, GPE or SCI; sleep and reset share one port. Offsets are those of the whole table."""
    body = bytearray(276 - HEADER_SIZE)
    shutdown = _register(8, 1, lo.ACPI_SHUTDOWN_PORT)
    for offset, value in (
        (112, struct.pack("<I", FADT_TMR_VAL_EXT | FADT_RESET_REG_SUP | FADT_HW_REDUCED)),
        (116, shutdown),  # RESET_REG
        (128, b"\x01"),  # RESET_VALUE
        (131, b"\x03"),  # minor version
        (140, struct.pack("<Q", DSDT_START)),  # X_DSDT
        (208, _register(32, 3, lo.ACPI_PM_TIMER_PORT)),  # X_PM_TMR_BLK
        (244, shutdown),  # SLEEP_CONTROL_REG
        (256, shutdown),  # SLEEP_STATUS_REG
        (268, b"CLOUDHYP"),  # hypervisor vendor identity
    ):
        body[offset - HEADER_SIZE : offset - HEADER_SIZE + len(value)] = value
    return table(b"FACP", 6, b"CHFACP  ", bytes(body))


def _mcfg(layout: Layout) -> bytes:
    windows = (struct.pack("<QHBBI", segment.mmconfig.start, segment.id, 0, 0, 0) for segment in layout.segments)
    return table(b"MCFG", 1, b"CHMCFG  ", bytes(8) + b"".join(windows))


def _rsdp(xsdt: int) -> bytes:
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, RSDP_SIZE, xsdt, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def acpi_tables(layout: Layout, description: Description) -> bytes:
    """The RSDP and all tables, as they lie in memory from 0xA0000 on."""
    dsdt = table(b"DSDT", 6, b"CHDSDT  ", dsdt_terms(layout, description))
    rest = (_facp(), table(b"APIC", 5, b"CHMADT  ", madt_body(description)), _mcfg(layout))
    address = DSDT_START + len(dsdt)
    pointers = []
    for part in rest:
        pointers.append(address)
        address += len(part)
    xsdt = table(b"XSDT", 1, b"CHXSDT  ", struct.pack(f"<{len(pointers)}Q", *pointers))
    return b"".join((_rsdp(address), dsdt, *rest, xsdt))


def write_tables(memory: GuestMemory, layout: Layout, description: Description) -> int:
    """Write ACPI, SMBIOS and MP tables and the EBDA pointer; returns the RSDP's address. Raises ConfigError.

    A VM that arrives by migration has them in its RAM already.
    """
    acpi = acpi_tables(layout, description)
    smbios = smbios_tables(description.smbios)
    mp_address = (lo.SMBIOS_START + len(smbios) + 16) & ~0xF
    if lo.RSDP_START + len(acpi) > lo.SMBIOS_START:
        raise ConfigError(f"--cpus max={description.max_vcpus}: the ACPI tables do not fit below {lo.SMBIOS_START:#x}")
    if mp_address > lo.KERNEL_START:
        raise ConfigError("--platform: the SMBIOS strings do not fit below 1 MiB", "shorten oem_strings")
    memory.write(lo.EBDA_POINTER, struct.pack("<H", lo.EBDA_START >> 4))
    memory.write(lo.RSDP_START, acpi)
    memory.write(lo.SMBIOS_START, smbios)
    mp = mp_table(mp_address, description)
    if mp_address + len(mp) < lo.KERNEL_START:
        memory.write(mp_address, mp)
    return lo.RSDP_START
