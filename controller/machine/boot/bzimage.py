"""Linux bzImage: the setup header, the ELF kernel packed inside, and the 32-bit entry point.

The packed kernel is unpacked here and entered by PVH, which spares the guest its own decompression. Where that
can't be done (another compression, a kernel without CONFIG_PVH) the image is entered as a boot loader would: in
protected mode, with a zero page. Source: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import struct

from controller.machine import layout as lo
from controller.machine.boot import elf, unpack
from controller.machine.boot.payload import Payload
from controller.machine.boot.placement import room
from controller.machine.layout import Layout
from shared.errors import HostError
from shared.memory import GuestMemory
from shared.records import NamedTuple

SECTOR = 512
HEADER_START = 0x1F1
HEADER_MAX_END = 0x290
MAGIC_OFFSET = 0x202
MAGIC = b"HdrS"
LOADED_HIGH = 0x01
OLDEST_VERSION = 0x0202  # the first with a 32-bit pointer to the command line
PAYLOAD_VERSION = 0x0208
INIT_SIZE_VERSION = 0x020A
DEFAULT_SETUP_SECTORS = 4
MAX_PACKED_SIZE = 256 << 20
LOADER_OTHER = 0xFF
ZERO_PAGE_SIZE = 4096

# Offsets in the zero page (struct boot_params).
ACPI_RSDP_ADDR = 0x070
E820_ENTRIES = 0x1E8
TYPE_OF_LOADER = 0x210
RAMDISK_IMAGE = 0x218
CMD_LINE_PTR = 0x228
CMDLINE_SIZE = 0x238
E820_TABLE = 0x2D0


class SetupHeader(NamedTuple):
    """`raw` are the bytes from 0x1F1 on; `setup_size` is where protected-mode code begins in the file."""

    raw: bytes
    version: int
    setup_size: int
    code32_start: int
    payload_offset: int
    payload_length: int
    needed_end: int


def parse(payload: Payload) -> SetupHeader | None:
    """The setup header, or None if this is no bzImage. Raises HostError for one that can't be booted."""
    head = payload.head(HEADER_MAX_END)
    if head[MAGIC_OFFSET : MAGIC_OFFSET + 4] != MAGIC:
        return None
    version = int.from_bytes(head[0x206:0x208], "little")
    header_end = 0x202 + head[0x201]
    if len(head) < min(header_end, HEADER_MAX_END) or header_end < 0x22C:
        raise HostError(f"{payload.name}: a bzImage that ends within its setup header")
    if version < OLDEST_VERSION:
        raise HostError(f"{payload.name}: a Linux image of boot protocol {version:#06x}, older than 2.02")
    if not head[0x211] & LOADED_HIGH:
        raise HostError(f"{payload.name}: a zImage, which is loaded below 1 MiB; only bzImages are supported")
    head = head[:header_end].ljust(HEADER_MAX_END, b"\x00")
    (code32_start,) = struct.unpack_from("<I", head, 0x214)
    offset, length = struct.unpack_from("<II", head, 0x248) if version >= PAYLOAD_VERSION else (0, 0)
    preferred, init_size = struct.unpack_from("<QI", head, 0x258) if version >= INIT_SIZE_VERSION else (0, 0)
    setup_size = ((head[0x1F1] or DEFAULT_SETUP_SECTORS) + 1) * SECTOR
    if setup_size >= payload.size:
        raise HostError(f"{payload.name}: a bzImage that ends before its kernel", "the file is cut short")
    return SetupHeader(head[HEADER_START:], version, setup_size, code32_start, offset, length, preferred + init_size)


def load_unpacked(memory: GuestMemory, payload: Payload, header: SetupHeader) -> elf.Kernel | None:
    """Unpack the ELF kernel into guest RAM; None where only the guest can do that. Raises HostError."""
    if not header.payload_length:
        return None
    if header.payload_length > MAX_PACKED_SIZE:
        raise HostError(f"{payload.name}: a packed kernel of {header.payload_length} bytes: the file is damaged")
    packed = payload.read(header.setup_size + header.payload_offset, header.payload_length, "the packed kernel")
    try:
        return elf.load_stream(memory, unpack.chunks(memoryview(packed), payload.name), payload.name)
    except (unpack.Unsupported, elf.NoPvhNote):
        return None


def load_packed(memory: GuestMemory, payload: Payload, header: SetupHeader) -> elf.Kernel:
    """Load the image for its own decompressor. `entry` is where the guest starts. Raises HostError."""
    start = header.code32_start
    if start < lo.KERNEL_START:
        raise HostError(f"{payload.name}: a bzImage that wants to be loaded at {start:#x}, below 1 MiB")
    size = payload.size - header.setup_size
    target = room(memory, start, size, payload.name)
    end = max(start + size, header.needed_end)
    # The decompressor works in place there and would run over the end of RAM without a word.
    room(memory, start, end - start, payload.name)
    payload.read_into(header.setup_size, target, "the protected-mode kernel")
    return elf.Kernel(start, end)


def write_zero_page(memory: GuestMemory, layout: Layout, header: SetupHeader, initramfs: lo.Range | None) -> None:
    """struct boot_params for the 32-bit entry."""
    page = bytearray(ZERO_PAGE_SIZE)
    page[HEADER_START : HEADER_START + len(header.raw)] = header.raw
    page[TYPE_OF_LOADER] = page[TYPE_OF_LOADER] or LOADER_OTHER
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, lo.RSDP_START)
    struct.pack_into("<I", page, CMD_LINE_PTR, lo.CMDLINE_START)
    struct.pack_into("<I", page, CMDLINE_SIZE, lo.CMDLINE_MAX_SIZE)
    if initramfs is not None:
        struct.pack_into("<II", page, RAMDISK_IMAGE, initramfs.start, initramfs.size)
    page[E820_ENTRIES] = len(layout.e820)
    for index, entry in enumerate(layout.e820):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, entry.address, entry.size, entry.type)
    memory.write(lo.ZERO_PAGE_START, page)
