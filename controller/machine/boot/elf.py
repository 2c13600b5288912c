"""Kernels in ELF: header and notes, and their segments' way into guest RAM.

The ELF file may lie on disk (segments are read straight into RAM) or come out of a decompressor (chunks are dealt
out to the segments as they appear, so the whole is never in one buffer). Formats: System V ABI, "ELF"; Xen's
public/elfnote.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from controller.machine.boot.payload import Payload
from controller.machine.boot.placement import clear, room
from controller.machine.layout import KERNEL_START
from shared.errors import HostError
from shared.memory import PAGE_SIZE, GuestMemory
from shared.records import NamedTuple

MAGIC = b"\x7fELF"
CLASS_32, CLASS_64 = 1, 2
LITTLE_ENDIAN = 1
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
XEN_NAME = b"Xen\x00"

# Far more than any kernel has; what a damaged header may make us read and allocate.
MAX_PROGRAM_HEADERS = 128
MAX_SECTIONS = 4096
MAX_STRING_TABLE = 1 << 20
MAX_NOTES = 1 << 16
MAX_HEAD = 1 << 16

# GNU ld puts the ELF header into a page of its own below `-Ttext=0x100000`; further down lie our tables.
LOWEST_SEGMENT = KERNEL_START - PAGE_SIZE


class NoPvhNote(HostError):
    """A sound ELF file that can't be booted by the PVH protocol."""


class Segment(NamedTuple):
    type: int
    offset: int
    address: int
    file_size: int
    memory_size: int
    alignment: int


class Header(NamedTuple):
    """ELF header: where the tables of program headers and sections are."""

    is_64: bool
    program_offset: int
    program_count: int
    section_offset: int
    section_count: int
    names_index: int


class Kernel(NamedTuple):
    """A loaded kernel: its PVH entry point, and the first address above what it occupies in low RAM."""

    entry: int
    end: int


def parse_header(head: bytes, name: str) -> Header:
    """The ELF header at the start of `head`. Raises HostError, naming what does not fit."""
    if len(head) < 52 or (head[4] == CLASS_64 and len(head) < 64):
        raise HostError(f"{name}: an ELF file that ends within its header")
    kind, encoding = head[4], head[5]
    if kind not in (CLASS_32, CLASS_64) or encoding != LITTLE_ENDIAN:
        raise HostError(f"{name}: an ELF file that is not for x86 (class {kind}, data encoding {encoding})")
    layout = "<HHIQQQIHHHHHH" if kind == CLASS_64 else "<HHIIIIIHHHHHH"
    fields = struct.unpack_from(layout, head, 16)
    machine, program_offset, section_offset = fields[1], fields[4], fields[5]
    program_size, program_count, section_size, section_count, names_index = fields[8:13]
    if machine != (EM_X86_64 if kind == CLASS_64 else EM_386):
        raise HostError(f"{name}: an ELF file for another machine (e_machine {machine}, not x86)")
    if program_count == 0:
        raise HostError(f"{name}: an ELF file without program headers: an object file or library, not a kernel")
    if program_count > MAX_PROGRAM_HEADERS or program_size != (56 if kind == CLASS_64 else 32):
        raise HostError(f"{name}: {program_count} ELF program headers of {program_size} bytes: not a kernel")
    if section_count and section_size != (64 if kind == CLASS_64 else 40):
        raise HostError(f"{name}: ELF section headers of {section_size} bytes: the file is damaged")
    return Header(kind == CLASS_64, program_offset, program_count, section_offset, section_count, names_index)


def parse_segments(header: Header, table: bytes) -> tuple[Segment, ...]:
    """PT_LOAD and PT_NOTE entries of the program header table."""
    segments = []
    for index in range(header.program_count):
        if header.is_64:
            kind, _, offset, _, address, file_size, memory_size, alignment = struct.unpack_from(
                "<IIQQQQQQ", table, index * 56
            )
        else:
            kind, offset, _, address, file_size, memory_size, _, alignment = struct.unpack_from(
                "<IIIIIIII", table, index * 32
            )
        if kind in (PT_LOAD, PT_NOTE) and (file_size or memory_size):
            segments.append(Segment(kind, offset, address, file_size, memory_size, alignment))
    return tuple(segments)


def _table_size(header: Header) -> int:
    return header.program_count * (56 if header.is_64 else 32)


