"""What a test can leave behind, how to see it and how to get rid of it. Linux only; reads /proc and /dev/shm."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from controller.supervision import thread_places

CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
PR_SET_CHILD_SUBREAPER = 36

# How long a process that is already on its way out may take until it counts as leaked, in seconds: one that is really
# left behind never ends, but one that ends may be without a CPU for a while.
GRACE = 20.0
DEATH = 30.0  # and how long one that we have killed may take
SHM = Path("/dev/shm")
NETNS = Path("/run/netns")


def become_subreaper() -> None:
    """Orphans of a test become our children, however deep they were."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def isolate() -> bool:
    """Give this process a /dev/shm and a /run/netns of its own, so that other runs' names are not taken for ours.

    False when that is not allowed here (no root); the checks then see every name of the machine.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        return False
    with contextlib.suppress(OSError):
        NETNS.mkdir(parents=True, exist_ok=True)
    targets = [path for path in (SHM, NETNS) if path.is_dir()]
    return all(libc.mount(b"tmpfs", bytes(path), b"tmpfs", 0, None) == 0 for path in targets)


def _parent(pid: int) -> int:
    """Parent of a process, 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[1])


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def descendants(of: int | None = None) -> set[int]:
    """Every process below one (this), zombies included."""
    parents = {int(name): _parent(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    root = os.getpid() if of is None else of
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {root}


def places(pid: int) -> str:
    """A line for it and for each process below it: what its threads wait for in the kernel."""
    return "\n".join(f"  {describe(each)}: {thread_places(each)}" for each in sorted({pid, *descendants(pid)}))


def describe(pid: int) -> str:
    """`pid (command line)`, for a message."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return f"{pid} (gone meanwhile)"
    return f"{pid} ({name}: {words or 'no command line'})"


def _wait_gone(pid: int, deadline: float) -> bool:
    """Wait until a process has ended; reap it if it is our child. False at the deadline."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ended = bool(select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0])
        if ended and _parent(pid) == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, fd, os.WEXITED)
        return ended
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What exists at one moment."""

    processes: set[int]
    shm: set[str]
    netns: set[str]
    links: set[str]
    runtime: set[str]
    runtime_folder: Path = field(repr=False)

    @classmethod
    def take(cls, runtime_folder: Path) -> Snapshot:
        return cls(
            processes=descendants(),
            shm=_names(SHM),
            netns=_names(NETNS),
            links={name for _, name in socket.if_nameindex()},
            runtime=_names(runtime_folder),
            runtime_folder=runtime_folder,
        )


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def sockets_below(folder: Path) -> list[Path]:
    """Unix socket files in a folder and below."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(path.lstat().st_mode):
                    found.append(path)
    return found


def end_leaked_processes(before: Snapshot) -> list[str]:
    """Descriptions of the processes that are new since `before` and did not end within GRACE; none is left alive."""
    deadline = time.monotonic() + GRACE
    leaked: list[str] = []
    # Killing a parent can show us children that were forked meanwhile: look until nothing new is there.
    while new := descendants() - before.processes:
        for pid in sorted(new):
            what = describe(pid)
            if _is_zombie(pid) or _wait_gone(pid, deadline):
                _wait_gone(pid, time.monotonic() + DEATH)
                continue
            leaked.append(what)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _wait_gone(pid, time.monotonic() + DEATH)
        if time.monotonic() > deadline + DEATH:
            leaked.append(f"processes that do not end: {sorted(descendants() - before.processes)}")
            break
    return leaked


def find(before: Snapshot, tmp_path: Path | None) -> list[str]:
    """One line per thing that a test left behind; the machine is clean afterwards."""
    lines = [f"process {what}" for what in end_leaked_processes(before)]
    after = Snapshot.take(before.runtime_folder)
    for name in sorted(after.shm - before.shm):
        lines.append(f"shared memory name /dev/shm/{name}")
        (SHM / name).unlink(missing_ok=True)
    lines += [f"network namespace {name}" for name in sorted(after.netns - before.netns)]
    lines += [f"network interface {name}" for name in sorted(after.links - before.links)]
    lines += [f"runtime folder {before.runtime_folder / name}" for name in sorted(after.runtime - before.runtime)]
    for path in sockets_below(tmp_path) if tmp_path else []:
        lines.append(f"socket file {path}")
        path.unlink(missing_ok=True)
    return lines
