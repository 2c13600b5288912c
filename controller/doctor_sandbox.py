"""`flotilla doctor --sandbox`: forbidden things, tried from inside each kind of process of a running VM.

The probe guest runs with every device; a second VMM, which somebody connects to, has a migration agent. Then each
process makes each call itself (controller/injection.py), under `--seccomp errno`, so that it survives the answers; at
last, under `--seccomp true`, each kind makes one and is to die of SIGSYS. Arguments are such that a call which is let
through does no harm and fails, if at all, with another error than those of a refusal.

Exit code 0 only if everything was refused.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from controller.doctor import DISK_SIZE, Guest, pings, wait
from controller.injection import Captive, Killed
from controller.sandbox_report import look
from shared.errors import FlotillaError
from shared.linux import libc
from shared.sandbox import CLONE_NEWNET

BAD_FD: Final = 0x7FFF_0000
WIDTH: Final = 20  # of a column
VM_KINDS: Final = ("blk", "net", "console", "vcpu", "api", "metrics", "janitor")
KINDS: Final = (*VM_KINDS, "migration_agent")
REFUSALS: Final = (errno.EPERM, errno.EACCES, errno.ENOSYS)
FORKS: Final = ("fork", "vfork", "clone")
CONTROLLER: Final = "controller"  # stands for its pid among a call's arguments
PROT_READ_EXEC, MAP_PRIVATE_ANONYMOUS = 5, 0x22
TIOCSTI: Final = 0x5412
KVM_CREATE_VM: Final = 0xAE01
F_SETSIG: Final = 10
FIOSETOWN: Final = 0x8901


@dataclass(frozen=True, slots=True)
class Attempt:
    what: str
    call: str
    arguments: tuple[int | bytes | str, ...] = ()


ATTEMPTS: Final = (
    Attempt("a TCP socket", "socket", (socket.AF_INET, socket.SOCK_STREAM, 0)),
    Attempt("a unix socket", "socket", (socket.AF_UNIX, socket.SOCK_STREAM, 0)),
    Attempt("a packet socket", "socket", (socket.AF_PACKET, socket.SOCK_RAW, 0)),
    Attempt("connect", "connect", (BAD_FD, b"\0" * 16, 16)),
    Attempt("bind", "bind", (BAD_FD, b"\0" * 16, 16)),
    Attempt("read /etc/passwd", "openat", (-100, b"/etc/passwd", os.O_RDONLY)),
    Attempt("write a file", "openat", (-100, b"/tmp", os.O_WRONLY | os.O_TMPFILE, 0o600)),
    Attempt("open, the old call", "open", (b"/etc/passwd", os.O_RDONLY)),
    Attempt("openat2", "openat2", (-100, b"/etc/passwd", 0, 0)),
    Attempt("open by handle", "open_by_handle_at", (BAD_FD, 0, 0)),
    Attempt("mkdir", "mkdir", (b"/nowhere/at/all", 0o700)),
    Attempt("rename", "rename", (b"/nowhere/a", b"/nowhere/b")),
    Attempt("mknod", "mknod", (b"/nowhere/at/all", 0o20600, 0)),
    Attempt("execve", "execve", (b"/nowhere/at/all", 0, 0)),
    Attempt("execveat", "execveat", (BAD_FD, b"x", 0, 0, 0)),
    Attempt("fork", "fork"),
    Attempt("vfork", "vfork"),
    Attempt("clone a process", "clone", (signal.SIGCHLD, 0, 0, 0, 0)),
    Attempt("clone3", "clone3", (0, 0)),
    Attempt("executable memory", "mmap", (0, 4096, PROT_READ_EXEC, MAP_PRIVATE_ANONYMOUS, -1, 0)),
    Attempt("make memory executable", "mprotect", (0, 4096, PROT_READ_EXEC)),
    Attempt("signal the controller", "kill", (CONTROLLER, 0)),
    Attempt("signal its thread", "tgkill", (CONTROLLER, CONTROLLER, 0)),
    Attempt("signal everybody", "kill", (-1, 0)),
    Attempt("queue it a signal", "rt_sigqueueinfo", (CONTROLLER, 0, 0)),
    Attempt("a descriptor's owner", "fcntl", (BAD_FD, fcntl.F_SETOWN, CONTROLLER)),
    Attempt("a signal for its owner", "fcntl", (BAD_FD, F_SETSIG, signal.SIGKILL)),
    Attempt("its owner, by ioctl", "ioctl", (BAD_FD, FIOSETOWN, 0)),
    Attempt("signals to its owner", "fcntl", (BAD_FD, fcntl.F_SETFL, os.O_ASYNC)),
    Attempt("ptrace the controller", "ptrace", (0x4206, CONTROLLER, 1, 0)),
    Attempt("read its memory", "process_vm_readv", (CONTROLLER, 0, 0, 0, 0, 0)),
    Attempt("a pidfd of it", "pidfd_open", (CONTROLLER, 0)),
    Attempt("another's descriptor", "pidfd_getfd", (BAD_FD, 0, 0)),
    Attempt("its memory's advice", "process_madvise", (BAD_FD, 0, 0, 0, 0)),
    Attempt("mount", "mount", (0, b"/nowhere", b"tmpfs", 0, 0)),
    Attempt("umount", "umount2", (b"/nowhere", 0)),
    Attempt("pivot_root", "pivot_root", (b"/nowhere", b"/nowhere")),
    Attempt("chroot", "chroot", (b"/nowhere",)),
    Attempt("fsopen", "fsopen", (0, 0)),
    Attempt("a user namespace", "unshare", (0x1000_0000,)),
    Attempt("setns", "setns", (BAD_FD, 0)),
    Attempt("setuid", "setuid", (0,)),
    Attempt("capset", "capset", (0, 0)),
    Attempt("bpf", "bpf", (0, 0, 0)),
    Attempt("perf_event_open", "perf_event_open", (0, 0, 0, 0, 0)),
    Attempt("userfaultfd", "userfaultfd", (0,)),
    Attempt("io_uring", "io_uring_setup", (0, 0)),
    Attempt("keyctl", "keyctl", (0, 0, 0)),
    Attempt("kexec", "kexec_load", (0, 0, 0, 0)),
    Attempt("a kernel module", "init_module", (0, 0, 0)),
    Attempt("reboot", "reboot", (0, 0, 0, 0)),
    Attempt("raise limits", "prlimit64", (0, 7, 0, 0)),
    Attempt("another prctl", "prctl", (4, 0)),
    Attempt("type into a terminal", "ioctl", (2, TIOCSTI, 0)),
    Attempt("ioctl of KVM", "ioctl", (BAD_FD, KVM_CREATE_VM, 0)),
    Attempt("inotify", "inotify_init1", (0,)),
    Attempt("System V memory", "shmget", (0, 4096, 0)),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    refused: bool
    how: str


def verdict(answer: int) -> Verdict:
    """What a call's answer says."""
    if -answer in REFUSALS:
        return Verdict(True, errno.errorcode[-answer])
    return Verdict(
        False, "ALLOWED" if answer >= 0 else f"ALLOWED ({errno.errorcode.get(-answer, str(answer))})"
    )


