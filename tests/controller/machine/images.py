"""Kernel images made by hand: just enough of each format to boot, all fields where the format has them."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Iterable

import lz4.block

PT_LOAD, PT_NOTE = 1, 4
ENTRY = 0x20_0010
CODE = bytes(range(256)) * 8


def note(entry: int = ENTRY, *, width: int = 4, name: bytes = b"Xen\x00", kind: int = 18) -> bytes:
    return struct.pack("<III", len(name), width, kind) + name + entry.to_bytes(width, "little")


def elf(
    loads: Iterable[tuple[int, bytes, int]] = ((0x20_0000, CODE, len(CODE)),),
    notes: bytes | None = None,
    sections: dict[str, bytes] | None = None,
    *,
    bits: int = 64,
    machine: int | None = None,
) -> bytes:
    """An ELF executable: PT_LOADs as (address, content, size in memory), one PT_NOTE unless it is empty."""
    notes = note() if notes is None else notes
    head_size, program_size, section_size = (64, 56, 64) if bits == 64 else (52, 32, 40)
    parts = [(PT_LOAD, address, content, size) for address, content, size in loads]
    if notes:
        parts.append((PT_NOTE, 0, notes, len(notes)))
    position = head_size + program_size * len(parts)
    table, body = b"", b""
    for kind, address, content, size in parts:
        values = (position + len(body), address, address, len(content), size)
        if bits == 64:
            table += struct.pack("<IIQQQQQQ", kind, 7, *values, 4)
        else:
            table += struct.pack("<IIIIIIII", kind, *values, 7, 4)
        body += content
    names, headers, section_table = b"\x00", [], b""
    if sections:
        for name, content in {**sections, ".shstrtab": b""}.items():
            start = len(names)
            names += name.encode() + b"\x00"
            headers.append((start, content))
        entries = [(0, 0, 0)]
        for start, content in headers[:-1]:
            entries.append((start, position + len(body), len(content)))
            body += content
        entries.append((headers[-1][0], position + len(body), len(names)))
        body += names
        for start, offset, size in entries:
            fields = (start, 1, 0, 0, offset, size, 0, 0, 0, 0)
            section_table += struct.pack("<IIQQQQIIQQ" if bits == 64 else "<10I", *fields)
    section_count = len(section_table) // section_size
    head = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)) + bytes(9)
    head += struct.pack(
        "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH",
        2, machine or (62 if bits == 64 else 3), 1, ENTRY, head_size, position + len(body) if section_count else 0,
        0, head_size, program_size, len(parts), section_size if section_count else 0, section_count,
        section_count - 1 if section_count else 0,
    )  # fmt: skip
    return head + table + body + section_table


def pack_lz4(plain: bytes, block: int = 8 << 20) -> bytes:
    packed = b"\x02\x21\x4c\x18"
    for start in range(0, len(plain), block):
        piece = lz4.block.compress(plain[start : start + block], store_size=False)
        packed += len(piece).to_bytes(4, "little") + piece
    return packed + len(plain).to_bytes(4, "little")


def pack_gzip(plain: bytes) -> bytes:
    return gzip.compress(plain) + len(plain).to_bytes(4, "little")


def pack_xz(plain: bytes) -> bytes:
    return lzma.compress(plain, check=lzma.CHECK_CRC32) + len(plain).to_bytes(4, "little")


def bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    loadflags: int = 1,
    code32_start: int = 0x10_0000,
    preferred: int = 0x100_0000,
    init_size: int = 0x10_0000,
    stub: bytes = b"\xeb\xfe" * 50,
) -> bytes:
    """A bzImage of one setup sector whose protected-mode part is `stub`, then `payload`."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x200:0x202] = bytes((0xEB, 0x6A))
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = loadflags
    struct.pack_into("<I", setup, 0x214, code32_start)
    struct.pack_into("<II", setup, 0x248, len(stub), len(payload))
    struct.pack_into("<QI", setup, 0x258, preferred, init_size)
    return bytes(setup) + stub + payload


def uki(sections: dict[str, bytes], *, machine: int = 0x8664, padding: int = 512) -> bytes:
    """A PE file with the given sections, padded to the file alignment as linkers do."""
    head = bytearray(0x80)
    head[:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, 0x80)
    coff = struct.pack("<4sHHIIIHH", b"PE\x00\x00", machine, len(sections), 0, 0, 0, 0, 0x22)
    offset = -(-(len(head) + len(coff) + 40 * len(sections)) // padding) * padding
    table, body = b"", b""
    for name, content in sections.items():
        padded = content + bytes(-len(content) % padding)
        table += struct.pack("<8sIIII16x", name.encode(), len(content), 0x1000, len(padded), offset + len(body))
        body += padded
    return (bytes(head) + coff + table).ljust(offset, b"\x00") + body
