"""shared.worker_program: a task that can't be read ends the program with a reason, and nothing has been done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from shared.errors import ConfigError, ProtocolError
from shared.worker_program import ENVIRONMENT, read_task
from tests.vmm import PROGRAM, environment


def task(value: Any) -> list[str]:
    fd = os.memfd_create("task")
    os.write(fd, value if isinstance(value, bytes) else json.dumps(value).encode())
    return [f"--task={fd}"]


def test_a_task_is_read_and_its_descriptor_closed() -> None:
    (argument,) = task({"contract": 1, "kind": "blk"})
    assert read_task([argument]) == {"contract": 1, "kind": "blk"}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(int(argument.removeprefix("--task=")))


@pytest.mark.parametrize("arguments", [[], ["--task="], ["--task=x"], ["--task=-1"], ["--fd=3"], ["--task=3", "more"]])
def test_arguments_that_name_no_task(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="worker-upgrade --exec"):
        read_task(arguments)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe"])
def test_text_that_is_no_task(text: bytes) -> None:
    (argument,) = task(text)
    with pytest.raises(ConfigError, match="has no task"):
        read_task([argument])


@pytest.mark.parametrize("value", [[], 5, {}, {"contract": 2}, {"contract": "1"}])
def test_task_of_another_contract(value: Any) -> None:
    with pytest.raises(ProtocolError, match=r"a task of contract .*, this program has contract 1"):
        read_task(task(value))


def test_descriptor_that_is_none() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "worker", "--task=99"], capture_output=True, text=True, env=environment(),
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "worker --task=99: this descriptor has no task" in done.stderr


def test_nothing_of_this_releases_environment_is_passed_on() -> None:
    assert not [name for name in ENVIRONMENT if name.startswith(("PYTHON", "LD_", "FLOTILLA"))]
