"""Builds the probe guest with gcc and ld into the user's cache, once per content of its sources.

`python -m guest.build` prints the path of the ELF.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

from shared.errors import HostError

SOURCES: Final = Path(__file__).resolve().parent

# Ring 3 code may use SSE; no red zone, because an interrupt that finds the CPU in the wait gate pushes onto the
# stack in use. The loop-pattern pass would turn memset's own loop into a call of memset.
CFLAGS: Final = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wshadow"),
    *("-ffreestanding", "-fno-pic", "-mcmodel=small", "-mno-red-zone", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns", "-fcf-protection=none"),
)
LDFLAGS: Final = (
    *("-nostdlib", "-static", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096"),
    "-Wl,--no-warn-rwx-segments",
)


def build() -> Path:
    """The path of an up-to-date probe.elf. Raises HostError when gcc is missing or fails."""
    if prebuilt().exists():
        return prebuilt()
    elf = cache_dir() / digest() / "probe.elf"
    if not elf.exists():
        elf.parent.mkdir(parents=True, exist_ok=True)
        _compile(elf)
    return elf


def prebuilt() -> Path:
    """Where a build of these very sources lies on a host without gcc (deploy/bundle.py puts it there)."""
    return SOURCES / f"probe-{digest()}.elf"


def cache_dir() -> Path:
    """Where the builds are kept, as the rest of Flotilla's cache."""
    flotilla = os.environ.get("FLOTILLA_CACHE")
    if flotilla:
        return Path(flotilla) / "guest"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "flotilla" / "guest"


def digest() -> str:
    """Of everything that decides what the ELF contains, but for the compiler's version."""
    stamp = hashlib.sha256(repr((CFLAGS, LDFLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".c", ".h", ".S", ".ld"):
            stamp.update(path.name.encode() + b"\0" + path.read_bytes())
    return stamp.hexdigest()[:16]


def _compile(elf: Path) -> None:
    """Into a private directory first: two builders at once both leave a whole file."""
    import subprocess

    inputs = sorted(str(path) for path in SOURCES.iterdir() if path.suffix in (".c", ".S"))
    with tempfile.TemporaryDirectory(dir=elf.parent, prefix=".build-") as scratch:
        output = Path(scratch) / "probe.elf"
        command = ["gcc", *CFLAGS, *LDFLAGS, f"-Wl,-T,{SOURCES / 'link.ld'}", "-o", str(output), *inputs]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise HostError("the probe guest needs gcc to be built", "install gcc and binutils") from error
        if done.returncode:
            raise HostError(f"gcc could not build the probe guest: {done.stderr.strip()}")
        os.replace(output, elf)


if __name__ == "__main__":
    print(build())
