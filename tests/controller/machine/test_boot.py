"""Loading kernels: ELF, bzImage and UKI, the initramfs and the command line, and what is refused."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.machine import layout as lo
from controller.machine.boot import BootEntry, BootProtocol, load
from controller.machine.layout import Layout, compute
from shared.errors import ConfigError, HostError
from shared.memory import GuestMemory
from tests.controller.machine import images

Boot = Callable[..., BootEntry]
PVH = BootEntry(BootProtocol.PVH, rip=images.ENTRY, rbx=0x6000)
BZIMAGE32 = BootEntry(BootProtocol.BZIMAGE32, rip=0x10_0000, rsi=0x7000, rsp=0x8FF0)


@pytest.fixture
def boot(memory: GuestMemory, layout: Layout, tmp_path: Path) -> Boot:
    def run(kernel: bytes, initramfs: bytes | None = None, cmdline: str = "console=ttyS0") -> BootEntry:
        path = tmp_path / "kernel"
        path.write_bytes(kernel)
        if initramfs is not None:
            (tmp_path / "initramfs").write_bytes(initramfs)
        return load(
            memory, layout, str(path), None if initramfs is None else str(tmp_path / "initramfs"), cmdline
        )

    return run


def module(memory: GuestMemory) -> bytes | None:
    """What the PVH start info names as the only module."""
    count, modules = struct.unpack_from("<IQ", memory.read(0x600C, 12))
    if not count:
        assert modules == 0
        return None
    assert (count, modules) == (1, 0x6040)
    address, size, cmdline, reserved = struct.unpack("<QQQQ", memory.read(modules, 32))
    assert cmdline == reserved == 0 and address % 4096 == 0
    return memory.read(address, size)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("width", [4, 8])
def test_an_elf_kernel_is_entered_at_its_pvh_note(boot: Boot, memory: GuestMemory, bits: int, width: int) -> None:
    loads = ((0x20_0000, images.CODE, 0x5000), (0x40_0123, b"data", 4))
    memory.write(0x20_0000, b"\xff" * 0x6000)  # RAM that is not fresh, as after the guest's reboot
    assert boot(images.elf(loads, images.note(width=width), bits=bits)) == PVH
    assert memory.read(0x20_0000, 0x5000) == images.CODE.ljust(0x5000, b"\x00")
    assert memory.read(0x20_5000, 0x1000) == b"\xff" * 0x1000
    assert memory.read(0x40_0123, 4) == b"data"


def test_the_note_is_found_behind_other_notes(boot: Boot) -> None:
    other = images.note(1, kind=3, name=b"GNU\x00") + images.note(2, kind=18, name=b"GNU\x00")
    assert boot(images.elf(notes=other + images.note(1, kind=17) + images.note())) == PVH


def test_start_info_and_memory_map_byte_for_byte(tmp_path: Path) -> None:
    memory = GuestMemory.create((3 << 30) + (1 << 20))
    try:
        layout = compute(4 << 30, 46)
        (tmp_path / "vmlinux").write_bytes(images.elf())
        load(memory, layout, str(tmp_path / "vmlinux"), None, "root=/dev/vda1")
        assert memory.read(0x6000, 56) == struct.pack(
            "<IIIIQQQQII", 0x336E_C578, 1, 0, 0, 0, 0x20000, 0xA0000, 0x7000, 4, 0
        )
        assert memory.read(0x7000, 96) == b"".join(
            struct.pack("<QQII", address, size, kind, 0)
            for address, size, kind in (
                (0, 0xA0000, 1), (0x100000, 0xBFF00000, 1), (0x1_0000_0000, 0x4000_0000, 1),
                (0xE800_0000, 0x1000_0000, 2),
            )
        )  # fmt: skip
        assert memory.read(0x20000, 15) == b"root=/dev/vda1\x00"
        assert memory.read(0x9000, 0x4000) == bytes(0x4000), "no page tables are written"
    finally:
        memory.close()


@pytest.mark.parametrize("size", [1, 4096, 5000])
def test_the_initramfs_is_at_the_top_of_the_first_region(boot: Boot, memory: GuestMemory, size: int) -> None:
    data = os.urandom(size)
    boot(images.elf(), initramfs=data)
    assert module(memory) == data
    (address,) = struct.unpack("<Q", memory.read(0x6040, 8))
    assert address == (memory.size - size) & ~0xFFF


@pytest.mark.parametrize("bits", [64, 32])
def test_an_elf_kernel_brings_its_initramfs(boot: Boot, memory: GuestMemory, bits: int) -> None:
    kernel = images.elf(sections={".text": b"x", ".initrd": b"070701 from the kernel"}, bits=bits)
    assert boot(kernel) == PVH
    assert module(memory) == b"070701 from the kernel"


def test_a_given_initramfs_wins_over_the_kernels_own(boot: Boot, memory: GuestMemory) -> None:
    boot(images.elf(sections={".initrd": b"from the kernel"}), initramfs=b"from the flag")
    assert module(memory) == b"from the flag"


def test_a_kernel_without_initrd_section_has_no_module(boot: Boot, memory: GuestMemory) -> None:
    boot(images.elf(sections={".initrd2": b"no", ".init": b"no"}))
    assert module(memory) is None


@pytest.mark.parametrize("pack", [images.pack_lz4, images.pack_gzip, images.pack_xz])
def test_a_bzimage_is_unpacked_and_entered_by_pvh(
    boot: Boot, memory: GuestMemory, pack: Callable[[bytes], bytes]
) -> None:
    code = os.urandom(3 << 20)
    kernel = images.elf(((0x20_0000, code, len(code)), (0x80_0000, code[::-1], len(code) + 9)))
    assert boot(images.bzimage(pack(kernel)), initramfs=b"initramfs") == PVH
    assert memory.read(0x20_0000, len(code)) == code
    assert memory.read(0x80_0000, len(code) + 9) == code[::-1] + bytes(9)
    assert module(memory) == b"initramfs"


def test_an_lz4_kernel_of_many_blocks_is_dealt_out_right(boot: Boot, memory: GuestMemory) -> None:
    code = os.urandom(400_000)
    kernel = images.elf(((0x20_0000, code, len(code)),))
    assert boot(images.bzimage(images.pack_lz4(kernel, block=70_000))) == PVH
    assert memory.read(0x20_0000, len(code)) == code


@pytest.mark.parametrize(
    ("payload", "version"),
    [
        (b"\x28\xb5\x2f\xfd unknown", 0x020F),
        (images.pack_lz4(images.elf(notes=b"")), 0x020F),
        (b"", 0x020F),
        (images.pack_lz4(images.elf()), 0x0207),
    ],
    ids=["zstd", "no PVH note", "no payload", "protocol without payload fields"],
)
def test_a_bzimage_that_only_the_guest_can_unpack_is_entered_in_32_bit_mode(
    boot: Boot, memory: GuestMemory, payload: bytes, version: int
) -> None:
    image = images.bzimage(payload, version=version)
    assert boot(image, initramfs=b"initramfs", cmdline="quiet") == BZIMAGE32
    assert memory.read(0x10_0000, len(image) - 1024) == image[1024:]
    page = memory.read(0x7000, 4096)
    expected = bytearray(4096)
    expected[0x1F1:0x26C] = image[0x1F1:0x26C]
    expected[0x210] = 0xFF
    expected[0x70:0x78] = struct.pack("<Q", 0xA0000)
    expected[0x218:0x220] = struct.pack("<II", (memory.size - 9) & ~0xFFF, 9)
    expected[0x228:0x22C] = struct.pack("<I", 0x20000)
    expected[0x238:0x23C] = struct.pack("<I", 0x10000)
    expected[0x1E8] = 3
    for index, entry in enumerate(
        ((0, 0xA0000, 1), (0x100000, memory.size - 0x100000, 1), (0xE800_0000, 0x1000_0000, 2))
    ):
        expected[0x2D0 + 20 * index : 0x2E4 + 20 * index] = struct.pack("<QQI", *entry)
    assert page == bytes(expected)
    assert memory.read(0x20000, 6) == b"quiet\x00"
    assert memory.read((memory.size - 9) & ~0xFFF, 9) == b"initramfs"


@pytest.mark.parametrize("inner", [images.elf(), images.bzimage(images.pack_lz4(images.elf()))], ids=["ELF", "bzImage"])
def test_a_uki_brings_kernel_initramfs_and_command_line(boot: Boot, memory: GuestMemory, inner: bytes) -> None:
    cmdline = b"root=/dev/vda quiet\n\x00"
    image = images.uki({".osrel": b"ID=x", ".cmdline": cmdline, ".initrd": b"initrd!", ".linux": inner})
    assert boot(image, cmdline="") == PVH
    assert module(memory) == b"initrd!"
    assert memory.read(0x20000, 20) == b"root=/dev/vda quiet\x00"
    boot(image, initramfs=b"mine", cmdline="mine")
    assert module(memory) == b"mine"
    assert memory.read(0x20000, 5) == b"mine\x00"


def test_a_uki_whose_kernel_must_unpack_itself(boot: Boot, memory: GuestMemory) -> None:
    inner = images.bzimage(b"(zstd)")
    assert boot(images.uki({".linux": inner, ".initrd": b"i"})) == BZIMAGE32
    assert memory.read(0x10_0000, len(inner) - 1024) == inner[1024:]


def test_objcopy_can_put_the_initramfs_into_a_kernel(boot: Boot, memory: GuestMemory, tmp_path: Path) -> None:
    if shutil.which("gcc") is None or shutil.which("objcopy") is None:
        pytest.skip("gcc or objcopy is missing")
    source = tmp_path / "kernel.S"
    source.write_text(
        '.section .note.pvh, "a", @note\n.long 4, 8, 18\n.asciz "Xen"\n.quad _start\n'
        ".text\n.code32\n.globl _start\n_start: hlt\n"
    )
    (tmp_path / "initrd").write_bytes(b"070701" * 1000)
    for command in (
        ["gcc", "-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000,--build-id=none", "-o", "plain", "kernel.S"],
        ["objcopy", "--add-section", ".initrd=initrd", "plain", "carrier"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    entry = boot((tmp_path / "carrier").read_bytes())
    assert memory.read(entry.rip, 1) == b"\xf4"
    assert module(memory) == b"070701" * 1000


@pytest.mark.parametrize(("kernel", "message"), [
    (b"#!/bin/sh\n", "is a script, not a kernel"),
    (b"hello\n" * 100, "is a text file, not a kernel"),
    (bytes(4096), "is a file of zeros, not a kernel"),
    (b"\x1f\x8b\x08" + bytes(600), "is a gzip file, not a kernel"),
    (b"QFI\xfb" + bytes(600), "is a qcow2 disk image, not a kernel"),
    (b"070701" + bytes(600), "is a cpio archive .an initramfs.., not a kernel"),
    (bytes(510) + b"\x55\xaa", "is a disk image, not a kernel"),
    (bytes(0x38) + b"ARM\x64" + bytes(600), "is a kernel for arm64, not a kernel"),
    (b"\xde\xad\xbe\xef" + bytes(60), r"an unknown kind of file .it begins with de ad be ef"),
    (images.uki({".text": b"efi"}), "is an EFI program without a Linux kernel in it"),
    (images.uki({".linux": b"no kernel at all"}), r"kernel .section .linux.: is a text file"),
    (images.elf(notes=b""), "without the PVH note .*CONFIG_PVH"),
    (images.elf(notes=images.note(kind=17)), "without the PVH note"),
    (images.elf(notes=images.note(0x90_0000)), "PVH entry point 0x900000 lies outside"),
    (images.elf(machine=183), "another machine .e_machine 183"),
    (images.elf(((0x1000, b"x", 1),)), "ELF segment at 0x1000, where the boot and firmware tables are"),
    (images.elf(((0x20_0000, b"xx", 1),)), "more bytes in the file than in memory"),
    (images.elf(((0x20_0000, b"x", 1 << 40),)), "--memory size=67108864 is too small"),
    (images.elf(((1 << 63, b"x", 1),)), "--memory size=67108864 is too small"),
    (images.elf()[:40], "ends within its header"),
    (images.elf()[:100], "program header table should be"),
    (images.elf()[:-30], "an ELF segment should be"),
    (images.bzimage(b"x", loadflags=0), "a zImage"),
    (images.bzimage(b"x", version=0x0201), "boot protocol 0x0201"),
    (images.bzimage(b"x", code32_start=0x9_0000), "wants to be loaded at 0x90000"),
    (images.bzimage(b"x", init_size=1 << 30), "--memory size=67108864 is too small"),
    (images.bzimage(b"x")[:1024], "ends before its kernel"),
    (images.bzimage(images.pack_lz4(images.elf()))[:-9], "the packed kernel should be"),
    (images.bzimage(images.pack_lz4(images.elf())[:-20] + bytes(20)), "damaged|lz4 block|ends after"),
    (images.bzimage(images.pack_gzip(images.elf())[:40]), "gzip payload is cut short"),
    (images.bzimage(images.pack_xz(images.elf())[:90]), "xz payload is cut short"),
    (images.bzimage(images.pack_lz4(b"no ELF" * 100)), "is not an ELF file"),
])  # fmt: skip
def test_what_is_no_kernel_is_refused_by_flag_file_and_finding(boot: Boot, kernel: bytes, message: str) -> None:
    with pytest.raises(HostError, match=message) as caught:
        boot(kernel)
    assert str(caught.value).startswith("--kernel /") and "/kernel" in str(caught.value)


def refused(memory: GuestMemory, layout: Layout, kernel: Path, initramfs: Path | None = None) -> str:
    with pytest.raises(HostError) as caught:
        load(memory, layout, str(kernel), None if initramfs is None else str(initramfs), "")
    return str(caught.value)


def test_a_missing_kernel(memory: GuestMemory, layout: Layout, tmp_path: Path) -> None:
    assert refused(memory, layout, tmp_path / "none") == f"--kernel {tmp_path}/none: no such file"


def test_a_directory_as_kernel(memory: GuestMemory, layout: Layout, tmp_path: Path) -> None:
    assert refused(memory, layout, tmp_path) == f"--kernel {tmp_path}: is a directory, not a file"


def test_an_empty_kernel(memory: GuestMemory, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "k").touch()
    assert refused(memory, layout, tmp_path / "k") == f"--kernel {tmp_path}/k: is empty"


def test_a_named_pipe_as_kernel_does_not_block(memory: GuestMemory, layout: Layout, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "k")
    assert "is neither a regular file nor a block device" in refused(memory, layout, tmp_path / "k")


def test_a_path_through_a_file(memory: GuestMemory, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "k").touch()
    assert refused(memory, layout, tmp_path / "k" / "x") == f"--kernel {tmp_path}/k/x: can't be opened: Not a directory"


def test_an_unreadable_kernel(memory: GuestMemory, layout: Layout, tmp_path: Path) -> None:
    """In a child of another user, since root may read everything."""
    (tmp_path / "k").write_bytes(images.elf())
    (tmp_path / "k").chmod(0)
    tmp_path.chmod(0o755)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            load(memory, layout, "k", None, "")
        except HostError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as answer:
        assert answer.read() == "--kernel k: can't be opened: Permission denied"


def test_a_missing_initramfs_is_named_by_its_own_flag(memory: GuestMemory, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(images.elf())
    assert refused(memory, layout, tmp_path / "k", tmp_path / "i") == f"--initramfs {tmp_path}/i: no such file"


@pytest.mark.parametrize("size", [(64 << 20) - 0x20_0000, 65 << 20])
def test_an_initramfs_that_does_not_fit_above_the_kernel(
    memory: GuestMemory, layout: Layout, tmp_path: Path, size: int
) -> None:
    (tmp_path / "k").write_bytes(images.elf())
    with open(tmp_path / "i", "wb") as file:
        file.truncate(size)
    message = refused(memory, layout, tmp_path / "k", tmp_path / "i")
    assert message == (
        f"--initramfs {tmp_path}/i: {size} bytes do not fit into guest RAM above the kernel "
        "(--memory size=67108864 is too small)"
    )


@pytest.mark.parametrize(("cmdline", "message"), [
    ("x" * 0x10000, "--cmdline: 65536 characters, more than the 65535 that fit"),
    ("a\nb", "--cmdline: character '\\\\n' at position 1 is not printable ASCII"),
    ("a\x00", "--cmdline: character '\\\\x00' at position 1"),
    ("ä", "--cmdline: character 'ä' at position 0"),
])  # fmt: skip
def test_a_command_line_that_the_guest_could_not_be_given(boot: Boot, cmdline: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        boot(images.elf(), cmdline=cmdline)


def test_the_longest_command_line(boot: Boot, memory: GuestMemory) -> None:
    boot(images.elf(), cmdline="x" * 0xFFFF)
    assert memory.read(lo.CMDLINE_START, 0x10000) == b"x" * 0xFFFF + b"\x00"


@pytest.mark.parametrize("cmdline", [b"\xff\xfe", b"a\x01b"])
def test_a_ukis_command_line_is_checked_too(boot: Boot, cmdline: bytes) -> None:
    with pytest.raises((HostError, ConfigError), match="cmdline"):
        boot(images.uki({".linux": images.elf(), ".cmdline": cmdline}), cmdline="")


def test_no_file_stays_open(boot: Boot) -> None:
    before = len(os.listdir("/proc/self/fd"))
    boot(images.uki({".linux": images.elf(), ".initrd": b"i"}), initramfs=b"x")
    with pytest.raises(HostError):
        boot(b"nothing", initramfs=b"x")
    assert len(os.listdir("/proc/self/fd")) == before
