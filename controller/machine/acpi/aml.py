"""ACPI Machine Language: every function returns the bytes of one term, so that a table reads like ASL.

Encoding: ACPI specification 6.5, chapter 20 (AML) and 6.4 (resource descriptors). Only what the tables need. Where the
encoding leaves a choice, it is the one of Cloud Hypervisor's tables: the shortest integer, the shortest PkgLength.
"""

from __future__ import annotations

import struct
from enum import IntEnum

ZERO, ONE = b"\x00", b"\x01"

BYTE_ACCESS, DWORD_ACCESS = 1, 3
PRESERVE, WRITE_AS_ZEROS = 0, 2
SYSTEM_MEMORY = 0
WAIT_FOREVER = 0xFFFF


class ResourceType(IntEnum):
    MEMORY = 0
    IO = 1
    BUS_NUMBER = 2


# Type-specific flags of address space descriptors: memory is read-write, bit 1 cacheable; I/O covers the entire range.
NOT_CACHEABLE, CACHEABLE = 0x01, 0x03
ENTIRE_RANGE = 0x03


def pkg_length(size: int, *, inclusive: bool = True) -> bytes:
    """PkgLength for `size` bytes that follow; a field's length counts bits and does not include itself."""
    extra = 0 if size < 63 else 1 if size < 4094 else 2 if size < (1 << 20) - 3 else 3
    value = size + (extra + 1 if inclusive else 0)
    if extra == 0:
        return bytes((value,))
    return bytes((extra << 6 | value & 0xF,)) + (value >> 4).to_bytes(extra, "little")


def _package(opcode: bytes, body: bytes) -> bytes:
    return opcode + pkg_length(len(body)) + body


def path(name: str) -> bytes:
    """A NameString such as `\\_SB_.PHPR.PSEG`; every segment has four characters."""
    root, segments = (b"\\", name[1:]) if name[0] == "\\" else (b"", name)
    parts = segments.split(".")
    encoded = "".join(parts).encode("ascii")
    if len(encoded) != 4 * len(parts):
        raise ValueError(f"AML name {name!r}: segments have four characters")
    prefix = b"" if len(parts) == 1 else b"\x2e" if len(parts) == 2 else bytes((0x2F, len(parts)))
    return root + prefix + encoded


def integer(value: int) -> bytes:
    if value < 2:
        return ONE if value else ZERO
    if value < 1 << 8:
        return b"\x0a" + value.to_bytes(1, "little")
    if value < 1 << 16:
        return b"\x0b" + value.to_bytes(2, "little")
    if value < 1 << 32:
        return b"\x0c" + value.to_bytes(4, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(value: str) -> bytes:
    return b"\x0d" + value.encode("ascii") + b"\x00"


def eisa_id(value: str) -> bytes:
    """A compressed EISA id such as PNP0A08: three letters of five bits, four hexadecimal digits, big-endian."""
    a, b, c = (ord(letter) - 0x40 for letter in value[:3])
    number = a << 26 | b << 21 | c << 16 | int(value[3:], 16)
    return integer(int.from_bytes(number.to_bytes(4, "big"), "little"))


def arg(index: int) -> bytes:
    return bytes((0x68 + index,))


def local(index: int) -> bytes:
    return bytes((0x60 + index,))


def name(target: str, value: bytes) -> bytes:
    return b"\x08" + path(target) + value


def buffer(data: bytes) -> bytes:
    return _package(b"\x11", integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    return _package(b"\x12", bytes((len(elements),)) + b"".join(elements))


def device(target: str, *terms: bytes) -> bytes:
    return _package(b"\x5b\x82", path(target) + b"".join(terms))


def method(target: str, args: int, *terms: bytes, serialized: bool = True) -> bytes:
    return _package(b"\x14", path(target) + bytes((args | serialized << 3,)) + b"".join(terms))


def call(target: str, *arguments: bytes) -> bytes:
    return path(target) + b"".join(arguments)


def return_(value: bytes) -> bytes:
    return b"\xa4" + value


def if_(predicate: bytes, *terms: bytes) -> bytes:
    return _package(b"\xa0", predicate + b"".join(terms))


def while_(predicate: bytes, *terms: bytes) -> bytes:
    return _package(b"\xa2", predicate + b"".join(terms))


def equal(left: bytes, right: bytes) -> bytes:
    return b"\x93" + left + right


def less(left: bytes, right: bytes) -> bytes:
    return b"\x95" + left + right


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def add(left: bytes, right: bytes, target: bytes) -> bytes:
    return b"\x72" + left + right + target


def subtract(left: bytes, right: bytes, target: bytes) -> bytes:
    return b"\x74" + left + right + target


def shift_left(value: bytes, count: bytes, target: bytes) -> bytes:
    return b"\x79" + value + count + target


def and_(left: bytes, right: bytes, target: bytes) -> bytes:
    return b"\x7b" + left + right + target


def notify(target: str, value: bytes) -> bytes:
    return b"\x86" + path(target) + value


def create_dword_field(source: str, offset: int, target: str) -> bytes:
    return b"\x8a" + path(source) + integer(offset) + path(target)


def create_qword_field(source: str, offset: int, target: str) -> bytes:
    return b"\x8f" + path(source) + integer(offset) + path(target)


def mutex(target: str) -> bytes:
    return b"\x5b\x01" + path(target) + b"\x00"


def acquire(target: str) -> bytes:
    return b"\x5b\x23" + path(target) + WAIT_FOREVER.to_bytes(2, "little")


def release(target: str) -> bytes:
    return b"\x5b\x27" + path(target)


def op_region(target: str, address: int, size: int) -> bytes:
    """A region of system memory."""
    return b"\x5b\x80" + path(target) + bytes((SYSTEM_MEMORY,)) + integer(address) + integer(size)


def field(region: str, access: int, update: int, *entries: tuple[str, int]) -> bytes:
    """Fields of `region` as (name, bits), back to back; an empty name skips bits."""
    body = path(region) + bytes((access | update << 5,))
    for label, bits in entries:
        body += (label.encode("ascii") or b"\x00") + pkg_length(bits, inclusive=False)
    return _package(b"\x5b\x81", body)


def resource_template(*descriptors: bytes) -> bytes:
    """A buffer of resource descriptors with its end tag; checksum 0 means "not checked"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def memory32_fixed(base: int, size: int) -> bytes:
    """A read-write 32-bit memory range."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def io_port(base: int, alignment: int, size: int) -> bytes:
    """A fixed range of I/O ports, 16-bit decode."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, alignment, size)


def interrupt(gsi: int) -> bytes:
    """An edge-triggered, active-high, exclusive interrupt that the device consumes."""
    return struct.pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)


def _address_space(tag: int, fields: str, kind: ResourceType, flags: int, first: int, last: int) -> bytes:
    """Granularity and translation 0, both ends fixed."""
    size = last - first + 1
    body = struct.pack("<BBB5" + fields, kind, 0x0C, flags, 0, first, last, 0, size)
    return struct.pack("<BH", tag, len(body)) + body


def word_bus_numbers(first: int, last: int) -> bytes:
    return _address_space(0x88, "H", ResourceType.BUS_NUMBER, 0, first, last)


def word_io(first: int, last: int) -> bytes:
    return _address_space(0x88, "H", ResourceType.IO, ENTIRE_RANGE, first, last)


def qword_memory(first: int, last: int, flags: int = NOT_CACHEABLE) -> bytes:
    return _address_space(0x8A, "Q", ResourceType.MEMORY, flags, first, last)