def pvh_entry(notes: bytes, alignment: int) -> int | None:
    """The 32-bit entry point named by Xen's note 18 in a PT_NOTE segment, if it is there."""
    padding = 8 if alignment == 8 else 4
    position = 0
    while position + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, position)
        name_start = position + 12
        start = -(-(name_start + name_size) // padding) * padding
        if start + size > len(notes):
            return None
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and notes[name_start : name_start + name_size] == XEN_NAME and size >= 4:
            return int.from_bytes(notes[start : start + min(size, 8)], "little")
        position = -(-(start + size) // padding) * padding
    return None


class _Image:
    """The destinations of a kernel's bytes: PT_LOADs in guest RAM, PT_NOTEs in buffers."""

    def __init__(self, memory: GuestMemory, segments: tuple[Segment, ...], name: str) -> None:
        self.name = name
        self.loads = [segment for segment in segments if segment.type == PT_LOAD]
        self.targets: list[tuple[int, memoryview]] = []
        self._notes: list[tuple[bytearray, int]] = []
        views = [_load_view(memory, segment, name) for segment in self.loads]
        for segment, view in zip(self.loads, views, strict=True):
            clear(memory, segment.address + segment.file_size, segment.memory_size - segment.file_size)
            self.targets.append((segment.offset, view[: segment.file_size]))
        for segment in segments:
            if segment.type == PT_NOTE and segment.file_size <= MAX_NOTES:
                notes = bytearray(segment.file_size)
                self._notes.append((notes, segment.alignment))
                self.targets.append((segment.offset, memoryview(notes)))

    def kernel(self) -> Kernel:
        entries = (pvh_entry(bytes(notes), alignment) for notes, alignment in self._notes)
        entry = next((found for found in entries if found is not None), None)
        if entry is None:
            raise NoPvhNote(
                f"{self.name}: an ELF file without the PVH note (Xen ELF note {XEN_ELFNOTE_PHYS32_ENTRY})",
                "a Linux kernel needs CONFIG_PVH=y",
            )
        if not any(load.address <= entry < load.address + load.memory_size for load in self.loads):
            raise HostError(f"{self.name}: the PVH entry point {entry:#x} lies outside every loaded segment")
        return Kernel(entry, max(load.address + load.memory_size for load in self.loads))


def _load_view(memory: GuestMemory, segment: Segment, name: str) -> memoryview:
    if segment.file_size > segment.memory_size:
        raise HostError(f"{name}: an ELF segment has more bytes in the file than in memory: the file is damaged")
    if segment.address < LOWEST_SEGMENT:
        raise HostError(
            f"{name}: an ELF segment at {segment.address:#x}, where the boot and firmware tables are",
            "a kernel's segments start at 1 MiB",
        )
    return room(memory, segment.address, segment.memory_size, name)


def load(memory: GuestMemory, payload: Payload) -> Kernel:
    """Read an ELF kernel into guest RAM. Raises HostError; NoPvhNote if only the note is missing."""
    header = parse_header(payload.head(64), payload.name)
    table = payload.read(header.program_offset, _table_size(header), "the ELF program header table")
    image = _Image(memory, parse_segments(header, table), payload.name)
    for offset, target in image.targets:
        payload.read_into(offset, target, "an ELF segment")
    return image.kernel()


def load_stream(memory: GuestMemory, chunks: Iterable[bytes], name: str) -> Kernel:
    """The same from consecutive pieces of the file."""
    stream = iter(chunks)
    head = b""
    for chunk in stream:
        head += chunk
        if len(head) >= MAX_HEAD:
            break
    if head[:4] != MAGIC:
        raise HostError(f"{name}: is not an ELF file")
    header = parse_header(head[:64], name)
    table = head[header.program_offset : header.program_offset + _table_size(header)]
    if header.program_offset + _table_size(header) > len(head):
        raise HostError(f"{name}: the ELF program header table is not at the start of the file")
    image = _Image(memory, parse_segments(header, table), name)
    size = _deal(head, 0, image.targets)
    for chunk in stream:
        size = _deal(chunk, size, image.targets)
    if any(offset + len(target) > size for offset, target in image.targets):
        raise HostError(f"{name}: an ELF file that ends after {size} bytes, within a segment")
    return image.kernel()


def _deal(chunk: bytes, position: int, targets: list[tuple[int, memoryview]]) -> int:
    """Copy the parts of `chunk`, which is at `position` of the file, to where they belong; the position after it."""
    data = memoryview(chunk)
    end = position + len(data)
    for offset, target in targets:
        first, last = max(position, offset), min(end, offset + len(target))
        if first < last:
            target[first - offset : last - offset] = data[first - position : last - position]
    return end


def section(payload: Payload, wanted: str) -> Payload | None:
    """A section of an ELF file by name, if there is one. Raises HostError if the section table is damaged."""
    header = parse_header(payload.head(64), payload.name)
    if not header.section_count:
        return None
    if header.section_count > MAX_SECTIONS or header.names_index >= header.section_count:
        raise HostError(f"{payload.name}: the ELF section table is damaged")
    entry_size, layout = (64, "<IIQQQQ") if header.is_64 else (40, "<IIIIII")
    table = payload.read(header.section_offset, header.section_count * entry_size, "the ELF section table")

    def place(index: int) -> tuple[int, int, int]:
        name, _, _, _, offset, size = struct.unpack_from(layout, table, index * entry_size)
        return name, offset, size

    _, names_offset, names_size = place(header.names_index)
    if names_size > MAX_STRING_TABLE:
        raise HostError(f"{payload.name}: the ELF section names take {names_size} bytes: the file is damaged")
    names = payload.read(names_offset, names_size, "the ELF section names")
    for index in range(header.section_count):
        name, offset, size = place(index)
        if names[name : name + len(wanted) + 1] == wanted.encode() + b"\x00" and size:
            return payload.part(offset, size, f"section {wanted}")
    return None
