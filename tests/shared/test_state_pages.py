"""shared.state_pages: shared with children, without a name."""

from __future__ import annotations

import os

import pytest

from shared.errors import HostError
from shared.state_pages import allocate


def test_pages_start_as_zeros_and_are_shared_with_a_child():
    pages = allocate(8192)
    assert len(pages) == 8192 and pages[:] == bytes(8192)
    child = os.fork()
    if child == 0:
        pages[5000] = 42
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pages[5000] == 42
    pages.close()


def test_no_name_is_left_for_anybody_to_find():
    before = os.listdir("/dev/shm")
    pages = allocate(4096)
    assert os.listdir("/dev/shm") == before
    pages.close()


def test_two_allocations_are_two_memories():
    one, two = allocate(4096), allocate(4096)
    one[0] = 1
    assert two[0] == 0
    one.close()
    two.close()


def test_what_the_host_has_not_got_is_an_error_that_leaves_no_name():
    before = os.listdir("/dev/shm")
    with pytest.raises(HostError, match="/dev/shm has no room"):
        allocate(1 << 62)
    assert os.listdir("/dev/shm") == before
