"""The native loops: what they are made of, how gcc builds them, how ctypes loads them.

Each is one plain shared object beside its source, without Python.h, so gcc and the C library's headers are all
that a build needs. `build` does nothing when the object was made from the same sources with the same flags;
`load` sits on the boot path and imports nothing but os and ctypes.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final, NamedTuple

from shared.errors import HostError

ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

WARNINGS: Final = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")


class Loop(NamedTuple):
    """One native loop; paths are relative to the root of the source tree."""

    source: str
    library: str
    cflags: tuple[str, ...]


LOOPS: Final[dict[str, Loop]] = {
    # Runs in a CLONE_VM child on the parent's TLS: no libc, no stack protector, and --no-undefined, so that a
    # call which gcc made up (memcpy, memset) fails the build and not the guest.
    "vcpu": Loop(
        "vcpu_worker/vcpu.c",
        "vcpu_worker/vcpu.so",
        (
            *("-O2", "-ffreestanding", "-nostdlib", "-fno-stack-protector", "-fPIC", "-shared"),
            *("-fvisibility=hidden", "-Wl,--no-undefined"),
        ),
    ),
    "blk": Loop("blk_worker/blk.c", "blk_worker/blk.so", ("-O2", "-fPIC", "-shared", "-pthread", "-Ishared")),
    "net": Loop("net_worker/net.c", "net_worker/net.so", ("-O2", "-fPIC", "-shared", "-pthread", "-Ishared")),
    # Three instructions for words in shared memory. Not atomics.so: Python would take that for the module atomics.
    "atomics": Loop(
        "shared/atomics.c",
        "shared/libatomics.so",
        ("-O2", "-ffreestanding", "-nostdlib", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,--no-undefined"),
    ),
}


def load(name: str) -> ctypes.CDLL:
    """Load a native loop. Raises HostError when it was never built."""
    path = os.path.join(ROOT, LOOPS[name].library)
    try:
        return ctypes.CDLL(path, use_errno=True)
    except OSError as error:
        raise HostError(f"cannot load the native loop {path}: {error}", "run bash deploy/setup.sh") from error


def available() -> list[str]:
    """The loops whose source is in this tree."""
    return [name for name, loop in LOOPS.items() if os.path.exists(os.path.join(ROOT, loop.source))]


def build(name: str, root: str = ROOT) -> bool:
    """Compile a loop into `root` (a wheel is built outside the source tree). True when gcc had to run.

    Raises HostError with gcc's own words when it fails, and when there is no gcc.
    """
    import subprocess

    loop = LOOPS[name]
    library = os.path.join(root, loop.library)
    stamp = library + ".stamp"
    wanted = _fingerprint(loop)
    if os.path.exists(library) and _read(stamp) == wanted.encode():
        return False
    os.makedirs(os.path.dirname(library), exist_ok=True)
    # Built aside and renamed: a VMM that runs keeps its mapping, two builds at once do no harm.
    fresh = f"{library}.{os.getpid()}"
    command = ["gcc", *WARNINGS, *loop.cflags, "-o", fresh, loop.source]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise HostError(f"cannot build {loop.library}: no gcc", "apt-get install gcc libc6-dev") from error
    if done.returncode:
        raise HostError(f"gcc failed on {loop.source}:\n{done.stderr}")
    os.replace(fresh, library)
    with open(f"{fresh}.stamp", "w") as file:
        file.write(wanted)
    os.replace(f"{fresh}.stamp", stamp)
    return True


def _fingerprint(loop: Loop) -> str:
    """A hash over everything that the object depends on: flags, source, and the headers it may include."""
    import hashlib

    digest = hashlib.sha256(repr(loop).encode())
    for folder in sorted({os.path.dirname(loop.source), "shared"}):
        for name in sorted(os.listdir(os.path.join(ROOT, folder))):
            path = os.path.join(folder, name)
            if name.endswith(".h") or path == loop.source:
                digest.update(path.encode() + b"\0" + _read(os.path.join(ROOT, path)))
    return digest.hexdigest()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""
