"""shared.atomics: the three operations, and that a race of processes has one winner."""

from __future__ import annotations

import os

from shared.atomics import cas32, load32, store32
from shared.linux import memfd, mmap_fd, munmap

PAGE = 4096


def test_operations_touch_one_word():
    fd = memfd("atomics", PAGE)
    address = mmap_fd(fd, PAGE)
    store32(address + 4, 0xFFFF_FFFF)
    assert (load32(address), load32(address + 4), load32(address + 8)) == (0, 0xFFFF_FFFF, 0)
    assert cas32(address + 4, 1, 2) == 0xFFFF_FFFF
    assert load32(address + 4) == 0xFFFF_FFFF
    assert cas32(address + 4, 0xFFFF_FFFF, 2) == 0xFFFF_FFFF
    assert load32(address + 4) == 2
    munmap(address, PAGE)
    os.close(fd)


def test_each_of_many_swaps_has_exactly_one_winner_among_processes():
    """Four processes count by compare-and-swap: not one increment is lost."""
    rounds, workers = 2000, 4
    fd = memfd("atomics", PAGE)
    address = mmap_fd(fd, PAGE)
    children = []
    for _ in range(workers):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for _ in range(rounds):
                    seen = load32(address)
                    while (found := cas32(address, seen, seen + 1)) != seen:
                        seen = found
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * workers
    assert load32(address) == rounds * workers
    munmap(address, PAGE)
    os.close(fd)
