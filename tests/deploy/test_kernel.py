"""Kernel files: binutils must find in them what was put in, and nothing that was there may have moved."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import lz4.block
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.lab import kernel


@pytest.fixture(scope="module")
def elf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elf")
    (folder / "a.c").write_text("int x = 1; void _start(void) { for (;;) x++; }\n")
    subprocess.run(["gcc", "-nostdlib", "-static", "-o", folder / "a", folder / "a.c"], check=True)
    return folder / "a"


def program_headers(path: Path) -> str:
    said = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
    return said.partition("Section to")[0]


@pytest.mark.parametrize("size", [0, 1, 4097])
def test_added_section_is_what_objcopy_finds(elf: Path, tmp_path: Path, size: int) -> None:
    content = bytes(n % 251 for n in range(size))
    new = tmp_path / "new"
    new.write_bytes(kernel.with_section(elf.read_bytes(), ".initrd", content))
    dump = f"--dump-section=.initrd={tmp_path / 'out'}"
    subprocess.run(["objcopy", "-O", "binary", dump, new, "/dev/null"], check=True)
    assert (tmp_path / "out").read_bytes() == content
    assert program_headers(new) == program_headers(elf)
    listing = subprocess.run(["readelf", "-SW", new], capture_output=True, text=True, check=True)
    assert listing.stderr == ""
    before = subprocess.run(["readelf", "-SW", elf], capture_output=True, text=True, check=True).stdout
    assert listing.stdout.count("PROGBITS") == before.count("PROGBITS") + 1


def test_section_cannot_be_added_without_section_headers(elf: Path) -> None:
    data = bytearray(elf.read_bytes())
    struct.pack_into("<H", data, 60, 0)
    with pytest.raises(kernel.KernelError, match="no section headers"):
        kernel.with_section(bytes(data), ".initrd", b"")


def bzimage(payload: bytes) -> bytes:
    """A bzImage as far as the setup header is concerned: one setup sector, the payload at offset 64."""
    data = bytearray(1024 + 64)
    data[0x1F1] = 1
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", data, 0x248, 64, len(payload))
    return bytes(data) + payload


@given(st.binary(max_size=5000), st.integers(1, 3))
def test_lz4_payload_is_unpacked(tmp_path_factory: pytest.TempPathFactory, tail: bytes, copies: int) -> None:
    content = (kernel.ELF_MAGIC + tail) + bytes(kernel.LZ4_LEGACY_BLOCK * (copies - 1))
    blocks = [content[at : at + kernel.LZ4_LEGACY_BLOCK] for at in range(0, len(content), kernel.LZ4_LEGACY_BLOCK)]
    packed = [lz4.block.compress(block, store_size=False) for block in blocks]
    payload = struct.pack("<I", kernel.LZ4_LEGACY_MAGIC)
    payload += b"".join(struct.pack("<I", len(block)) + block for block in packed)
    path = tmp_path_factory.getbasetemp() / "bzImage"
    path.write_bytes(bzimage(payload + struct.pack("<I", len(content))))
    assert kernel.unpack_bzimage(path) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [(bytes(4096), "no setup header"), (bzimage(b"\x1f\x8b\x08\x00" + bytes(8)), "not lz4 but begins with 1f8b0800")],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(kernel.KernelError, match=f"{tmp_path}/file.*{message}"):
        kernel.unpack_bzimage(tmp_path / "file")
