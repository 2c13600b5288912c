"""controller.locks: OFD locks between descriptions, duplicates and processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from controller.locks import holders, is_locked, try_lock, unlock


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    path.touch()
    return path


@pytest.fixture
def opened(image):
    """Opens the image anew each time: a description of its own."""
    fds = []

    def make(flags=os.O_RDWR):
        fds.append(os.open(image, flags | os.O_CLOEXEC))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def test_writers_exclude_each_other_and_readers(opened):
    one, two = opened(), opened()
    assert try_lock(one, exclusive=True)
    assert not try_lock(two, exclusive=True)
    assert not try_lock(two, exclusive=False)
    unlock(one)
    assert try_lock(two, exclusive=True)


def test_readers_share_and_keep_writers_out(opened):
    one, two, writer = opened(os.O_RDONLY), opened(os.O_RDONLY), opened()
    assert try_lock(one, exclusive=False) and try_lock(two, exclusive=False)
    assert not try_lock(writer, exclusive=True)


def test_is_locked_sees_others_but_not_its_own(opened):
    one, two = opened(), opened()
    assert not is_locked(two)
    try_lock(one, exclusive=True)
    assert is_locked(two)
    assert not is_locked(one)


def test_a_process_that_dies_with_a_duplicate_unlocks_nothing(opened):
    mine, other = opened(), opened()
    assert try_lock(mine, exclusive=True)
    worker = subprocess.Popen(["sleep", "60"], pass_fds=[mine])
    worker.kill()
    worker.wait()
    assert not try_lock(other, exclusive=True)


def test_the_last_duplicate_to_close_unlocks(image, opened):
    mine = os.open(image, os.O_RDWR)
    duplicate = os.dup(mine)
    other = opened()
    assert try_lock(mine, exclusive=True)
    os.close(mine)
    assert not try_lock(other, exclusive=True)
    os.close(duplicate)
    assert try_lock(other, exclusive=True)


def test_a_descriptor_that_cannot_be_locked_is_an_error_not_a_conflict(opened):
    with pytest.raises(OSError, match="Bad file descriptor"):
        try_lock(opened(os.O_RDONLY), exclusive=True)


def test_holders_names_the_other_process_and_not_ourselves(image, opened):
    fd = opened()
    code = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"open\n"
        assert [name for name in holders(fd) if name.endswith(f"(pid {holder.pid})")]
        assert not [name for name in holders(fd) if name.endswith(f"(pid {os.getpid()})")]
        holder.stdin.close()
    assert holders(fd) == []
