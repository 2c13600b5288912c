"""shared.memory: the regions, their seals, and what is not RAM."""

from __future__ import annotations

import fcntl
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import BadGuestAddress, HostError
from shared.linux import F_GET_SEALS, F_SEAL_GROW, F_SEAL_SHRINK
from shared.memory import HIGH_RAM_START, LOW_RAM_END, PAGE_SIZE, GuestMemory

MIB = 1 << 20
HIGH = 8 * MIB


@pytest.fixture(scope="module")
def split():
    """3 GiB and a little: two regions. Nothing of it is touched but a few pages."""
    memory = GuestMemory.create(LOW_RAM_END + HIGH)
    yield memory
    memory.close()


@pytest.fixture
def small():
    memory = GuestMemory.create(MIB)
    yield memory
    memory.close()


def test_small_ram_is_one_region_from_zero(small):
    (region,) = small.regions
    assert (region.gpa, region.size, region.end, region.offset, region.slot) == (0, MIB, MIB, 0, 0)
    assert small.size == MIB
    assert os.readlink(f"/proc/self/fd/{region.fd}").startswith("/memfd:ch_ram")


def test_ram_is_split_at_3_gib_and_goes_on_at_4_gib(split):
    assert [(r.gpa, r.size, r.slot) for r in split.regions] == [(0, LOW_RAM_END, 0), (HIGH_RAM_START, HIGH, 1)]
    assert split.size == LOW_RAM_END + HIGH


def test_no_holder_can_resize_a_region(small):
    fd = small.regions[0].fd
    assert fcntl.fcntl(fd, F_GET_SEALS) & (F_SEAL_SHRINK | F_SEAL_GROW) == F_SEAL_SHRINK | F_SEAL_GROW
    for size in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def test_a_core_dump_has_no_guest_ram(small):
    address = small.regions[0].address
    with open("/proc/self/smaps") as file:
        lines = iter(file)
        next(line for line in lines if line.startswith(f"{address:x}-"))
        flags = next(line for line in lines if line.startswith("VmFlags:"))
    assert "dd" in flags.split() and "sh" in flags.split()


def test_attached_memory_is_the_same_memory(small):
    region = small.regions[0]
    other = GuestMemory.attach([(region.gpa, region.size, os.dup(region.fd), region.offset, region.slot)])
    small.write(0x1234, b"hello")
    assert other.read(0x1234, 5) == b"hello"
    other.view(MIB - 1, 1)[0] = 7
    assert small.read(MIB - 1, 1) == b"\x07"
    other.close()
    assert small.read(0x1234, 5) == b"hello"


def test_a_file_that_is_too_short_is_refused(small):
    with pytest.raises(HostError, match=f"guest RAM region 3: the file has less than {MIB + PAGE_SIZE} bytes"):
        GuestMemory.attach([(0, MIB, small.regions[0].fd, PAGE_SIZE, 3)])


def test_more_than_any_host_has_is_refused_by_name():
    with pytest.raises(HostError, match=f"--memory size={1 << 60}: the host refused"):
        GuestMemory.create(1 << 60)


def test_numbers_are_little_endian(small):
    small.write(64, bytes(range(1, 9)))
    assert (small.u16(64), small.u32(64), small.u64(64)) == (0x0201, 0x04030201, 0x0807060504030201)


def test_host_address_points_at_the_same_bytes(small):
    assert small.host_address(0x2000, 16) == small.regions[0].address + 0x2000


edges = st.sampled_from([0, LOW_RAM_END, HIGH_RAM_START, HIGH_RAM_START + HIGH, 1 << 63, (1 << 64) - 1])
addresses = st.builds(lambda edge, near: edge + near, edges, st.integers(-4096, 4096)) | st.integers(0, (1 << 64) - 1)


@given(gpa=addresses, size=st.integers(0, 8192))
def test_a_range_is_ram_if_one_region_has_all_of_it(split, gpa, size):
    inside = (gpa >= 0 and gpa + size <= LOW_RAM_END) or (
        gpa >= HIGH_RAM_START and gpa + size <= HIGH_RAM_START + HIGH
    )
    if inside:
        assert len(split.view(gpa, size)) == size
        base = 0 if gpa <= LOW_RAM_END else 1
        region = split.regions[base]
        assert split.host_address(gpa, size) == region.address + gpa - region.gpa
    else:
        for access in (split.view, split.host_address, split.read):
            with pytest.raises(BadGuestAddress, match="is not RAM"):
                access(gpa, size)
