"""controller.upgrade: what a request has to say, and which workers it can be about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controller.upgrade import DONE_SECONDS, READY_SECONDS, Wanted, parse
from shared.errors import ConfigError


def refusal(body: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        parse(body)
    return str(raised.value)


def test_defaults() -> None:
    assert parse({"id": "_disk0"}) == Wanted("_disk0", "", READY_SECONDS, DONE_SECONDS)
    assert parse({"id": "_disk0", "exec": None, "timeout_ms": 10}) == Wanted("_disk0", "", 0.01, 0.01)


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_body_that_is_no_object(body: Any) -> None:
    assert "not an object" in refusal(body)


@pytest.mark.parametrize("name", [None, "", 5, ["_disk0"]])
def test_id_that_is_none(name: Any) -> None:
    assert "id is missing" in refusal({"id": name})


def test_unknown_field() -> None:
    assert "unknown field path (known: id, exec, timeout_ms)" in refusal({"id": "_disk0", "path": "/x"})


@pytest.mark.parametrize("ms", [0, -1, 9, 600_001, "10", 1.5, True])
def test_time_limit_that_is_none(ms: Any) -> None:
    assert "timeout_ms" in refusal({"id": "_disk0", "timeout_ms": ms})


@pytest.mark.parametrize("path", [5, "", "worker", "./worker", "/a\0b"])
def test_path_that_is_not_absolute(path: Any) -> None:
    assert "is no absolute path" in refusal({"id": "_disk0", "exec": path})


def test_path_that_no_file_can_have() -> None:
    assert "is no file name" in refusal({"id": "_disk0", "exec": "/a\ud800"})


def test_path_that_is_missing() -> None:
    assert "exec: /nobody/there: No such file or directory" in refusal({"id": "_disk0", "exec": "/nobody/there"})


def test_path_of_a_folder(tmp_path: Path) -> None:
    assert f"exec: {tmp_path} is no file" in refusal({"id": "_disk0", "exec": str(tmp_path)})


def test_path_that_is_not_executable(tmp_path: Path) -> None:
    path = tmp_path / "worker"
    path.write_text("#!/bin/true\n")
    assert f"exec: {path} is not executable" in refusal({"id": "_disk0", "exec": str(path)})
    path.chmod(0o755)
    assert parse({"id": "_disk0", "exec": str(path)}).program == str(path)
