"""ACPI tables: addresses and sizes measured on Cloud Hypervisor v53.0 (its machine page, section 4); ACPICA judges."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.machine.acpi import aml
from controller.machine.acpi.description import Description, SmbiosStrings
from controller.machine.acpi.tables import acpi_tables, write_tables
from controller.machine.layout import Layout, compute
from controller.machine.topology import Topology
from shared.errors import ConfigError
from shared.memory import GuestMemory

GIB = 1 << 30
ONE_VCPU = (compute(GIB, 46), Description(1, 1))
FOUR_OF_SIX = (compute(GIB, 46), Description(4, 6))
MEMORY_HOTPLUG = (compute(GIB, 46, acpi_hotplug_size=2 * GIB), Description(2, 4))


def split(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Tables by signature: (guest address, bytes)."""
    found = {}
    position = 36
    while position < len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        found[data[position : position + 4].decode()] = (0xA0000 + position, data[position : position + size])
        position += size
    return found


@pytest.mark.parametrize(("machine", "dsdt", "addresses"), [
    (ONE_VCPU, 4655, {"FACP": 0xA1253, "APIC": 0xA1367, "MCFG": 0xA13B9, "XSDT": 0xA13F5}),
    (FOUR_OF_SIX, 5168, {"FACP": 0xA1454, "APIC": 0xA1568, "MCFG": 0xA160A, "XSDT": 0xA1646}),
    (MEMORY_HOTPLUG, 6156, {"FACP": 0xA1830, "APIC": 0xA1944, "MCFG": 0xA19C6, "XSDT": 0xA1A02}),
], ids=["1 vCPU", "4 of 6 vCPUs", "memory hotplug"])  # fmt: skip
def test_sizes_and_addresses_are_cloud_hypervisors(
    machine: tuple[Layout, Description], dsdt: int, addresses: dict[str, int]
) -> None:
    tables = split(acpi_tables(*machine))
    assert list(tables) == ["DSDT", "FACP", "APIC", "MCFG", "XSDT"]
    assert tables["DSDT"][0] == 0xA0024
    assert {name: address for name, (address, _) in tables.items() if name != "DSDT"} == addresses
    assert len(tables["DSDT"][1]) == dsdt
    assert (len(tables["FACP"][1]), len(tables["MCFG"][1]), len(tables["XSDT"][1])) == (276, 60, 60)


@pytest.mark.parametrize(("boot", "maximum", "size"), [(1, 1, 82), (4, 6, 162), (2, 4, 130)])
def test_the_madt_has_16_bytes_for_each_possible_vcpu(boot: int, maximum: int, size: int) -> None:
    assert len(split(acpi_tables(compute(GIB, 46), Description(boot, maximum)))["APIC"][1]) == size


def test_every_checksum_is_right_and_every_header_is_cloud_hypervisors() -> None:
    data = acpi_tables(*FOUR_OF_SIX)
    rsdp = data[:36]
    assert rsdp[:8] == b"RSD PTR " and rsdp[9:15] == b"CLOUDH" and rsdp[15] == 2
    assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
    assert struct.unpack_from("<IIQ", rsdp, 16) == (0, 36, split(data)["XSDT"][0])
    expected = {
        "DSDT": (6, b"CHDSDT  "), "FACP": (6, b"CHFACP  "), "APIC": (5, b"CHMADT  "),
        "MCFG": (1, b"CHMCFG  "), "XSDT": (1, b"CHXSDT  "),
    }  # fmt: skip
    for name, (_, table) in split(data).items():
        assert sum(table) & 0xFF == 0, name
        assert (table[8], table[16:24]) == expected[name]
        assert table[10:16] == b"CLOUDH"
        assert table[24:36] == b"\x01\x00\x00\x00RVAT\x00\x00\x00\x01"


def test_the_xsdt_lists_facp_apic_and_mcfg() -> None:
    tables = split(acpi_tables(*ONE_VCPU))
    pointers = struct.unpack_from("<3Q", tables["XSDT"][1], 36)
    assert pointers == (tables["FACP"][0], tables["APIC"][0], tables["MCFG"][0])


