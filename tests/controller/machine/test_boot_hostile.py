"""Damaged and hostile kernel files: only a FlotillaError, no access outside guest RAM, no memory by their word."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controller.machine.boot import BootProtocol, load
from controller.machine.boot.elf import pvh_entry
from controller.machine.boot.payload import Payload
from controller.machine.layout import compute
from shared.errors import FlotillaError, HostError
from shared.memory import GuestMemory
from tests.controller.machine import images

RAM_SIZE = 16 << 20
LAYOUT = compute(RAM_SIZE, 46)
SMALL = images.elf(((0x20_0000, images.CODE[:300], 300),), sections={".text": b"x", ".initrd": b"initramfs"})
VALID = {
    "elf64": SMALL,
    "elf32": images.elf(((0x20_0000, images.CODE[:300], 300),), sections={".initrd": b"initramfs"}, bits=32),
    "lz4": images.bzimage(images.pack_lz4(SMALL), preferred=0x10_0000),
    "gzip": images.bzimage(images.pack_gzip(SMALL), preferred=0x10_0000),
    "xz": images.bzimage(images.pack_xz(SMALL), preferred=0x10_0000),
    "packed": images.bzimage(b"unknown", preferred=0x10_0000),
    "uki": images.uki({".linux": SMALL, ".initrd": b"initramfs", ".cmdline": b"quiet"}),
}
MAGICS = (b"", b"\x7fELF\x02\x01", b"\x7fELF\x01\x01", b"MZ", bytes(0x202) + b"HdrS")
# Blocks of lz4 and chunks of a stream have a fixed size; nothing else may be large for files this small.
MAX_ALLOCATED = 40 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory.create(RAM_SIZE)
    yield ram
    ram.close()


def attempt(memory: GuestMemory, kernel: bytes, initramfs: bytes | None = None) -> BootProtocol | None:
    """Boot from memfds; None if the kernel was refused. Checks that the firmware tables' memory was left alone."""
    fds = [_memfd(kernel)]
    if initramfs is not None:
        fds.append(_memfd(initramfs))
    paths = [f"/proc/self/fd/{fd}" for fd in fds]
    guard = memory.read(0xA_0000, 0x5_F000)
    tracemalloc.start()
    try:
        entry = load(memory, LAYOUT, paths[0], paths[1] if initramfs is not None else None, "")
    except FlotillaError:
        return None
    else:
        return entry.protocol
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        for fd in fds:
            os.close(fd)
        assert peak < MAX_ALLOCATED
        assert memory.read(0xA_0000, 0x5_F000) == guard


def _memfd(data: bytes) -> int:
    fd = os.memfd_create("kernel")
    os.write(fd, data)
    return fd


@pytest.mark.parametrize("name", VALID)
def test_the_undamaged_images_boot(memory: GuestMemory, name: str) -> None:
    """Else the tests below would damage what is refused anyway."""
    expected = BootProtocol.BZIMAGE32 if name == "packed" else BootProtocol.PVH
    assert attempt(memory, VALID[name], b"initramfs") is expected


@settings(deadline=None)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=2000))
def test_random_files(memory: GuestMemory, magic: bytes, rest: bytes) -> None:
    attempt(memory, magic + rest)


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(sorted(VALID)), cut=st.integers(0, 4000))
def test_files_cut_short(memory: GuestMemory, name: str, cut: int) -> None:
    attempt(memory, VALID[name][:cut])


