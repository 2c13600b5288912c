"""What a vhost-user back end maps: files of the front end, and the table of guest memory made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import ProtocolError
from shared.linux import MADV_DONTDUMP, madvise, mmap_fd, munmap
from shared.vhost_user import MemoryRegion

MAX_MEM_SLOTS = 64
PAGE_SIZE = 4096
ADDRESS_SPACE = 1 << 64


@dataclass(frozen=True, slots=True)
class Mapping:
    """Guest addresses [gpa, gpa+size): the front end has them at `uva`, this process at `address`."""

    gpa: int
    size: int
    uva: int
    address: int


@dataclass(slots=True)
class Area:
    """A part of a file, mapped shared and writable for as long as the front end wants it."""

    address: int = 0
    size: int = 0
    base: int = 0  # what munmap needs: a mapping begins on a page of its file
    length: int = 0

    @classmethod
    def map(cls, fd: int, size: int, offset: int, what: str) -> Area:
        """Map [offset, offset+size) of a file that the front end passed; the fd stays the caller's.

        Raises ProtocolError when the file is shorter: touching the missing part would be SIGBUS.
        """
        info = os.fstat(fd)
        if not size or offset + size > info.st_size:
            raise ProtocolError(f"vhost-user {what}: {size} bytes at {offset} of a file of {info.st_size}")
        granule = max(info.st_blksize, PAGE_SIZE)  # on hugetlbfs st_blksize is the huge page
        skip = offset % granule
        length = (skip + size + granule - 1) & -granule
        base = mmap_fd(fd, length, offset - skip)
        madvise(base, length, MADV_DONTDUMP)
        return cls(base + skip, size, base, length)

    def unmap(self) -> None:
        if self.length:
            munmap(self.base, self.length)
        self.address = self.size = self.base = self.length = 0


class MemoryTable:
    """Guest memory as the front end last described it. `publish` is told every new state before the old one goes."""

    def __init__(self, publish: Callable[[tuple[Mapping, ...]], None]) -> None:
        self._publish = publish
        self._regions: list[tuple[Mapping, Area]] = []

    def replace(self, regions: list[MemoryRegion], fds: list[int]) -> None:
        """The whole table anew (SET_MEM_TABLE). Raises ProtocolError and OSError, the old one then stays."""
        if len(fds) != len(regions):
            raise ProtocolError(f"vhost-user memory table: {len(regions)} regions, {len(fds)} descriptors")
        mapped: list[tuple[Mapping, Area]] = []
        try:
            for region, fd in zip(regions, fds, strict=True):
                mapped.append(_map(region, fd))
        except (ProtocolError, OSError):
            for _, area in mapped:
                area.unmap()
            raise
        self._switch(mapped)

    def add(self, region: MemoryRegion, fd: int) -> None:
        """One region more (ADD_MEM_REG). Raises ProtocolError when it overlaps another or all slots are in use."""
        if len(self._regions) >= MAX_MEM_SLOTS:
            raise ProtocolError(f"vhost-user ADD_MEM_REG: all {MAX_MEM_SLOTS} slots are in use")
        for mapping, _ in self._regions:
            if mapping.gpa < region.gpa + region.size and region.gpa < mapping.gpa + mapping.size:
                raise ProtocolError(f"vhost-user ADD_MEM_REG: {region.gpa:#x} overlaps {mapping.gpa:#x}")
        self._switch([*self._regions, _map(region, fd)])

    def remove(self, region: MemoryRegion) -> None:
        """One region less (REM_MEM_REG). Raises ProtocolError when there is none like it."""
        key = (region.gpa, region.size, region.uva)
        kept = [(m, a) for m, a in self._regions if (m.gpa, m.size, m.uva) != key]
        if len(kept) == len(self._regions):
            raise ProtocolError(f"vhost-user REM_MEM_REG: no region of {region.size:#x} bytes at {region.gpa:#x}")
        self._switch(kept)

    def clear(self) -> None:
        self._switch([])

    def _switch(self, regions: list[tuple[Mapping, Area]]) -> None:
        old, self._regions = self._regions, regions
        self._publish(tuple(mapping for mapping, _ in regions))
        kept = {area.base for _, area in regions}
        for _, area in old:
            if area.base not in kept:
                area.unmap()

    def translate(self, uva: int, size: int, alignment: int, what: str) -> tuple[int, int]:
        """(address here, guest address) of a range of the front end's address space. Raises ProtocolError."""
        for mapping, _ in self._regions:
            if mapping.uva <= uva and uva + size <= mapping.uva + mapping.size:
                address = mapping.address + uva - mapping.uva
                if address % alignment:
                    raise ProtocolError(f"vhost-user: {what} at {uva:#x} is not aligned to {alignment}")
                return address, mapping.gpa + uva - mapping.uva
        raise ProtocolError(f"vhost-user: {what} at {uva:#x}, {size} bytes, is outside guest memory")


def _map(region: MemoryRegion, fd: int) -> tuple[Mapping, Area]:
    if region.gpa + region.size > ADDRESS_SPACE or region.uva + region.size > ADDRESS_SPACE:
        raise ProtocolError(f"vhost-user memory region at {region.gpa:#x} wraps around")
    area = Area.map(fd, region.size, region.mmap_offset, f"memory region at {region.gpa:#x}")
    return Mapping(region.gpa, region.size, region.uva, area.address), area