def test_the_facp_is_hardware_reduced_with_reset_and_sleep_at_one_port() -> None:
    facp = split(acpi_tables(*ONE_VCPU))["FACP"][1]
    shutdown = bytes.fromhex("010800010006000000000000")
    fields = {
        112: struct.pack("<I", 0x0010_0500), 116: shutdown, 128: b"\x01", 131: b"\x03",
        140: struct.pack("<Q", 0xA0024), 208: bytes.fromhex("012000030806000000000000"),
        244: shutdown, 256: shutdown, 268: b"CLOUDHYP",
    }  # fmt: skip
    expected = bytearray(276)
    expected[:36] = facp[:36]
    for offset, value in fields.items():
        expected[offset : offset + len(value)] = value
    assert facp == bytes(expected)


def test_the_madt_lists_x2apics_the_ioapic_and_one_override() -> None:
    topology = Topology(1, 3, 1, 2)  # three cores take two bits, so the second package starts at 4
    madt = split(acpi_tables(compute(GIB, 46), Description(4, 6, topology)))["APIC"][1]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 0)
    entries = [struct.unpack_from("<BBHIII", madt, 44 + 16 * vcpu) for vcpu in range(6)]
    assert [entry[3] for entry in entries] == [0, 1, 2, 4, 5, 6]
    assert [entry[4] for entry in entries] == [3, 3, 3, 3, 2, 2]
    assert [entry[5] for entry in entries] == list(range(6))
    assert madt[140:] == bytes.fromhex("010c00000000c0fe00000000020a000404000000 0000")


def test_the_mcfg_has_one_bus_for_each_segment() -> None:
    layout = compute(GIB, 46, mmio32_weights=(1, 1), mmio64_weights=(1, 1))
    mcfg = split(acpi_tables(layout, Description(1, 1)))["MCFG"][1]
    assert mcfg[36:44] == bytes(8)
    assert struct.unpack_from("<QHBBI", mcfg, 44) == (0xE800_0000, 0, 0, 0, 0)
    assert struct.unpack_from("<QHBBI", mcfg, 60) == (0xE810_0000, 1, 0, 0, 0)


def test_a_vm_without_serial_port_has_no_com1() -> None:
    layout = compute(GIB, 46)
    with_port, without = (acpi_tables(layout, Description(1, 1, serial=serial)) for serial in (True, False))
    assert b"COM1" in with_port and b"COM1" not in without
    start = with_port.index(b"\x5b\x82", with_port.index(b"MBRD"))
    end = with_port.index(b"\x08_S5_")
    assert b"COM1" in with_port[start:end]
    assert with_port[64:start] + with_port[end:5000] == without[64 : 5000 - (end - start)]


