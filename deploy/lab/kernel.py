"""Kernel files: the ELF inside a bzImage, an ELF that carries its initramfs, a unified kernel image.

Sources: Documentation/arch/x86/boot.rst (setup header), the ELF specification, the lz4 legacy frame
(lz4_Frame_format.md), and the UAPI group's UKI specification.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

LZ4_LEGACY_MAGIC = 0x184C2102
LZ4_LEGACY_BLOCK = 8 << 20
ELF_MAGIC = b"\x7fELF"

# Elf64_Ehdr and Elf64_Shdr, little-endian.
EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
SHDR = struct.Struct("<IIQQQQIIQQ")
SHT_PROGBITS = 1


class KernelError(Exception):
    """A kernel file is not what it should be; the message names it."""


def unpack_bzimage(image: Path) -> bytes:
    """The ELF kernel (PVH note included) in a bzImage with an lz4 payload, as Debian's kernels are."""
    import lz4.block

    data = image.read_bytes()
    if data[0x202:0x206] != b"HdrS":
        raise KernelError(f"{image}: no bzImage (no setup header)")
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = ((data[0x1F1] or 4) + 1) * 512 + offset
    # The kernel's build appends the unpacked size to the payload; it is no part of the stream.
    payload = data[start : start + length - 4]
    if struct.unpack_from("<I", payload)[0] != LZ4_LEGACY_MAGIC:
        raise KernelError(f"{image}: its payload is not lz4 but begins with {payload[:4].hex()}")
    out, position = bytearray(), 4
    while position < len(payload):
        (size,) = struct.unpack_from("<I", payload, position)
        out += lz4.block.decompress(payload[position + 4 : position + 4 + size], LZ4_LEGACY_BLOCK)
        position += 4 + size
    if out[:4] != ELF_MAGIC:
        raise KernelError(f"{image}: what it unpacks to is no ELF")
    return bytes(out)


def with_section(elf: bytes, name: str, content: bytes) -> bytes:
    """An ELF with one more section that no program header covers: no loader puts it into memory by itself.

    Everything that was there keeps its place; a new section name table and a new section header table are
    appended behind the content (objcopy would lay the whole file out anew).
    """
    header = list(EHDR.unpack_from(elf))
    table, entry_size, count, names_index = header[6], header[11], header[12], header[13]
    if entry_size != SHDR.size or not count:
        raise KernelError("the ELF has no section headers to add to")
    sections = [list(SHDR.unpack_from(elf, table + n * SHDR.size)) for n in range(count)]
    names = sections[names_index]
    names_data = elf[names[4] : names[4] + names[5]]
    out = bytearray(elf)

    def append(data: bytes) -> int:
        out.extend(bytes(-len(out) % 16))
        at = len(out)
        out.extend(data)
        return at

    new = [len(names_data), SHT_PROGBITS, 0, 0, append(content), len(content), 0, 0, 16, 0]
    names_data += name.encode() + b"\0"
    names[4], names[5] = append(names_data), len(names_data)
    sections.append(new)
    header[6] = append(b"".join(SHDR.pack(*section) for section in sections))
    header[12] = count + 1
    EHDR.pack_into(out, 0, *header)
    return bytes(out)


def unified(stub: Path, linux: Path, initrd: Path, cmdline: Path, target: Path) -> None:
    """A UKI: systemd's EFI stub with .linux, .initrd and .cmdline sections behind its own, at rising addresses."""
    command = ["objcopy"]
    end = _pe_end(stub.read_bytes())
    for name, content in ((".cmdline", cmdline), (".linux", linux), (".initrd", initrd)):
        command += [f"--add-section={name}={content}", f"--change-section-vma={name}={end:#x}"]
        end += -(-content.stat().st_size // 4096) * 4096
    done = subprocess.run([*command, stub, target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"objcopy cannot make {target.name}: {done.stderr.strip()}")


def _pe_end(stub: bytes) -> int:
    """Image base plus the first page behind the last section of a PE file."""
    pe = struct.unpack_from("<I", stub, 0x3C)[0]
    if stub[pe : pe + 4] != b"PE\0\0":
        raise KernelError("the EFI stub is no PE file")
    count, optional_size = struct.unpack_from("<H", stub, pe + 6)[0], struct.unpack_from("<H", stub, pe + 20)[0]
    base = struct.unpack_from("<Q", stub, pe + 24 + 24)[0]
    end = 0
    for n in range(count):
        size, address = struct.unpack_from("<II", stub, pe + 24 + optional_size + n * 40 + 8)
        end = max(end, address + size)
    return int(base) + -(-end // 4096) * 4096
