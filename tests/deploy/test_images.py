"""Parts of the lab's recipes: archives, file systems, partition tables, the order of modules, the cache."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.lab import archive, cache, debian, images

names = st.text("abcdefghij-_.", min_size=1, max_size=20)


def unpacked(data: bytes) -> list[archive.Entry]:
    """A reader of the newc format that trusts nothing of the writer's."""
    entries: list[archive.Entry] = []
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        start = at + 110
        name = data[start : start + fields[11] - 1].decode()
        assert data[start + fields[11] - 1] == 0
        body = (start + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            assert len(data) % 512 == 0
            return entries
        entries.append(archive.Entry(name, fields[1], data[body : body + fields[6]], (fields[9], fields[10])))
        at = (body + fields[6] + 3) & ~3


@given(st.lists(st.tuples(names, st.binary(max_size=70))))
def test_archive_holds_what_was_packed(files: list[tuple[str, bytes]]) -> None:
    entries = [archive.folder("d"), archive.node("dev/console", 5, 1), archive.symlink("sh", "busybox")]
    entries += [archive.file(name, data, 0o755) for name, data in files]
    assert unpacked(archive.pack(entries)) == entries


def test_types_of_archive_members_are_the_kernels() -> None:
    assert stat.S_ISDIR(archive.folder("d").mode)
    assert stat.S_ISCHR(archive.node("n", 1, 3).mode)
    assert stat.S_ISLNK(archive.symlink("l", "t").mode)
    assert stat.S_ISREG(archive.file("f", b"").mode)


def test_partitioned_disk_is_what_the_tools_read(tmp_path: Path) -> None:
    tree, disk, part = tmp_path / "tree", tmp_path / "disk", tmp_path / "part"
    tree.mkdir()
    (tree / "hello").write_text("hello")
    images.filesystem(disk, tree, 8 << 20, offset=1 << 20)
    images.partition(disk, (1 << 20, 8 << 20))
    data = disk.read_bytes()
    assert data[510:512] == b"\x55\xaa"
    assert [int.from_bytes(data[at : at + 4], "little") * 512 for at in (454, 458)] == [1 << 20, 8 << 20]
    part.write_bytes(data[1 << 20 :])
    debian.run(["e2fsck", "-fn", part], "e2fsck")
    assert debian.run(["debugfs", "-R", "cat /hello", part], "debugfs").splitlines()[-1] == "hello"


def module(folder: Path, name: str, depends: str) -> None:
    (folder / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")


def test_modules_come_behind_what_they_depend_on(tmp_path: Path) -> None:
    module(tmp_path, "virtio", "virtio_ring")
    module(tmp_path, "virtio_ring", "")
    module(tmp_path, "virtio-rng", "virtio")
    module(tmp_path, "virtio_blk", "virtio,virtio_ring")
    order = [path.stem for path in images.in_loading_order(tmp_path, ["virtio_blk", "virtio_rng"])]
    assert order == ["virtio_ring", "virtio", "virtio_blk", "virtio-rng"]


def test_missing_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(debian.DebianError, match="no module nothing"):
        images.in_loading_order(tmp_path, ["nothing"])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOTILLA_CACHE", str(tmp_path))
    return tmp_path / "lab"


def test_result_is_built_once_and_a_failed_build_leaves_nothing(own_cache: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        cache.made("thing.img", "k1", fails, "a thing")
    assert [path.name for path in own_cache.iterdir() if not path.name.startswith(".")] == []

    def works(path: Path) -> None:
        path.write_text("whole")

    path = cache.made("thing.img", "k1", works, "a thing")
    assert path.read_text() == "whole"
    assert cache.made("thing.img", "k1", fails, "a thing") == path


def test_only_results_that_nobody_used_for_long_are_removed(own_cache: Path) -> None:
    old, recent, other = (cache.result(name, key) for name, key in [("t.img", "1"), ("t.img", "2"), ("u.img", "1")])
    long_ago = time.time() - (cache.UNUSED_DAYS + 1) * 86400
    for path in (old, recent, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (long_ago, long_ago))
    cache.made("t.img", "3", Path.touch, "a thing")
    assert [old.exists(), recent.exists(), other.exists()] == [False, True, True]


def test_failing_tool_is_quoted() -> None:
    with pytest.raises(debian.DebianError, match=r"(?s)tool failed \(exit code 2\): try this\n  why"):
        debian.run(["sh", "-c", "echo why; exit 2"], "tool", "try this")


def test_verify_program_finds_a_block_that_changed(tmp_path: Path) -> None:
    program, disk = tmp_path / "verify", tmp_path / "disk"
    disk.write_bytes(bytes(8192))
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    debian.run(["gcc", *flags, "-o", program, images.HERE / "guest" / "verify.c"], "gcc")
    assert "verify: ok" in subprocess.run([program, disk, "1"], capture_output=True, text=True, check=True).stdout
    running = subprocess.Popen([program, disk], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert "verify: ok" in running.stdout.readline()
    # A stale write of an old generation, over and over, until one is read back.
    with open(disk, "r+b", buffering=0) as file:
        while running.poll() is None:
            os.pwrite(file.fileno(), bytes(8192), 0)
    assert "verify: BAD block" in running.stdout.read()
    running.stdout.close()
    assert running.returncode == 1
