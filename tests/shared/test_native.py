"""The build table of the native loops: built once, again after a change, and with gcc's words when it fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from shared import native
from shared.errors import HostError


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source tree with one loop, `answer`; the path is that of its source."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "worker").mkdir()
    (tmp_path / "shared" / "value.h").write_text("#define VALUE 42\n")
    source = tmp_path / "worker" / "answer.c"
    source.write_text('#include "value.h"\nint answer(void);\nint answer(void) { return VALUE; }\n')
    flags = ("-O2", "-fPIC", "-shared", "-Ishared")
    monkeypatch.setattr(native, "ROOT", str(tmp_path))
    monkeypatch.setattr(native, "LOOPS", {"answer": native.Loop("worker/answer.c", "worker/answer.so", flags)})
    return source


def test_build_runs_gcc_once_and_load_gives_the_library(loop: Path) -> None:
    assert [native.build("answer", native.ROOT), native.build("answer", native.ROOT)] == [True, False]
    assert native.load("answer").answer() == 42


def test_changed_header_is_built_again(loop: Path) -> None:
    native.build("answer", native.ROOT)
    (loop.parent.parent / "shared" / "value.h").write_text("#define VALUE 43\n")
    assert native.build("answer", native.ROOT)


def test_failing_gcc_is_quoted_and_the_old_library_stays(loop: Path) -> None:
    native.build("answer", native.ROOT)
    loop.write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(HostError, match="nothing"):
        native.build("answer", native.ROOT)
    assert sorted(os.listdir(loop.parent)) == ["answer.c", "answer.so", "answer.so.stamp"]


def test_warning_is_an_error(loop: Path) -> None:
    loop.write_text("int answer(void);\nint answer(void) { int unused; return 1; }\n")
    with pytest.raises(HostError, match="unused"):
        native.build("answer", native.ROOT)


def test_no_gcc_is_said_with_the_packages_to_install(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(loop.parent))
    with pytest.raises(HostError, match="apt-get install gcc"):
        native.build("answer", native.ROOT)


def test_missing_library_names_setup(loop: Path) -> None:
    with pytest.raises(HostError, match=r"worker/answer\.so.*deploy/setup\.sh"):
        native.load("answer")


def test_vcpu_loop_calls_no_library(tmp_path: Path) -> None:
    native.build("vcpu", str(tmp_path))
    command: list[str | Path] = ["nm", "--undefined-only", "--dynamic", tmp_path / native.LOOPS["vcpu"].library]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