def disassembled(tmp_path: Path, machine: tuple[Layout, Description]) -> str:
    if shutil.which("iasl") is None:
        pytest.skip("iasl is missing: install acpica-tools to have ACPICA judge the DSDT")
    source = tmp_path / "dsdt.aml"
    source.write_bytes(split(acpi_tables(*machine))["DSDT"][1])
    done = subprocess.run(
        ["iasl", "-d", source.name], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0 and "error" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    return re.sub(r"\s+", " ", re.sub(r"//.*|/\*.*?\*/", "", (tmp_path / "dsdt.dsl").read_text()))


@pytest.mark.parametrize("machine", [ONE_VCPU, FOUR_OF_SIX, MEMORY_HOTPLUG], ids=["1", "4 of 6", "memory hotplug"])
def test_acpica_disassembles_the_dsdt_and_compiles_it(tmp_path: Path, machine: tuple[Layout, Description]) -> None:
    disassembled(tmp_path, machine)
    done = subprocess.run(
        ["iasl", "-p", "again", "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = (tmp_path / "again.aml").read_bytes()
    # The compiler adds its own creator; it may also pick other encodings, so the terms are compared by disassembling.
    assert again[:4] == b"DSDT" and again[10:24] == b"CLOUDHCHDSDT  "


def test_acpica_reads_what_the_machine_page_lists(tmp_path: Path) -> None:
    text = disassembled(tmp_path, FOUR_OF_SIX)
    for part in (
        'Name (_UID, "PCI Hotplug Controller")',
        "OperationRegion (PCST, SystemMemory, 0x00003FFFFFFEF000, 0x10)",
        "Field (PCST, DWordAcc, NoLock, WriteAsZeros) { PCIU, 32, PCID, 32, B0EJ, 32, PSEG, 32 }",
        "Method (PCEJ, 2, Serialized) { Acquire (BLCK, 0xFFFF) PSEG = Arg1 B0EJ = (One << Arg0) Release (BLCK) ",
        "Method (PSCN, 0, Serialized) { \\_SB.PC00.PCNT () }",
        'Arg0 == ToUUID ("e5c937d0-3553-4d7a-9117-ea4d19c3434d")',
        "Memory32Fixed (ReadWrite, 0xE8000000, 0x00100000, )",
        "0x00000000C0000000, 0x00000000E7FFFFFF",
        "0x0000000100000000, 0x00003FFFFFEEFFFF",
        "Local0 = (Arg0 & 0x80000000) If ((Local0 == 0x80000000)) { Notify (S031, Arg1) }",
        "DVNT (\\_SB.PHPR.PCIU, One) DVNT (\\_SB.PHPR.PCID, 0x03)",
        "Package (0x04) { 0x001FFFFF, Zero, Zero, 0x0C }",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }",
        "IO (Decode16, 0x03F8, 0x03F8, 0x00, 0x08, )",
        "Name (_S5, Package (0x04) { 0x05, 0x05, Zero, Zero })",
        "OperationRegion (GDST, SystemMemory, 0x00003FFFFFFED000, One)",
        "Local0 = GDAT Local1 = (Local0 & One) If ((Local1 == One)) { \\_SB.CPUS.CSCN () }",
        "Local1 = (Local0 & 0x08) If ((Local1 == 0x08)) { Notify (\\_SB.PWRB, 0x80)",
        "OperationRegion (PRST, SystemMemory, 0x00003FFFFFFEE000, 0x0C)",
        "Offset (0x04), CPEN, 1, CINS, 1, CRMV, 1, CEJ0, 1, Offset (0x05), CCMD, 8 }",
        "While ((Local0 < 0x06))",
        "Device (C005)",
        "Method (MSCN, 0, Serialized) { }",
    ):  # fmt: skip
        assert part in text, part


def test_tables_and_ebda_pointer_are_where_a_guest_looks(memory: GuestMemory, layout: Layout) -> None:
    description = Description(2, 2)
    assert write_tables(memory, layout, description) == 0xA0000
    acpi = acpi_tables(layout, description)
    assert memory.u16(0x40E) == 0xA000
    assert memory.read(0xA0000, len(acpi)) == acpi
    assert memory.read(0xF0000, 5) == b"_SM3_"
    assert memory.read(0xF0090, 4) == b"_MP_"


def test_strings_that_do_not_fit_below_1_mib_are_refused(memory: GuestMemory, layout: Layout) -> None:
    strings = SmbiosStrings(oem_strings=("x" * 40000, "y" * 40000))
    with pytest.raises(ConfigError, match="--platform"):
        write_tables(memory, layout, Description(1, 1, smbios=strings))


@given(st.integers(0, (1 << 26) - 1))
def test_pkg_length_counts_itself_and_uses_the_fewest_bytes(size: int) -> None:
    encoded = aml.pkg_length(size)
    lead, rest = encoded[0], encoded[1:]
    assert lead >> 6 == len(rest)
    value = lead & 0x3F if not rest else lead & 0xF | int.from_bytes(rest, "little") << 4
    assert value == size + len(encoded)
    shorter = len(encoded) - 1
    assert shorter == 0 or size + shorter >= (1 << 6 if shorter == 1 else 1 << (4 + 8 * (shorter - 1)))


@given(st.integers(0, (1 << 64) - 1))
def test_integers_take_the_shortest_form(value: int) -> None:
    encoded = aml.integer(value)
    widths = {0x00: 0, 0x01: 0, 0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}
    width = widths[encoded[0]]
    assert len(encoded) == 1 + width
    assert (int.from_bytes(encoded[1:], "little") if width else encoded[0]) == value
    assert value < 2 or width == 1 or value >= 1 << 8 * (width // 2)


def test_names_have_four_characters() -> None:
    assert aml.path("\\_SB_.PHPR.PSEG") == b"\\\x2f\x03_SB_PHPRPSEG"
    assert aml.path("_SB_.PC00") == b"\x2e_SB_PC00"
    with pytest.raises(ValueError, match="four characters"):
        aml.path("_SB")


def test_eisa_ids_are_compressed_big_endian() -> None:
    assert aml.eisa_id("PNP0A08") == bytes.fromhex("0c41d00a08")
