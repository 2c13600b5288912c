"""`--cgroup PATH`: a cgroup for each process of the fleet, below a directory of cgroup v2 that the user may write.

    PATH/flotilla-<pid of the controller>/controller, zygote, api, vcpu0, _disk0, …

What a process may use is for the user to say in those directories (cpu.max, memory.max; PATH/cgroup.subtree_control
says which controllers there are). A process is moved when its start is known here; the janitor goes back to where the
VMM came from, for it removes the directories after a kill -9.

Source: Linux Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import ctypes
import os

from shared import log
from shared.errors import ConfigError
from shared.linux import libc

CGROUP2_SUPER_MAGIC = 0x6367_7270
PREFIX = "flotilla-"
HINT = "give a directory of a cgroup v2 hierarchy that this user may write, such as /sys/fs/cgroup/NAME"


class Cgroups:
    """The directory of one VMM; `path` "" where there is none, and every call does nothing."""

    def __init__(self, base: str = "") -> None:
        """Remove what killed VMMs have left below `base`, make our own, and move in. Raises ConfigError."""
        self._base = os.path.abspath(base) if base else ""
        self.path = ""
        if not base:
            return
        what = f"--cgroup {base}"
        if not _is_cgroup2(self._base):
            raise ConfigError(f"{what}: not a directory of a cgroup v2 hierarchy", HINT)
        self.path = f"{self._base}/{PREFIX}{os.getpid()}"
        try:
            self._remove_stale()
            os.mkdir(self.path)
            self._move("controller", os.getpid())
        except OSError as error:
            remove(self.path)
            self.path = ""
            raise ConfigError(f"{what}: {error.strerror}", HINT) from error

    def enter(self, name: str, pid: int) -> None:
        """A process of this name runs as `pid` now. One that can't be moved stays where it is, with a warning."""
        if self.path:
            try:
                self._move(name, pid)
            except ProcessLookupError:
                pass  # it has ended: whoever waits for it sees that
            except OSError as error:
                log.warn(f"--cgroup: {name} (pid {pid}) stays outside: {error.strerror}")

    def _move(self, name: str, pid: int) -> None:
        os.makedirs(f"{self.path}/{name}", exist_ok=True)
        _write(f"{self.path}/{name}/cgroup.procs", pid)

    def leave(self, name: str) -> None:
        """The process of this name has been waited for."""
        if self.path:
            remove(f"{self.path}/{name}")

    def send_home(self, pid: int) -> None:
        """A process that is to outlive the directory."""
        if self.path:
            try:
                _write(f"{self._base}/cgroup.procs", pid)
            except OSError as error:
                log.warn(f"--cgroup: process {pid} can't leave it: {error.strerror}")

    def close(self) -> None:
        """Every other process has ended; this one goes back. Idempotent."""
        if self.path:
            self.send_home(os.getpid())
            remove(self.path)
            self.path = ""

    def _remove_stale(self) -> None:
        for entry in os.listdir(self._base):
            pid = entry.removeprefix(PREFIX)
            if entry.startswith(PREFIX) and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                remove(f"{self._base}/{entry}")


def _write(path: str, pid: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(pid).encode())
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """A cgroup and those below it, as far as no process is in them. Their files go with them."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove(entry.path)
        os.rmdir(path)
    except OSError:
        pass


def _is_cgroup2(path: str) -> bool:
    words = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    return bool(libc.statfs(os.fsencode(path), ctypes.byref(words)) == 0 and words[0] == CGROUP2_SUPER_MAGIC)
