"""`ch-remote worker-upgrade`: its arguments, and the request that they become."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ch_remote.main import main
from tests.ch_remote.server import Server, reply

ANSWER = b'{"old_pid":7,"new_pid":8}'


def asked(server: Server, *words: str) -> tuple[int, object]:
    server.handler = lambda _head, _body: reply(ANSWER)
    code = main([f"--api-socket={server.path}", "worker-upgrade", *words])
    return code, json.loads(server.bodies[-1])


def test_only_what_was_given_is_sent(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(server, "_disk0") == (0, {"id": "_disk0"})
    assert json.loads(capsys.readouterr().out) == {"old_pid": 7, "new_pid": 8}


@pytest.mark.parametrize("words", [["--exec", "/opt/next"], ["--exec=/opt/next"]])
def test_options_stand_anywhere(server: Server, words: list[str]) -> None:
    assert asked(server, *words, "_disk0") == (0, {"id": "_disk0", "exec": "/opt/next"})
    wanted = {"id": "_disk0", "exec": "/opt/next", "timeout_ms": 500}
    assert asked(server, "_disk0", "--timeout-ms=500", *words) == (0, wanted)


def test_path_is_relative_to_our_folder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert asked(server, "_disk0", "--exec", "next") == (0, {"id": "_disk0", "exec": os.path.join(tmp_path, "next")})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["worker-upgrade"], "<ID>"),
        (["worker-upgrade", "_disk0", "--exec"], "a value is required for '--exec'"),
        (["worker-upgrade", "_disk0", "--exec", "--timeout-ms"], "a value is required for '--exec'"),
        (["worker-upgrade", "_disk0", "--exec=/a", "--exec=/b"], "'--exec' cannot be used multiple times"),
        (["worker-upgrade", "_disk0", "more"], "unexpected argument 'more'"),
        (["pause", "--exec", "/a"], "unexpected argument '--exec' found for pause"),
    ],
)
def test_usage_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--api-socket=/nobody/there", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["soon", "²", "-1", "1_0"])
def test_time_limit_that_is_no_number(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--api-socket=/nobody/there", "worker-upgrade", "_disk0", f"--timeout-ms={limit}"]) == 1
    assert f"Unable to convert {limit} for --timeout-ms (expected a whole number)" in capsys.readouterr().err
