"""`ch-remote fleet --watch`: the table again and again, to a pipe and to a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.ch_remote.server import Server, reply, run
from tests.vmm import REMOTE, environment, read_until

ROW = {"kind": "blk", "device": "_disk0", "pid": 7, "state": "running"}
TABLE = "KIND  DEVICE  PID  STATE\nblk   _disk0  7    {}\n"


def body(state: str) -> bytes:
    return reply(json.dumps([{**ROW, "state": state}]).encode())


def test_each_change_is_printed_and_the_end_of_the_vmm_ends_it(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = iter([body("running"), body("running"), body("restarting")])

    def answer(head: str, _: bytes) -> bytes:
        try:
            return next(answers)
        except StopIteration:
            server.path.unlink()
            return b""

    server.handler = answer
    server.close_after = True
    assert run(server, "fleet", "--watch") == 0
    out, err = capfd.readouterr()
    assert out == TABLE.format("running") + "\n" + TABLE.format("restarting")
    assert err == "The VMM has ended.\n"


def test_api_process_that_dies_does_not_end_it(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    answers = iter([body("running"), b"", body("restarting"), reply(b'["no"]', "500 Internal Server Error")])
    server.handler = lambda head, _: next(answers)
    server.close_after = True
    assert run(server, "fleet", "--watch") == 1
    assert capfd.readouterr().out == TABLE.format("running") + "\n" + TABLE.format("restarting")


def test_refusal_ends_it_with_an_error(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.handler = lambda head, _: reply(b'["no"]', "500 Internal Server Error")
    assert run(server, "fleet", "--watch") == 1
    assert "no" in capfd.readouterr().err


def test_terminal_shows_one_table_in_place_until_ctrl_c(server: Server) -> None:
    states = iter(["running", "degraded"])
    server.handler = lambda head, _: body(next(states, "degraded"))
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", REMOTE, f"--api-socket={server.path}", "fleet", "--watch"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    try:
        shown = read_until(ours, lambda shown: shown.count(b"\x1b[H\x1b[J") >= 2 and b"degraded" in shown)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert shown.index(b"running") < shown.index(b"degraded")
