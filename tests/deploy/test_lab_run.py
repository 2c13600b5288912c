"""deploy.lab.run: what a job leaves behind comes back, or is said to be missing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from deploy.lab.machine import Verdict, waited_for_cpu
from deploy.lab.run import _summary, collect


def archive(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 5000
            tar.addfile(entry, io.BytesIO(bytes(5000)))


def test_files_come_back_and_none_outside_the_folder(tmp_path: Path) -> None:
    archive(tmp_path / "out.tar", "./report", "folder/zeros", "../outside", "/absolute")
    collect(tmp_path / "out.tar", tmp_path / "out")
    back = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert back == ["out.tar", "out/folder/zeros", "out/report"]


@pytest.mark.parametrize("size", [0, 700, 4000])
def test_archive_that_did_not_come_whole_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    archive(tmp_path / "whole", "report")
    (tmp_path / "out.tar").write_bytes((tmp_path / "whole").read_bytes()[:size])
    collect(tmp_path / "out.tar", tmp_path / "out")
    assert "$OUT did not come back whole: " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_time_without_a_cpu_is_counted_and_told_where_it_is_much() -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    busy = ["taskset", "-c", cpu, sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(busy) as one, subprocess.Popen(busy) as two:
        try:
            end = time.monotonic() + 30
            while not (waited := waited_for_cpu(one.pid)):
                assert time.monotonic() < end, "two that never rest on one CPU, and none has waited for it"
        finally:
            one.kill()
            two.kill()
    assert 0 < waited < 30
    assert "kept it from a CPU for 12 s" in _summary(Verdict(code=0, waited=12.0), 1.0, 100.0)
    assert "CPU" not in _summary(Verdict(code=0, waited=9.0), 1.0, 100.0)
