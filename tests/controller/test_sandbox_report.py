"""controller.sandbox_report: what /proc says of real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from controller.sandbox_report import look, rows

CODE = """
import ctypes, os, resource, sys
libc = ctypes.CDLL(None)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
assert libc.prctl(38, 1, 0, 0, 0) == 0
if os.geteuid() == 0:
    assert libc.unshare(0x4000000) == 0
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.communicate()


def test_our_own_process_differs_from_itself_in_nothing():
    found = look(os.getpid())
    assert found["namespaces"] == [] and found["root"] == "shared" and found["uid"] == os.geteuid()
    assert found["seccomp"] == "none" and found["filters"] == 0 and found["descriptors"] > 2


def test_what_a_process_has_given_up_is_seen(child):
    found = look(child.pid)
    assert found["no_new_privs"] is True
    assert (found["open_files"], found["core"]) == (100, 0)
    assert found["descriptors"] == len(os.listdir(f"/proc/{child.pid}/fd"))
    assert found["namespaces"] == (["uts"] if os.geteuid() == 0 else [])


def test_a_process_that_has_ended_leaves_a_row_without_claims():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert rows([("blk", "_disk0", process.pid)]) == [
        {"kind": "blk", "device": "_disk0", "pid": process.pid}
    ]


def test_rows_are_sorted_by_kind_and_device():
    pid = os.getpid()
    found = rows([("net", "_net1", pid), ("blk", "_disk1", pid), ("blk", "_disk0", pid)])
    assert [row["device"] for row in found] == ["_disk0", "_disk1", "_net1"]
