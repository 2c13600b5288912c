"""Native loops built with sanitizers, and programs run under them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shared import native

FLAGS = {
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-fsanitize=thread", "-Wno-tsan"),
}
# Python itself leaks by ASan's book, and a leak of ours would show as growth elsewhere.
ASAN_OPTIONS = "detect_leaks=0"
# All that is copied by memcpy is guest memory, which Python, the driver here, orders by means that TSan can't see.
SUPPRESSIONS = "race_top:memcpy\n"


def run_sanitized(loop: str, sanitizer: str, folder: Path, module: str, *arguments: object) -> str:
    """`python -m module LIBRARY ARGUMENTS` with a sanitized build of the loop; its standard output.

    AssertionError for an exit code but 0 and for anything that the sanitizer has to say.
    """
    root = Path(native.ROOT)
    library = folder / f"{loop}.so"
    flags = [flag for flag in native.LOOPS[loop].cflags if flag != "-O2"]
    source = native.LOOPS[loop].source
    subprocess.run(
        ["gcc", *native.WARNINGS, *flags, "-O1", "-g", *FLAGS[sanitizer], "-o", library, source], cwd=root, check=True
    )
    runtime = subprocess.run(
        ["gcc", f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    suppressions = folder / "suppressions"
    suppressions.write_text(SUPPRESSIONS)
    options = {"ASAN_OPTIONS": ASAN_OPTIONS, "TSAN_OPTIONS": f"suppressions={suppressions}"}
    done = subprocess.run(
        ["setarch", "-R", sys.executable, "-m", module, library, *map(str, arguments)],
        cwd=root, env={**os.environ, "LD_PRELOAD": runtime, **options}, capture_output=True, text=True,
        timeout=55, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Sanitizer:" not in done.stderr, done.stderr[-6000:]
    return done.stdout
