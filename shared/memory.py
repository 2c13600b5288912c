"""Guest RAM: one sealed memfd per region, mapped shared by every process that needs it.

Shape and names are Cloud Hypervisor's (its machine page, section 1.1): RAM below 3 GiB is the first region, the rest
continues at 4 GiB. Page size 4096; all addresses and sizes are in bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from shared.errors import BadGuestAddress, HostError
from shared.linux import MADV_DONTDUMP, bytes_at, close_fds, madvise, memfd, mmap_fd, munmap
from shared.records import Record

PAGE_SIZE = 4096
LOW_RAM_END = 0xC000_0000
HIGH_RAM_START = 0x1_0000_0000
MEMFD_NAME = "ch_ram"


class Region(Record):
    """One memslot: `size` bytes at guest address `gpa` are `fd` from `offset` on, mapped here at `address`."""

    gpa: int
    size: int
    fd: int
    offset: int
    slot: int
    address: int

    @property
    def end(self) -> int:
        return self.gpa + self.size


def spans(size: int) -> list[tuple[int, int]]:
    """(gpa, length) of each region of a VM with `size` bytes of RAM."""
    low = (0, min(size, LOW_RAM_END))
    return [low, (HIGH_RAM_START, size - LOW_RAM_END)] if size > LOW_RAM_END else [low]


class GuestMemory:
    """All regions of one VM in this process. Accessors raise BadGuestAddress for what is not RAM."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = tuple(regions)
        self._views = tuple((r.gpa, r.end, bytes_at(r.address, r.size)) for r in self.regions)

    @classmethod
    def create(cls, size: int) -> GuestMemory:
        """Fresh RAM of `size` bytes. Raises HostError when the host has not got it."""
        fds: list[int] = []
        try:
            for _, length in spans(size):
                fds.append(memfd(MEMFD_NAME, length))
            return cls.attach([(gpa, length, fds[slot], 0, slot) for slot, (gpa, length) in enumerate(spans(size))])
        except OSError as error:
            close_fds(fds)
            what = f"--memory size={size}: the host refused {size} bytes of guest RAM"
            raise HostError(f"{what}: {error.strerror}") from error

    @classmethod
    def attach(cls, parts: Iterable[tuple[int, int, int, int, int]]) -> GuestMemory:
        """Map regions that exist: (gpa, size, fd, offset, slot) each. The fds stay open and belong to the memory.

        When it raises, HostError or OSError, nothing is mapped and the fds are the caller's.
        """
        regions: list[Region] = []
        try:
            for gpa, size, fd, offset, slot in parts:
                if os.fstat(fd).st_size < offset + size:
                    raise HostError(f"guest RAM region {slot}: the file has less than {offset + size} bytes")
                regions.append(Region(gpa, size, fd, offset, slot, mmap_fd(fd, size, offset)))
                madvise(regions[-1].address, size, MADV_DONTDUMP)
            return cls(regions)
        except BaseException:
            for region in regions:
                munmap(region.address, region.size)
            raise

    @property
    def size(self) -> int:
        return sum(r.size for r in self.regions)

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable view; the range must lie within one region."""
        for start, end, view in self._views:
            if start <= gpa and gpa + size <= end:
                return view[gpa - start : gpa - start + size]
        raise BadGuestAddress(f"guest address {gpa:#x}, length {size:#x} is not RAM")

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.view(gpa, len(data))[:] = data

    def u16(self, gpa: int) -> int:
        """One aligned 16-bit load, as ring indices need."""
        return self.view(gpa, 2).cast("H")[0]

    def u32(self, gpa: int) -> int:
        return self.view(gpa, 4).cast("I")[0]

    def u64(self, gpa: int) -> int:
        return self.view(gpa, 8).cast("Q")[0]

    def host_address(self, gpa: int, size: int) -> int:
        """This process's address of a range that lies within one region."""
        for region in self.regions:
            if region.gpa <= gpa and gpa + size <= region.end:
                return region.address + gpa - region.gpa
        raise BadGuestAddress(f"guest address {gpa:#x}, length {size:#x} is not RAM")

    def close(self) -> None:
        """Unmap and close. No view may be in use any more."""
        views, self._views = self._views, ()
        del views
        for region in self.regions:
            munmap(region.address, region.size)
            os.close(region.fd)
        self.regions = ()
