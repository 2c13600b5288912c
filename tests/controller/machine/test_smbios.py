"""SMBIOS and MP table: bytes by Cloud Hypervisor's machine page, sections 4.8 and 4.9."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.machine.acpi.description import Description, SmbiosStrings
from controller.machine.acpi.mptable import mp_table
from controller.machine.acpi.smbios import smbios_tables
from controller.machine.topology import Topology
from shared.errors import ConfigError

UUID = "00112233-4455-6677-8899-aabbccddeeff"


def structures(data: bytes) -> list[tuple[int, bytes, list[bytes]]]:
    """(type, formatted area, strings) of each structure behind the entry point."""
    found, position = [], 24
    while position < len(data):
        kind, size = data[position], data[position + 1]
        end = data.index(b"\x00\x00", position + size)
        strings = data[position + size : end].split(b"\x00") if end > position + size else []
        found.append((kind, data[position : position + size], strings))
        position = end + 2
    assert position == len(data)
    return found


def test_the_default_tables_byte_for_byte() -> None:
    data = smbios_tables(SmbiosStrings())
    assert len(data) == 24 + 0x6C
    assert sum(data[:24]) & 0xFF == 0
    assert data[:5] == b"_SM3_"
    assert data[6:24] == struct.pack("<BBBBBBIQ", 24, 3, 2, 0, 1, 0, 0x6C, 0xF0018)
    bios, system, end = structures(data)
    assert bios == (0, bytes.fromhex("00140100 0102 0000 00 00 8000000000000000 00 10"), [b"cloud-hypervisor", b"0"])
    assert system == (
        1,
        bytes.fromhex("011b0200 01020000") + bytes(16) + bytes.fromhex("02 00 00"),
        [b"Cloud Hypervisor", b"cloud-hypervisor"],
    )
    assert end == (127, bytes.fromhex("7f040300"), [])


def test_strings_are_numbered_in_order_and_left_out_when_absent() -> None:
    data = smbios_tables(SmbiosStrings(version="v", sku_number="sku", family="fam", uuid=UUID, chassis_asset_tag="tag"))
    _, system, chassis, _ = structures(data)
    assert system[2] == [b"Cloud Hypervisor", b"cloud-hypervisor", b"v", b"sku", b"fam"]
    assert system[1][4:8] == bytes((1, 2, 3, 0))
    assert system[1][8:24] == bytes.fromhex("33221100 5544 7766 8899aabbccddeeff")
    assert system[1][24:] == bytes((2, 4, 5))
    assert (chassis[0], len(chassis[1]), chassis[2]) == (3, 21, [b"tag"])
    assert chassis[1][4:13] == bytes((0, 2, 0, 0, 1, 2, 2, 2, 3))


def test_oem_strings_are_type_11() -> None:
    _, _, oem, end = structures(smbios_tables(SmbiosStrings(oem_strings=("one", "two"))))
    assert oem == (11, bytes.fromhex("0b05030002"), [b"one", b"two"])
    assert end[1] == bytes.fromhex("7f040400")


@given(st.text(st.characters(codec="ascii", exclude_characters="\x00"), min_size=1))
def test_any_serial_number_comes_back(text: str) -> None:
    _, system, _ = structures(smbios_tables(SmbiosStrings(serial_number=text)))
    assert system[2][2] == text.encode()


@pytest.mark.parametrize("uuid", ["", "x", UUID[:-1], UUID + "0", UUID.replace("a", "g"), UUID.replace("0", " ", 1)])
def test_a_malformed_uuid_is_refused(uuid: str) -> None:
    with pytest.raises(ConfigError, match="not a UUID"):
        smbios_tables(SmbiosStrings(uuid=uuid))


def test_nul_and_too_many_strings_are_refused() -> None:
    with pytest.raises(ConfigError, match="NUL"):
        smbios_tables(SmbiosStrings(family="a\x00b"))
    with pytest.raises(ConfigError, match="255"):
        smbios_tables(SmbiosStrings(oem_strings=tuple("abc" for _ in range(256))))


def test_the_mp_table_byte_for_byte() -> None:
    data = mp_table(0xF0090, Description(2, 4))
    assert data[:16] == struct.pack("<4sIBBB5x", b"_MP_", 0xF00A0, 1, 4, data[10])
    assert sum(data[:16]) & 0xFF == sum(data[16:]) & 0xFF == 0
    header = data[16:60]
    assert header[:4] == b"PCMP" and header[6] == 4
    assert int.from_bytes(header[4:6], "little") == len(data) - 16 == 44 + 2 * 20 + 8 + 8 + 16 * 8 + 2 * 8
    assert header[8:28] == b"FC      000000000000"
    assert header[28:] == struct.pack("<IHHII", 0, 0, 0, 0xFEE0_0000, 0)
    body = data[60:]
    assert body[:20] == bytes.fromhex("00 00 14 03 00060000 01020000") + bytes(8)
    assert body[20:40] == bytes.fromhex("00 01 14 01 00060000 01020000") + bytes(8)
    assert body[40:48] == b"\x01\x00ISA   "
    assert body[48:56] == bytes.fromhex("02 ff 14 01 0000c0fe")
    for pin in range(16):
        assert body[56 + 8 * pin : 64 + 8 * pin] == bytes((3, 0, 0, 0, 0, pin, 0xFF, pin))
    assert body[184:] == bytes.fromhex("04030000000000000401000000 00ff01")


def test_ids_above_253_have_no_mp_table() -> None:
    assert mp_table(0xF0090, Description(254, 254))
    assert mp_table(0xF0090, Description(255, 255)) == b""
    # Four packages of 33 cores: 64 ids each, so vCPU 131 has id 3 * 64 + 32.
    assert mp_table(0xF0090, Description(132, 132, Topology(1, 33, 1, 4)))