def attempt(captive: Captive, controller: int, trial: Attempt) -> Verdict:
    """One row's cell."""
    arguments = [controller if isinstance(word, str) else word for word in trial.arguments]
    if trial.call not in FORKS:
        return verdict(captive.call(trial.call, *arguments))
    with ended_children(captive.pid):
        return verdict(captive.call(trial.call, *arguments))


@contextmanager
def ended_children(pid: int) -> Iterator[None]:
    """Kill what a process forks in the body, also while it lasts: who calls vfork waits for its child's end.

    The call's answer is no pid of ours: it counts as the process's own namespace does.
    """
    known, over = children(pid), threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = over.is_set()
            for child in children(pid) - known:
                known.add(child)
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            over.wait(0.001)

    thread = threading.Thread(target=watch, name="children")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def children(pid: int) -> set[int]:
    """Those of all its threads, zombies too."""
    found: set[int] = set()
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found  # it has ended
    for thread in threads:
        with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
            found.update(map(int, file.read().split()))
    return found


def try_all(pid: int, controller: int) -> dict[str, Verdict]:
    """Every attempt, from inside one process: by `what`. Raises HostError, OSError."""
    with Captive(pid) as captive:
        return {trial.what: attempt(captive, controller, trial) for trial in ATTEMPTS}


def fatal(pid: int) -> Verdict:
    """A forbidden call of a process whose filter kills."""
    try:
        with Captive(pid) as captive:
            return verdict(captive.call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0))
    except Killed as death:
        return Verdict(death.signal == signal.SIGSYS, signal.Signals(death.signal).name)


