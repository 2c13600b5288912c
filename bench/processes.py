"""Starting and ending what is measured, and whose memory is whose. Linux only; reads /proc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import programs
from bench.errors import BenchError
from shared.linux import prctl

PR_SET_CHILD_SUBREAPER: Final = 36
SYS_KCMP: Final = 312
KCMP_VM: Final = 1
END_SECONDS: Final = 15.0
# Guest RAM, by the name that its memfd has: Cloud Hypervisor's and ours, QEMU's.
RAM_NAMES: Final = ("/memfd:ch_ram", "/memfd:memory-backend-memfd")


class Child:
    """One VMM: serial port on its stdout, which the caller reads; stderr kept for messages. A context manager."""

    def __init__(self, folder: Path, name: str, command: list[str]) -> None:
        self.name = name
        self.command = command
        self._errors = folder / f"{name}.stderr"
        with open(self._errors, "wb") as errors:
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, cwd=folder,
                env=programs.environment(),
            )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def fd(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def errors(self) -> str:
        """The end of what it said on stderr, on one line."""
        return " ".join(self._errors.read_text(errors="replace").split())[-400:]


def become_subreaper() -> None:
    """Processes that outlive their VMM become our children, so that settle() sees them."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def settle(seconds: float = END_SECONDS) -> None:
    """Wait until nothing that a measured VMM started is left: it would disturb the next sample.

    What is still there after `seconds` is killed, and raises BenchError.
    """
    end = time.monotonic() + seconds
    while pids := descendants(os.getpid()):
        for pid in pids:
            with contextlib.suppress(ChildProcessError):  # the child of one of the others
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > end:
            names = ", ".join(f"{pid} {comm(pid)}" for pid in sorted(pids))
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise BenchError(f"left running: {names}")
        time.sleep(0.01)


def descendants(root: int) -> set[int]:
    """Every process below `root`, zombies included."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {root}


def comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"


@dataclass(frozen=True, slots=True)
class Footprint:
    """One address space: PSS in KiB without and of guest RAM, and the processes that live in it."""

    names: tuple[str, ...]
    pids: tuple[int, ...]
    kib: int
    ram_kib: int


def footprints(root: int, names: Mapping[int, str]) -> list[Footprint]:
    """Of `root` and all below it, each address space once. `names` are better names than the kernel's."""
    spaces: list[list[int]] = []
    for pid in [root, *sorted(descendants(root))]:
        for space in spaces:
            if same_address_space(space[0], pid):
                space.append(pid)
                break
        else:
            spaces.append([pid])
    found = []
    for space in spaces:
        kib, ram = pss(space[0])
        found.append(Footprint(tuple(names.get(pid, comm(pid)) for pid in space), tuple(space), kib, ram))
    return found


def same_address_space(one: int, other: int) -> bool:
    """kcmp(2) on the two memory descriptors. Raises BenchError where the kernel or ptrace's rules don't allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(SYS_KCMP, one, other, KCMP_VM, 0, 0)
    if result < 0:
        why = os.strerror(ctypes.get_errno())
        raise BenchError(f"kcmp of {one} and {other}: {why}; which processes share an address space is not known")
    return result == 0


def pss(pid: int) -> tuple[int, int]:
    """(KiB without guest RAM, KiB of guest RAM) by /proc/PID/smaps."""
    own = ram = 0
    inside = False
    try:
        for line in _lines(f"/proc/{pid}/smaps"):
            words = line.split(maxsplit=5)
            if not words[0].endswith(":"):
                inside = len(words) == 6 and words[5].startswith(RAM_NAMES)
            elif words[0] == "Pss:":
                if inside:
                    ram += int(words[1])
                else:
                    own += int(words[1])
    except OSError as error:
        raise BenchError(f"/proc/{pid}/smaps: {error.strerror}") from error
    return own, ram


def _lines(path: str) -> Iterator[str]:
    with open(path) as file:
        yield from file