@settings(deadline=None, max_examples=400)
@given(
    name=st.sampled_from(sorted(VALID)),
    changes=st.lists(
        st.tuples(
            st.integers(0, 1300),
            st.sampled_from((1, 2, 4, 8)),
            st.one_of(st.integers(0, 2**64 - 1), st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_files_with_wrong_fields(memory: GuestMemory, name: str, changes: list[tuple[int, int, int]]) -> None:
    image = bytearray(VALID[name])
    for offset, width, value in changes:
        if offset + width <= len(image):
            image[offset : offset + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    attempt(memory, bytes(image))


def patched(name: str, offset: int, layout: str, *values: int) -> bytes:
    image = bytearray(VALID[name])
    struct.pack_into(layout, image, offset, *values)
    return bytes(image)


@pytest.mark.parametrize("image", [
    patched("elf64", 32, "<Q", 2**64 - 1),  # e_phoff
    patched("elf64", 40, "<Q", 2**64 - 8),  # e_shoff
    patched("elf64", 56, "<H", 0xFFFF),  # e_phnum
    patched("elf64", 60, "<H", 0xFFFF),  # e_shnum
    patched("elf64", 62, "<H", 0xFFF0),  # e_shstrndx
    patched("elf64", 64 + 8, "<Q", 2**64 - 1),  # p_offset
    patched("elf64", 64 + 32, "<QQ", 2**63, 2**64 - 1),  # p_filesz, p_memsz
    patched("elf64", 64 + 56 + 32, "<QQ", 2**63, 2**63),  # of the note
    patched("elf64", len(SMALL) - 64 + 24, "<QQ", 2**63, 2**63),  # sh_offset, sh_size of the names
    patched("elf64", len(SMALL) - 64 + 32, "<Q", 2**40),
    patched("lz4", 0x248, "<II", 100, 2**32 - 1),  # payload_length
    patched("lz4", 0x248, "<II", 2**32 - 1, 2**32 - 1),
    patched("lz4", 1024 + 100 + 4, "<I", 2**32 - 1),  # size of the first block
    patched("packed", 0x214, "<I", 2**32 - 4096),  # code32_start
    patched("packed", 0x258, "<QI", 2**64 - 1, 2**32 - 1),  # pref_address, init_size
    patched("uki", 0x3C, "<I", 2**32 - 1),  # e_lfanew
    patched("uki", 0x80 + 6, "<H", 0xFFFF),  # NumberOfSections
    patched("uki", 0x80 + 24 + 8, "<IIII", 2**32 - 1, 0, 2**32 - 1, 2**32 - 1),  # of .linux
])  # fmt: skip
def test_the_fields_that_say_how_much_and_where(memory: GuestMemory, image: bytes) -> None:
    assert attempt(memory, image) is None


def test_a_gigabyte_of_zeros_in_a_small_gzip_is_not_held_in_memory(memory: GuestMemory) -> None:
    kernel = images.elf(((0x20_0000, bytes(64 << 20), 64 << 20),))
    assert attempt(memory, images.bzimage(images.pack_gzip(kernel))) is None


@given(st.binary(max_size=200), st.sampled_from((0, 1, 4, 8)))
@example(struct.pack("<III", 2**32 - 1, 2**32 - 1, 18), 4)
@example(images.note()[:-1], 4)
def test_notes_are_never_read_past_their_end(notes: bytes, alignment: int) -> None:
    found = pvh_entry(notes, alignment)
    assert found is None or 0 <= found < 1 << 64


@given(offset=st.integers(-10, 20), size=st.integers(-10, 20))
def test_a_payload_gives_only_what_is_there(offset: int, size: int) -> None:
    fd = _memfd(b"before0123456789after")
    payload = Payload(fd, "--kernel x", 6, 10)
    reads: tuple[Callable[[], bytes], ...] = (
        lambda: payload.read(offset, size, "it"),
        lambda: (part := payload.part(offset, size, "part")).read(0, part.size, "it"),
    )
    try:
        for read in reads:
            if offset >= 0 and size >= 0 and offset + size <= 10:
                assert read() == b"0123456789"[offset : offset + size]
            else:
                with pytest.raises(HostError, match=r"^--kernel x: "):
                    read()
    finally:
        os.close(fd)


def test_a_file_that_shrinks_while_it_is_read() -> None:
    fd = _memfd(bytes(100))
    try:
        payload = Payload(fd, "--initramfs x", 0, 200)
        with pytest.raises(HostError, match="--initramfs x: the file shrank while the initramfs was read"):
            payload.read_into(0, memoryview(bytearray(200)), "the initramfs")
        with pytest.raises(HostError, match="shrank"):
            payload.read(0, 200, "it")
    finally:
        os.close(fd)
