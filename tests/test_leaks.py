"""The leak check itself: what it must find, and what it must not mistake for a leak."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests import leaks

ORPHAN = "sh -c 'sleep 1000 > /dev/null & echo $! $$; exec sleep 1000 > /dev/null' &"


def test_process_of_a_process_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE", 0.1)
    before = leaks.Snapshot.take(tmp_path)
    pids = subprocess.run(["sh", "-c", ORPHAN], check=True, stdout=subprocess.PIPE, timeout=30).stdout.split()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{int(pid)}/cmdline").read_bytes() != b"sleep\x001000\x00" for pid in pids):
        assert time.monotonic() < end
    lines = leaks.find(before, None)
    assert len([line for line in lines if "sleep 1000" in line]) == 2
    assert not leaks.descendants() - before.processes


def test_orphan_that_ends_by_itself_is_no_leak(tmp_path: Path) -> None:
    before = leaks.Snapshot.take(tmp_path)
    subprocess.run(["sh", "-c", "sleep 0.2 &"], check=True)
    assert leaks.find(before, None) == []


@pytest.mark.parametrize("pid", [0, -1])
def test_signal_for_a_group_of_processes_is_refused(pid: int) -> None:
    with pytest.raises(AssertionError, match="whole group"):
        os.kill(pid, 0)


def test_shared_memory_name_is_found_and_removed(tmp_path: Path) -> None:
    before = leaks.Snapshot.take(tmp_path)
    (leaks.SHM / "forgotten").touch()
    assert leaks.find(before, None) == ["shared memory name /dev/shm/forgotten"]
    assert not (leaks.SHM / "forgotten").exists()


def test_socket_file_is_found_and_removed(tmp_path: Path) -> None:
    before = leaks.Snapshot.take(tmp_path / "no-such-folder")
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    assert leaks.find(before, tmp_path) == [f"socket file {path}"]
    assert not path.exists()


def test_runtime_folder_is_found(tmp_path: Path) -> None:
    before = leaks.Snapshot.take(tmp_path)
    os.mkdir(tmp_path / "vm")
    assert leaks.find(before, None) == [f"runtime folder {tmp_path / 'vm'}"]


def test_places_are_those_of_a_process_and_of_all_below_it() -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE)
    assert shell.stdout is not None
    child = int(shell.stdout.readline())
    try:
        end = time.monotonic() + 20
        while f"{child} (sleep: sleep 1000): {child} S " not in (told := leaks.places(shell.pid)):
            assert time.monotonic() < end, told
        assert len(told.splitlines()) == 2 and f"{shell.pid} (sh: sh -c" in told
    finally:
        os.kill(child, signal.SIGKILL)
        shell.communicate(timeout=20)
