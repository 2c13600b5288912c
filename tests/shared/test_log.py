"""shared.log: the lines as they arrive at a descriptor."""

from __future__ import annotations

import os
import re
import select
import time
from types import SimpleNamespace

import pytest

from shared import log
from shared.log import Level


class Sink:
    """A pipe in packet mode: every read gives what one write(2) brought."""

    def __init__(self):
        self.read_end, self.write_end = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)

    def writes(self):
        found = []
        try:
            while True:
                found.append(os.read(self.read_end, 65536).decode())
        except BlockingIOError:
            return found


@pytest.fixture
def sink():
    before = log._level, log._fd, log._thread, log._began
    made = Sink()
    log.configure(Level.TRACE, made.write_end, "_disk0", time.monotonic() - 5)
    yield made
    log._level, log._fd, log._thread, log._began = before
    os.close(made.read_end)
    os.close(made.write_end)


def test_line_has_cloud_hypervisors_shape(sink, monkeypatch):
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: log._began + 5.25))
    log.warn("the disk is full")
    (line,) = sink.writes()
    assert re.fullmatch(
        r"cloud-hypervisor: 5\.250000s: <_disk0> WARN:shared/test_log\.py:\d+ -- the disk is full\n", line
    )


def test_each_line_is_one_write(sink):
    for number in range(10):
        log.info(f"line {number}")
    assert [line.rsplit(" ", 1)[1] for line in sink.writes()] == [f"{number}\n" for number in range(10)]


WRITERS = {
    Level.ERROR: log.error, Level.WARN: log.warn, Level.INFO: log.info, Level.DEBUG: log.debug, Level.TRACE: log.trace,
}  # fmt: skip


@pytest.mark.parametrize("level", Level)
def test_a_level_lets_through_itself_and_what_is_graver(sink, level):
    log.configure(level, sink.write_end, "vmm")
    for write in WRITERS.values():
        write("text")
    names = [re.search(r"> (\w+):", line)[1] for line in sink.writes()]
    assert names == [at.name for at in Level if at <= level]


def test_set_level_by_name_and_its_refusal(sink):
    log.set_level("error")
    log.warn("not said")
    log.error("said")
    assert len(sink.writes()) == 1
    with pytest.raises(ValueError, match="log level 'loud': one of error, warn, info, debug, trace"):
        log.set_level("loud")


def test_a_child_process_gets_the_same_settings(sink):
    settings = log.settings()
    assert settings == {"level": int(Level.TRACE), "fd": sink.write_end, "began": log._began}


def test_a_log_that_is_gone_stops_nobody(sink):
    closed = os.dup(sink.write_end)
    os.close(closed)
    log.configure(Level.TRACE, closed)
    log.error("nobody hears this")


def test_a_log_that_is_full_stops_nobody(sink):
    for _ in range(3000):
        log.error("x" * 100)
    assert sink.writes()


def test_what_cannot_be_encoded_is_written_all_the_same(sink):
    log.error("a path \udcff")
    assert sink.writes()[0].endswith("a path \\udcff\n")


def test_text_of_others_makes_no_line_and_no_terminal_of_its_own(sink):
    log.warn("it said \ncloud-hypervisor: 1.0s: <vmm> INFO:x.py:1 -- all is well\r\x1b[2J\x9b2J")
    (line,) = sink.writes()
    assert line.endswith(
        "-- it said \\ncloud-hypervisor: 1.0s: <vmm> INFO:x.py:1 -- all is well\\r\\x1b[2J\\x9b2J\n"
    )


def test_text_is_cut_and_what_follows_it_is_not(sink):
    log.error("x" * 100_000, "Traceback:\n  File x\ncloud-hypervisor: \x1b[2J")
    (line,) = sink.writes()
    first, *more = line.splitlines()
    assert first.endswith("-- " + "x" * log.MAX_TEXT + "…")
    assert more == ["    Traceback:", "      File x", "    cloud-hypervisor: \\x1b[2J"]


@pytest.fixture
def full_pipe():
    """The read end of a pipe without room, which is the log. The descriptor blocks, as standard error of a program in a
    pipeline does."""
    read_end, write_end = os.pipe()
    log.configure(Level.ERROR, write_end)
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, bytes(select.PIPE_BUF))
    os.set_blocking(write_end, True)
    yield read_end
    log.configure(Level.WARN)
    os.close(read_end)
    os.close(write_end)


def test_pipe_that_nobody_reads_loses_lines_stops_nobody_and_says_so_afterwards(full_pipe):
    log.error("one")
    log.error("two")
    os.read(full_pipe, 1 << 20)
    log.error("three")
    assert os.read(full_pipe, 65536).decode().endswith("-- three (2 lines before this one were lost)\n")


def test_line_that_is_longer_than_what_a_pipe_has_room_for_stops_nobody(full_pipe):
    os.read(full_pipe, select.PIPE_BUF)  # room for one
    log.error("a bug", "a line of its traceback\n" * 1000)
    os.read(full_pipe, 1 << 20)
    log.error("three")
    assert os.read(full_pipe, 65536).decode().endswith("-- three (1 lines before this one were lost)\n")


def test_full_disk_under_the_log_stops_nobody_and_is_said_afterwards(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    path = tmp_path / "log"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        log.configure(Level.ERROR, full)
        log.error("one")
        os.dup2(file, full)
        log.error("two")
        assert path.read_text().endswith("-- two (1 lines before this one were lost)\n")
    finally:
        log.configure(Level.WARN)
        os.close(full)
        os.close(file)
