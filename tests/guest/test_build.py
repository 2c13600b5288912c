"""The build of the probe guest."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from guest import build
from shared.errors import HostError

PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18


def segments(elf: bytes) -> list[tuple[int, int, int, int, int]]:
    """(type, offset, physical address, file size, memory size) of every program header."""
    offset, size, count = struct.unpack_from("<Q14xHH", elf, 32)
    headers = [struct.unpack_from("<IIQQQQQ", elf, offset + i * size) for i in range(count)]
    return [(h[0], h[2], h[4], h[5], h[6]) for h in headers]


def test_the_elf_carries_a_pvh_entry_inside_its_segments() -> None:
    elf = build.build().read_bytes()
    notes = [(offset, size) for kind, offset, _, size, _ in segments(elf) if kind == PT_NOTE]
    assert len(notes) == 1
    name_size, size, kind = struct.unpack_from("<III", elf, notes[0][0])
    assert (name_size, size, kind) == (4, 8, XEN_ELFNOTE_PHYS32_ENTRY)
    (entry,) = struct.unpack_from("<Q", elf, notes[0][0] + 16)
    loads = [(address, memory) for kind, _, address, _, memory in segments(elf) if kind == PT_LOAD]
    assert any(address <= entry < address + memory for address, memory in loads)
    assert min(address for address, _ in loads) >= 1 << 20
    assert max(address + memory for address, memory in loads) <= 16 << 20


def test_a_second_build_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    elf = build.build()
    stamp = elf.stat().st_mtime_ns
    monkeypatch.setenv("PATH", "")  # nothing may have to be run
    assert build.build() == elf
    assert elf.stat().st_mtime_ns == stamp


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOTILLA_CACHE", str(tmp_path))
    assert build.cache_dir() == tmp_path / "guest"
    monkeypatch.delenv("FLOTILLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "flotilla" / "guest"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOTILLA_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="gcc"):
        build.build()
    assert not list(tmp_path.rglob("probe.elf"))
