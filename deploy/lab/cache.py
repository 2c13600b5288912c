"""Results of recipes, under the cache folder, named by a hash of everything that they are made from.

A result is built aside and appears by one rename, so a run that is killed leaves nothing half. Several checkouts
share the folder: each uses the results of its own recipes; what nobody used for two weeks goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.install import cache_folder, digest

UNUSED_DAYS = 14

__all__ = ["digest", "lab_folder", "made", "result", "say"]


def say(text: str) -> None:
    sys.stderr.write(f"lab: {text}\n")  # in one piece: two recipes may run side by side
    sys.stderr.flush()


def lab_folder() -> Path:
    folder = cache_folder() / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def result(name: str, key: str) -> Path:
    """Where a result is or will be: `name` with its key before the suffix."""
    stem, dot, suffix = name.partition(".")
    return lab_folder() / f"{stem}-{key}{dot}{suffix}"


def made(name: str, key: str, build: Callable[[Path], None], says: str) -> Path:
    """A result, built by `build(path)` if it is not there yet. `path` is a file or a folder yet to be made."""
    path = result(name, key)
    if path.exists():
        os.utime(path)
        return path
    with _locked(lab_folder() / f".{name}.lock"):
        if path.exists():  # another run built it while this one waited
            return path
        began = time.monotonic()
        say(says)
        with tempfile.TemporaryDirectory(prefix="tmp.", dir=lab_folder()) as work:
            fresh = Path(work, path.name)
            build(fresh)
            _give_to_caller(fresh)
            os.rename(fresh, path)
        say(f"{name} is ready ({time.monotonic() - began:.0f} s)")
        _forget_unused(name, path)
    return path


def _give_to_caller(path: Path) -> None:
    """Under sudo, the result belongs to who called it (what is inside an image keeps its owners)."""
    if os.geteuid() == 0 and "SUDO_UID" in os.environ:
        uid, gid = int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])
        for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
            os.chown(each, uid, gid, follow_symlinks=False)


def _forget_unused(name: str, keep: Path) -> None:
    stem, _, suffix = name.partition(".")
    for path in lab_folder().glob(f"{stem}-*" + (f".{suffix}" if suffix else "")):
        if path != keep and time.time() - path.lstat().st_mtime > UNUSED_DAYS * 86400:
            say(f"removing {path.name}, unused for {UNUSED_DAYS} days")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run builds {path.name.strip('.').removesuffix('.lock')}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
