"""The C targets: one file each, with the product's source in it, built for libFuzzer or for replay.c."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from shared import native
from shared.errors import HostError

ROOT = Path(native.ROOT)
CLANG = "clang-14"
SANITIZE = ("-fno-sanitize-recover=undefined", "-O1", "-g", "-pthread", "-I.", "-Ishared", "-Itests/fuzz")
MAX_INPUT = 1024
# A leak of ours is one; what a fuzz target keeps for the next input is reachable. Out of memory is a finding.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


class Target(NamedTuple):
    name: str
    about: str

    @property
    def source(self) -> str:
        return f"tests/fuzz/{self.name}.c"


TARGETS = {
    target.name: target
    for target in (
        Target("vring", "shared/vring.h: a hostile driver's ring and a hostile inflight region"),
        Target("blk", "the block worker's ring thread on a file"),
        Target("net", "the network worker's thread on a socket in place of a TAP"),
        Target("pages", "shared/pages.c: a migration's page runs and bytes"),
        Target("vcpu", "exits that vcpu_worker/vcpu.c finishes itself"),
    )
}


def build_replay(target: Target, folder: Path) -> Path:
    """With gcc and replay.c as its main. Raises HostError with gcc's words."""
    program = folder / f"fuzz-{target.name}"
    _compile(["gcc", *native.WARNINGS, "-fsanitize=address,undefined", *SANITIZE, "-o", str(program), target.source,
              "tests/fuzz/replay.c"], target)  # fmt: skip
    return program


def build_libfuzzer(target: Target, folder: Path) -> Path:
    """With clang. Raises HostError."""
    program = folder / f"fuzz-{target.name}"
    flags = ["-std=gnu11", "-Wall", "-fsanitize=fuzzer,address,undefined", *SANITIZE]
    _compile([CLANG, *flags, "-o", str(program), target.source], target)
    return program


def _compile(command: list[str], target: Target) -> None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        hint = "bash deploy/fuzz.sh installs clang"
        raise HostError(f"cannot build {target.source}: no {command[0]}", hint) from error
    if done.returncode:
        raise HostError(f"{command[0]} failed on {target.source}:\n{done.stderr}")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **OPTIONS, **more}
