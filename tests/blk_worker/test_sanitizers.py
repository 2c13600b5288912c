"""The native loop built with sanitizers, under the storm of stress.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared import native
from tests.blk_worker.rig import image
from tests.blk_worker.stress import SECTORS

FLAGS = {
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-fsanitize=thread", "-Wno-tsan"),
}
# Python itself leaks by ASan's book, and a leak of ours would show as growth elsewhere.
ASAN_OPTIONS = "detect_leaks=0"
# All that is copied by memcpy is guest memory, which Python, the driver here, orders by means that TSan can't see.
SUPPRESSIONS = "race_top:memcpy\n"


@pytest.mark.parametrize("name", FLAGS)
def test_storm(name: str, tmp_path: Path) -> None:
    root = Path(native.ROOT)
    library = tmp_path / "blk.so"
    flags = [flag for flag in native.LOOPS["blk"].cflags if flag != "-O2"]
    subprocess.run(
        ["gcc", *native.WARNINGS, *flags, "-O1", "-g", *FLAGS[name], "-o", library, "blk_worker/blk.c"],
        cwd=root, check=True,
    )  # fmt: skip
    runtime = subprocess.run(
        ["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    suppressions = tmp_path / "suppressions"
    suppressions.write_text(SUPPRESSIONS)
    options = {"ASAN_OPTIONS": ASAN_OPTIONS, "TSAN_OPTIONS": f"suppressions={suppressions}"}
    disk = image(tmp_path / "disk.raw", SECTORS)
    done = subprocess.run(
        ["setarch", "-R", sys.executable, "-m", "tests.blk_worker.stress", library, disk, "2"],
        cwd=root, env={**os.environ, "LD_PRELOAD": runtime, **options}, capture_output=True, text=True,
        timeout=55, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Sanitizer:" not in done.stderr, done.stderr[-6000:]
    assert int(done.stdout) > 100
