"""`load`: find out what the kernel file is, bring it into guest RAM, and describe the state to start in."""

from __future__ import annotations

from enum import Enum

from controller.machine import layout as lo
from controller.machine.boot import bzimage, elf, pvh, uki
from controller.machine.boot.payload import OpenPayload, Payload
from controller.machine.boot.placement import room
from controller.machine.layout import Layout
from shared.errors import ConfigError, HostError
from shared.memory import PAGE_SIZE, GuestMemory
from shared.records import NamedTuple

# What people give for a kernel by mistake: (offset, signature, name).
_NO_KERNELS = (
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\xfd7zXZ\x00", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
    (0, b"\x02\x21\x4c\x18", "an lz4 file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"070701", "a cpio archive (an initramfs?)"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"!<arch>\n", "an ar archive (a Debian package?)"),
    (0, b"PK\x03\x04", "a zip file"),
    (0, b"#!", "a script"),
    (0x38, b"ARM\x64", "a kernel for arm64"),
    (0x38, b"RSC\x05", "a kernel for RISC-V"),
    (0, b"MZ", "an EFI program without a Linux kernel in it"),
    (510, b"\x55\xaa", "a disk image"),
)


class BootProtocol(Enum):
    PVH = "pvh"
    BZIMAGE32 = "bzimage32"


class BootEntry(NamedTuple):
    """Where a vCPU starts and what its general registers hold; all other registers are zero."""

    protocol: BootProtocol
    rip: int
    rbx: int = 0
    rsi: int = 0
    rsp: int = 0


class _Loaded(NamedTuple):
    """A kernel in guest RAM, and what its file carries besides. `setup` is set for the 32-bit entry."""

    kernel: elf.Kernel
    setup: bzimage.SetupHeader | None = None
    initramfs: Payload | None = None
    cmdline: str = ""


def load(memory: GuestMemory, layout: Layout, kernel: str, initramfs: str | None, cmdline: str) -> BootEntry:
    """Load `--kernel`, `--initramfs` (or the one the kernel carries) and `--cmdline` into guest RAM.

    Raises HostError for a file that can't be booted (it names flag and file) and ConfigError for the command line.
    """
    check_cmdline(cmdline, "--cmdline")
    with OpenPayload("--kernel", kernel) as payload:
        if initramfs is None:
            loaded, module = _load_files(memory, payload, None)
        else:
            with OpenPayload("--initramfs", initramfs) as given:
                loaded, module = _load_files(memory, payload, given)
    if not cmdline and loaded.cmdline:
        cmdline = loaded.cmdline
        check_cmdline(cmdline, f"--kernel {kernel}, section .cmdline")
    memory.write(lo.CMDLINE_START, cmdline.encode("ascii") + b"\x00")
    entry = loaded.kernel.entry
    if loaded.setup is None:
        pvh.write_start_info(memory, layout, module)
        return BootEntry(BootProtocol.PVH, rip=entry, rbx=lo.PVH_INFO_START)
    bzimage.write_zero_page(memory, layout, loaded.setup, module)
    return BootEntry(BootProtocol.BZIMAGE32, rip=entry, rsi=lo.ZERO_PAGE_START, rsp=lo.BOOT_STACK_POINTER)


def check_cmdline(cmdline: str, name: str) -> None:
    """Raises ConfigError when the guest could not be given this command line."""
    for position, character in enumerate(cmdline):
        if not " " <= character <= "~":
            raise ConfigError(f"{name}: character {character!r} at position {position} is not printable ASCII")
    if len(cmdline) >= lo.CMDLINE_MAX_SIZE:
        raise ConfigError(f"{name}: {len(cmdline)} characters, more than the {lo.CMDLINE_MAX_SIZE - 1} that fit")


def _load_files(memory: GuestMemory, payload: Payload, given: Payload | None) -> tuple[_Loaded, lo.Range | None]:
    """The kernel, and the initramfs that was given or that the kernel carries."""
    loaded = _load_kernel(memory, payload)
    source = given or loaded.initramfs
    return loaded, _load_initramfs(memory, source, loaded.kernel) if source is not None else None


def _load_kernel(memory: GuestMemory, payload: Payload) -> _Loaded:
    if payload.head(4) == elf.MAGIC:
        return _Loaded(elf.load(memory, payload), initramfs=elf.section(payload, ".initrd"))
    parts = uki.sections(payload)
    if (inner := parts.get(".linux")) is not None:
        loaded = _load_plain(memory, inner)
        return _Loaded(loaded.kernel, loaded.setup, parts.get(".initrd"), uki.cmdline(parts.get(".cmdline")))
    return _load_plain(memory, payload)


def _load_plain(memory: GuestMemory, payload: Payload) -> _Loaded:
    """An ELF file or a bzImage; nothing that carries one."""
    if payload.head(4) == elf.MAGIC:
        return _Loaded(elf.load(memory, payload))
    header = bzimage.parse(payload)
    if header is None:
        raise HostError(
            f"{payload.name}: is {_describe(payload)}, not a kernel",
            "a kernel is an ELF file with a PVH note (vmlinux), a bzImage or a unified kernel image",
        )
    unpacked = bzimage.load_unpacked(memory, payload, header)
    if unpacked is not None:
        return _Loaded(unpacked)
    return _Loaded(bzimage.load_packed(memory, payload, header), header)


def _load_initramfs(memory: GuestMemory, payload: Payload, kernel: elf.Kernel) -> lo.Range:
    """Put the initramfs at the top of the first RAM region, where the kernel looks for nothing else."""
    top = memory.regions[0].end
    start = (top - payload.size) // PAGE_SIZE * PAGE_SIZE
    if start < max(kernel.end if kernel.end <= top else 0, lo.KERNEL_START):
        raise HostError(
            f"{payload.name}: {payload.size} bytes do not fit into guest RAM above the kernel",
            f"--memory size={memory.size} is too small",
        )
    payload.read_into(0, room(memory, start, payload.size, payload.name), "the initramfs")
    return lo.Range(start, payload.size)


def _describe(payload: Payload) -> str:
    head = payload.head(512)
    for offset, signature, what in _NO_KERNELS:
        if head[offset : offset + len(signature)] == signature:
            return what
    if not head.strip(b"\x00"):
        return "a file of zeros"
    if all(byte in b"\t\n\r" or 0x20 <= byte < 0x7F for byte in head):
        return "a text file"
    return f"an unknown kind of file (it begins with {head[:4].hex(' ')})"
