"""Initramfs archives: cpio in the newc format (the kernel's early-userspace/buffer-format.rst).

Written by hand, so that neither cpio nor root is needed: a device node is only a few digits.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member. `mode` has the file type; `device` is (major, minor) for a node."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | mode, data)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def node(path: str, major: int, minor: int) -> Entry:
    return Entry(path, stat.S_IFCHR | 0o600, b"", (major, minor))


def pack(entries: list[Entry]) -> bytes:
    """The archive; each folder has to come before what is in it."""
    out = bytearray()
    for inode, entry in enumerate([*entries, Entry(TRAILER, 0)], 1):
        name = entry.path.encode() + b"\0"
        fields = (
            inode, entry.mode, 0, 0, 2 if stat.S_ISDIR(entry.mode) else 1, 0, len(entry.data), 0, 0,
            *entry.device, len(name), 0,
        )  # fmt: skip
        out += b"070701" + b"".join(b"%08X" % value for value in fields) + name
        out += bytes(-len(out) % 4) + entry.data
        out += bytes(-len(out) % 4)
    return bytes(out + bytes(-len(out) % 512))
