"""Unified kernel images: a PE file whose sections carry kernel, initramfs and command line.

Sections by the UAPI group's specification: `.linux`, `.initrd`, `.cmdline`. Headers: Microsoft's PE format. The
EFI stub in the file is not run.
"""

from __future__ import annotations

import struct

from controller.machine.boot.payload import Payload
from shared.errors import HostError

DOS_MAGIC = b"MZ"
PE_MAGIC = b"PE\x00\x00"
MACHINE_AMD64 = 0x8664
MAX_SECTIONS = 96  # the limit of Windows' loader, and of systemd's
MAX_CMDLINE = 0x1_0000


def sections(payload: Payload) -> dict[str, Payload]:
    """The sections of a PE file by name, the first of each name; empty if this is no PE file. Raises HostError."""
    head = payload.head(64)
    if head[:2] != DOS_MAGIC or len(head) < 64:
        return {}
    (pe_offset,) = struct.unpack_from("<I", head, 0x3C)
    if pe_offset + 24 > payload.size:
        return {}
    coff = payload.read(pe_offset, 24, "the PE header")
    magic, machine, count, optional_size = struct.unpack("<4sHH12xH2x", coff)
    if magic != PE_MAGIC or machine != MACHINE_AMD64:
        return {}
    if count > MAX_SECTIONS:
        raise HostError(f"{payload.name}: a PE file with {count} sections: the file is damaged")
    table = payload.read(pe_offset + 24 + optional_size, count * 40, "the PE section table")
    found: dict[str, Payload] = {}
    for index in range(count):
        raw_name, virtual_size, _, raw_size, offset = struct.unpack_from("<8sIIII", table, index * 40)
        name = raw_name.rstrip(b"\x00").decode("latin-1")
        # The size on disk is padded to the file alignment; the virtual size is the content's own.
        size = min(virtual_size, raw_size) or raw_size
        if name in (".linux", ".initrd", ".cmdline") and name not in found and size:
            found[name] = payload.part(offset, size, f"section {name}")
    return found


def cmdline(section: Payload | None) -> str:
    """The command line in a UKI. Raises HostError when it is no text."""
    if section is None:
        return ""
    if section.size > MAX_CMDLINE:
        raise HostError(f"{section.name}: a command line of {section.size} bytes")
    try:
        return section.read(0, section.size, "the command line").rstrip(b"\x00\n ").decode("ascii")
    except UnicodeDecodeError as error:
        raise HostError(f"{section.name}: the command line is not ASCII text") from error
