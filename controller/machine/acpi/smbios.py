"""SMBIOS 3.2 tables (DMTF DSP0134), entry point first, as they lie from 0xF0000 on."""

from __future__ import annotations

import struct

from controller.machine.acpi.description import SmbiosStrings
from controller.machine.layout import SMBIOS_START
from shared.errors import ConfigError

ENTRY_POINT_SIZE = 24
PCI_SUPPORTED = 1 << 7
VIRTUAL_MACHINE = 1 << 4
WAKE_UP_UNKNOWN = 2
STATE_UNKNOWN = 2
SECURITY_NONE = 3
MAX_STRINGS = 255


class _Strings:
    """The string set behind a structure: strings are numbered from 1, 0 stands for none."""

    def __init__(self) -> None:
        self._strings: list[bytes] = []

    def add(self, value: str | None) -> int:
        if value is None:
            return 0
        if len(self._strings) == MAX_STRINGS:
            raise ConfigError(f"--platform: more than {MAX_STRINGS} SMBIOS strings in one structure")
        encoded = value.encode()
        if b"\x00" in encoded:
            raise ConfigError(f"--platform: NUL in the SMBIOS string {value!r}")
        self._strings.append(encoded)
        return len(self._strings)

    def encode(self) -> bytes:
        return b"".join(string + b"\x00" for string in self._strings) + (b"\x00" if self._strings else b"\x00\x00")


def _uuid(text: str | None) -> bytes:
    """16 bytes, the first three fields little-endian."""
    if text is None:
        return bytes(16)
    digits = text.removeprefix("urn:uuid:").strip("{}").replace("-", "")
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        raw = b""
    if len(raw) != 16 or len(digits) != 32:
        raise ConfigError(f"--platform uuid={text}: not a UUID")
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]


def _bios(handle: int) -> bytes:
    strings = _Strings()
    vendor, version = strings.add("cloud-hypervisor"), strings.add("0")
    body = struct.pack(
        "<BBHBBHBBQBB", 0, 20, handle, vendor, version, 0, 0, 0, PCI_SUPPORTED, 0, VIRTUAL_MACHINE
    )
    return body + strings.encode()


def _system(handle: int, names: SmbiosStrings) -> bytes:
    strings = _Strings()
    manufacturer = strings.add(names.manufacturer if names.manufacturer is not None else "Cloud Hypervisor")
    product = strings.add(names.product_name if names.product_name is not None else "cloud-hypervisor")
    version, serial, sku, family = (
        strings.add(value) for value in (names.version, names.serial_number, names.sku_number, names.family)
    )
    body = struct.pack(
        "<BBHBBBB16sBBB",
        1, 27, handle, manufacturer, product, version, serial, _uuid(names.uuid), WAKE_UP_UNKNOWN, sku, family,
    )  # fmt: skip
    return body + strings.encode()


def _chassis(handle: int, asset_tag: str) -> bytes:
    strings = _Strings()
    tag = strings.add(asset_tag)
    body = struct.pack(
        "<BBHBBBBBBBBBIBBBB",
        3, 21, handle, 0, STATE_UNKNOWN, 0, 0, tag,
        STATE_UNKNOWN, STATE_UNKNOWN, STATE_UNKNOWN, SECURITY_NONE, 0, 0, 0, 0, 0,
    )  # fmt: skip
    return body + strings.encode()


def _oem(handle: int, values: tuple[str, ...]) -> bytes:
    strings = _Strings()
    for value in values:
        strings.add(value)
    return struct.pack("<BBHB", 11, 5, handle, len(values)) + strings.encode()


def smbios_tables(names: SmbiosStrings) -> bytes:
    """Raises ConfigError for a malformed UUID or string."""
    structures = [_bios(1), _system(2, names)]
    if names.chassis_asset_tag is not None:
        structures.append(_chassis(len(structures) + 1, names.chassis_asset_tag))
    if names.oem_strings:
        structures.append(_oem(len(structures) + 1, names.oem_strings))
    structures.append(struct.pack("<BBH2x", 127, 4, len(structures) + 1))
    body = b"".join(structures)
    entry = bytearray(
        struct.pack(
            "<5sBBBBBBBIQ",
            b"_SM3_", 0, ENTRY_POINT_SIZE, 3, 2, 0, 1, 0, len(body), SMBIOS_START + ENTRY_POINT_SIZE,
        )
    )  # fmt: skip
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry) + body
