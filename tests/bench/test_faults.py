"""bench.faults: when a stall is over, and where the peer's daemon says what it says."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import faults
from bench.errors import BenchError
from bench.faults import Daemon, answered, reported
from bench.recorder import Recorder
from guest.lines import BlkOk

SECONDS = 20.0
LISTENING = """#!/usr/bin/env python3
import socket, sys, time
print("a word on stdout", flush=True)
print("a word on stderr", file=sys.stderr, flush=True)
path = sys.argv[-1].partition("addr.path=")[2].partition(",")[0]
listening = socket.socket(socket.AF_UNIX)
listening.bind(path)
listening.listen()
time.sleep(60)
"""
FAILING = "#!/bin/sh\necho no such export >&2\nexit 3\n"


class Guest:
    """Its serial port. `report(us)`: the longest request since the last report."""

    def __init__(self) -> None:
        self.read, self._write = os.pipe()

    def report(self, recent_us: int) -> None:
        os.write(self._write, f"blk ok 1 written=1 ops=1 longest_us=0 recent_us={recent_us}\n".encode())

    def close(self) -> None:
        os.close(self._write)
        os.close(self.read)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def test_a_stall_is_over_when_the_request_that_waited_is_reported(guest: Guest) -> None:
    """And not with one of the reports that come while it waits, however long after the fault."""
    with Recorder() as recorder:
        recorder.add(guest.read, "guest")
        guest.report(300)
        recorder.until(lambda heard: isinstance(heard.event, BlkOk), SECONDS, "report")
        began = time.monotonic()
        stalled, over = threading.Event(), threading.Event()

        def goes_on() -> None:
            for _ in range(12):
                guest.report(0)
                time.sleep(faults.REPORT_MS / 1000)
            stalled.set()
            guest.report(1_200_000)
            while not over.wait(faults.REPORT_MS / 1000):
                guest.report(400)

        thread = threading.Thread(target=goes_on)
        thread.start()
        try:
            done = answered(recorder, began, SECONDS)
            assert stalled.is_set() and done - began > 12 * faults.REPORT_MS / 1000
            assert reported(recorder, SECONDS, BlkOk, began, done) == (0.3, 1200.0)
        finally:
            over.set()
            thread.join()


def test_the_stall_of_the_fault_before_is_not_taken_for_this_one(guest: Guest) -> None:
    with Recorder() as recorder:
        recorder.add(guest.read, "guest")
        guest.report(1_200_000)
        recorder.until(lambda heard: isinstance(heard.event, BlkOk), SECONDS, "report")
        began = time.monotonic()
        guest.report(0)
        with pytest.raises(BenchError, match="no report of a request that waited"):
            answered(recorder, began, 0.2)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "daemon"
    monkeypatch.setattr(faults, "DAEMON", str(path))
    return path


def test_the_daemons_words_do_not_get_into_the_benchs_own(
    program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program.write_text(LISTENING.replace("/usr/bin/env python3", sys.executable))
    program.chmod(0o755)
    daemon = Daemon(tmp_path)
    for _ in range(2):
        daemon.start(SECONDS)
        daemon.kill()
    daemon.socket.unlink()
    assert capfd.readouterr() == ("", "")


def test_a_daemon_that_ends_is_not_waited_for_and_its_words_are_the_reason(program: Path, tmp_path: Path) -> None:
    program.write_text(FAILING)
    program.chmod(0o755)
    with pytest.raises(BenchError, match="ended with 3; no such export"):
        Daemon(tmp_path).start(SECONDS)
