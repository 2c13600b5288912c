"""controller.runtime: where the VM's directory is, who removes it, and what a killed VM leaves to the next one."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest

from controller import runtime
from controller.locks import try_lock
from controller.runtime import RuntimeDir
from shared.errors import HostError


@pytest.fixture
def base(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setenv("FLOTILLA_RUNTIME_DIR", str(path))
    return path


def abandoned(base, name="vm.killed"):
    """What a VM leaves whose every process was killed: a lock file that nobody locks any more."""
    folder = base / name
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "vcpu0.1").touch()
    return folder


def test_directory_is_the_owners_alone_and_goes_with_its_last_vm(base):
    first, second = RuntimeDir(), RuntimeDir()
    assert first.path != second.path
    assert stat.S_IMODE(os.stat(first.path).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(base).st_mode) == 0o700
    first.close()
    assert os.listdir(base) == [os.path.basename(second.path)]
    second.close()
    assert not base.exists()


def test_close_removes_what_is_still_inside(base):
    directory = RuntimeDir()
    (base / os.path.basename(directory.path) / "_disk0.1").touch()
    directory.close()
    assert not base.exists()


def test_leftover_of_a_killed_vm_is_removed_at_the_next_start(base):
    left = abandoned(base)
    directory = RuntimeDir()
    assert not left.exists()
    directory.close()


def test_directory_of_a_living_vm_is_not_touched(base):
    living = RuntimeDir()
    RuntimeDir().close()
    assert os.path.exists(f"{living.path}/lock")
    living.close()


def test_a_directory_without_a_lock_file_may_be_one_that_is_being_made(base):
    young = base / "vm.young"
    young.mkdir(parents=True)
    runtime.sweep(str(base))
    assert young.exists()


@pytest.mark.parametrize("inside", [None, "precious"])
def test_an_empty_directory_that_has_been_without_a_lock_file_for_long_is_removed(base, inside):
    old = base / "vm.old"
    old.mkdir(parents=True)
    if inside is not None:
        (old / inside).touch()
    then = time.time() - 2 * runtime.UNLOCKED_SECONDS
    os.utime(old, (then, then))
    runtime.sweep(str(base))
    assert old.exists() == (inside is not None)


def test_a_directory_whose_lock_file_can_not_be_made_is_removed(base, monkeypatch):
    opened = os.open

    def full(path, *rest, **named):
        if str(path).endswith("/lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *rest, **named)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(HostError, match="No space left on device"):
        RuntimeDir()
    assert os.listdir(base) == []


def test_what_is_not_a_vms_is_not_touched(base):
    other = abandoned(base, "other")
    runtime.sweep(str(base))
    assert (other / "lock").exists()


def test_the_lock_is_held_as_long_as_the_directory_is_used(base):
    directory = RuntimeDir()
    fd = os.open(f"{directory.path}/lock", os.O_RDWR)
    assert not try_lock(fd, exclusive=True)
    directory.close()
    assert try_lock(fd, exclusive=True)
    os.close(fd)


def test_a_base_that_cannot_be_made_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOTILLA_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(HostError, match=f"runtime directory {tmp_path}/file: .*set FLOTILLA_RUNTIME_DIR"):
        RuntimeDir()


def test_order_of_the_places(monkeypatch):
    monkeypatch.setenv("FLOTILLA_RUNTIME_DIR", "/somewhere")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert runtime.root() == "/somewhere"
    monkeypatch.delenv("FLOTILLA_RUNTIME_DIR")
    assert runtime.root() == "/run/user/7/flotilla"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime.root() == "/run/flotilla" if os.geteuid() == 0 else runtime.root().endswith(f"-{os.geteuid()}")
