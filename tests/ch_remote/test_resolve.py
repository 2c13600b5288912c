"""`ch-remote migration-resolve`: one of two flags, and the body that says so."""

from __future__ import annotations

import json
import os
import pty
import threading
from pathlib import Path

import pytest

from ch_remote.main import main
from tests.ch_remote.server import Server, reply, run
from tests.vmm import read_until


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_resolution_is_one_request(server: Server, where: str) -> None:
    assert run(server, "migration-resolve", f"--{where}") == 0
    assert json.loads(server.bodies[0]) == {"guest": where}
    assert server.heads[0].startswith("PUT /api/v1/vm.migration-resolve ")


@pytest.mark.parametrize("flags", [[], ["--here", "--there"]])
def test_here_or_there_must_be_said(tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["--api-socket", str(tmp_path / "none"), "migration-resolve", *flags]) == 1
    assert "either --here or --there" in capfd.readouterr().err


def test_a_send_draws_its_progress_on_a_terminal(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the answer comes; what the terminal shows is asked of the VMM over a connection of its own."""
    seen = threading.Event()
    answers = {"PUT": b"", "GET": reply(b'{"state":"ongoing","phase":"listening","direction":"receive"}')}

    def handler(head: str, _body: bytes) -> bytes:
        if head.startswith("GET"):
            seen.set()
        else:
            seen.wait(20)
        return answers[head[:3]] or reply(b"", "204 No Content")

    server.handler = handler
    ours, theirs = pty.openpty()
    monkeypatch.setattr("sys.stderr", os.fdopen(theirs, "w"))
    assert run(server, "receive-migration", "unix:/x") == 0
    read_until(ours, lambda shown: b"listening" in shown and shown.endswith(b"\033[K"))
    os.close(ours)