class Trial:
    """VMMs with all kinds of processes, in a network namespace of their own if the host allows it."""

    def __init__(self, folder: Path, mode: str, cleanup: ExitStack) -> None:
        from guest.build import build

        disk = folder / "disk.raw"
        disk.write_bytes(bytes(DISK_SIZE))
        words = [
            "--kernel",
            str(build()),
            "--cmdline",
            "mode=blkload span=8m report_ms=100",
            "--memory",
            "size=128M",
        ]
        words += ["--disk", f"path={disk}", "--serial", "tty", "--console", f"file={folder}/console"]
        words += ["--metrics-socket", f"{folder}/metrics"]
        self.no_net = ""
        if libc.unshare(CLONE_NEWNET) == 0:
            words += ["--net", "mac=12:34:56:78:90:ab"]
        else:
            self.no_net = os.strerror(ctypes.get_errno())
        self._guest = Guest(folder, "vmm1", *words, "--seccomp", mode)
        cleanup.callback(self._guest.close)
        self._guest.until(rb"blk ok [^\n]*\n")
        self._receiver = Guest(folder, "vmm2", "--seccomp", mode)
        cleanup.callback(self._receiver.close)
        path = folder / "migration"
        for guest in (self._guest, self._receiver):
            wait(lambda guest=guest: pings(guest), "the API")  # type: ignore[misc]
        waiting = subprocess.Popen(
            self._receiver.remote("receive-migration", f"unix:{path}"), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        cleanup.callback(waiting.wait)
        cleanup.callback(waiting.kill)
        wait(path.exists, "the migration's socket")
        self._peer = cleanup.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._peer.connect(str(path))
        self._peers_path = path

    def processes(self) -> dict[str, tuple[int, int]]:
        """(pid, its controller's) by kind, once each has the filter that its VMM was told."""
        found: dict[str, tuple[int, int]] = {}
        for guest, kinds in ((self._guest, VM_KINDS), (self._receiver, ("migration_agent",))):
            wanted = [kind for kind in kinds if kind != "net" or not self.no_net]
            wait(lambda guest=guest, wanted=wanted: _sealed(guest, wanted), "the processes' filters")  # type: ignore[misc]
            for row in guest.ask("sandbox"):
                if row["kind"] in wanted:
                    found[row["kind"]] = (row["pid"], guest.process.pid)
        return found


def _sealed(guest: Guest, kinds: list[str]) -> bool:
    rows = {row["kind"]: row for row in guest.ask("sandbox")}
    return all(kind in rows and rows[kind].get("seccomp") == "filter" for kind in kinds)


def run(folder: Path) -> tuple[dict[str, dict[str, Verdict]], dict[str, dict[str, Any]], str]:
    """Verdicts by kind and attempt, what the kernel says of each kind, and why there is no network card, if so."""
    table: dict[str, dict[str, Verdict]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for mode in ("errno", "true"):
        inner = folder / mode
        inner.mkdir()
        with ExitStack() as cleanup:
            trial = Trial(inner, mode, cleanup)
            for kind, (pid, controller) in trial.processes().items():
                if mode == "errno":
                    facts[kind] = look(pid)
                    table[kind] = try_all(pid, controller)
                else:
                    table[kind]["a call of death"] = fatal(pid)
            no_net = trial.no_net
    return table, facts, no_net


def show(table: dict[str, dict[str, Verdict]], facts: dict[str, dict[str, Any]], no_net: str) -> None:
    kinds = [kind for kind in KINDS if kind in table]
    print("".join([f"{'':24}", *(f"{kind:{WIDTH}}" for kind in kinds)]).rstrip())
    for what in (*(trial.what for trial in ATTEMPTS), "a call of death"):
        cells = [table[kind][what].how for kind in kinds]
        print("".join([f"{what:24}", *(f"{cell:{WIDTH}}" for cell in cells)]).rstrip())
    print()
    for name in ("root", "capabilities", "namespaces", "descriptors"):
        cells = [_cell(facts[kind].get(name, "?")) for kind in kinds]
        print("".join([f"{name:24}", *(f"{cell:{WIDTH}}" for cell in cells)]).rstrip())
    if no_net:
        print(f"\nnet: not tried, a TAP needs a network namespace or CAP_NET_ADMIN: {no_net}")


def _cell(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(as_json: bool = False) -> int:
    """0: everything was refused; 1: something was allowed, or could not be tried."""
    with tempfile.TemporaryDirectory(prefix="fl.") as folder:
        try:
            table, facts, no_net = run(Path(folder))
        except (FlotillaError, OSError) as error:
            print(f"FAIL  the sandbox could not be tried: {error}", file=sys.stderr)
            return 1
    allowed = [
        f"{kind}: {what}" for kind, row in table.items() for what, cell in row.items() if not cell.refused
    ]
    if as_json:
        cells = {kind: {what: cell.how for what, cell in row.items()} for kind, row in table.items()}
        json.dump({"refused": not allowed, "allowed": allowed, "table": cells, "facts": facts}, sys.stdout)
        sys.stdout.write("\n")
    else:
        show(table, facts, no_net)
        print(f"\nNOT refused: {'; '.join(allowed)}" if allowed else "\nEverything was refused.")
    return 1 if allowed else 0
