"""The PVH start info: what the guest finds at the address in RBX. Source: Xen's public/arch-x86/hvm/start_info.h."""

from __future__ import annotations

import struct

from controller.machine import layout as lo
from controller.machine.layout import Layout
from shared.memory import GuestMemory

START_MAGIC = 0x336E_C578
VERSION = 1


def write_start_info(memory: GuestMemory, layout: Layout, initramfs: lo.Range | None) -> None:
    """hvm_start_info, its memory map, and a module entry if there is an initramfs."""
    modules = 0 if initramfs is None else 1
    if initramfs is not None:
        memory.write(lo.PVH_MODLIST_START, struct.pack("<QQQQ", initramfs.start, initramfs.size, 0, 0))
    memory.write(
        lo.PVH_MEMMAP_START,
        b"".join(struct.pack("<QQII", entry.address, entry.size, entry.type, 0) for entry in layout.e820),
    )
    memory.write(
        lo.PVH_INFO_START,
        struct.pack(
            "<IIIIQQQQII",
            START_MAGIC, VERSION, 0, modules, lo.PVH_MODLIST_START if modules else 0,
            lo.CMDLINE_START, lo.RSDP_START, lo.PVH_MEMMAP_START, len(layout.e820), 0,
        ),
    )  # fmt: skip
