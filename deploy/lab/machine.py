"""One start of the lab machine: QEMU, the ports between it and us, and the verdict on how it ended.

Who is to blame is decided here. A job that fails, hangs or is killed inside a healthy lab machine has a code of its
own (124 when its time was up). The lab machine itself died when QEMU ended without the job's code, when the
machine did not come up, or when its sign of life stopped; only then is there anything to start again.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deploy import floors
from deploy.lab.images import Images

CPU = "EPYC,+svm,+npt,+nrip-save"
PORTS = ("stdout", "stderr", "out", "events", "control")
MONITOR = "monitor"  # QEMU's own, asked where the CPU of a machine stands that gives no sign of life
LOOKS, LOOK_SECONDS = 3, 5.0

# Seconds. The machine is up after 6 on an idle host; a busy host may need several times that.
BOOT_LIMIT = 240.0
BEAT_LIMIT = 120.0
END_LIMIT = 120.0
# How often the host says a word to the machine, which answers. The use of it is the interrupt: the emulated VMRUN of
# QEMU 7.2 notes a pending virtual interrupt without a lock (helper_vmrun, target/i386/tcg/sysemu/svm_helper.c) and so
# undoes, now and then, what the timer's thread has just noted in the same word. The timer's interrupt then waits in the
# APIC for any other one, and without one the machine computes on for ever and looks at nothing.
TICK = 2.0

TIMED_OUT = 124
INTERRUPTED = 130

Sink = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Machine:
    """How big the lab machine is and how long its job may take (seconds; 0 for a shell: no limit)."""

    memory: str = "4G"
    cpus: int = 1
    limit: int = 900
    append: str = ""


@dataclass(slots=True)
class Verdict:
    """How a start ended: either `code` is the job's exit code, or `died` says what happened to the lab machine."""

    code: int | None = None
    died: str = ""
    up: float | None = None
    left: list[str] = field(default_factory=list)
    console: str = ""
    waited: float = 0.0  # seconds for which the emulator could have run and had no CPU


def write_all(fd: int, data: bytes) -> None:
    """A sink: everything to a descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def waited_for_cpu(pid: int) -> float:
    """Seconds of the thread of a process that has waited longest (Documentation/scheduler/sched-stats.rst); 0 where the
    kernel does not count them.
    """
    waited = [0]
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has ended
            waited.append(int(thread.read_text().split()[1]))
    return max(waited) / 1e9


def accelerator() -> list[str]:
    """Emulation, unless this host's KVM is hardware and lets a guest have KVM too."""
    for module in ("kvm_intel", "kvm_amd"):
        nested = Path(f"/sys/module/{module}/parameters/nested")
        if floors.kvm_runs_linux() and nested.exists() and nested.read_text().strip() in ("1", "Y"):
            return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", CPU]


def command(machine: Machine, images: Images, job: Path, console: Path, ports: dict[str, int]) -> list[str]:
    """QEMU's command line; `ports` are the descriptors of our socket pairs, "tty" among them for the terminal."""
    words = ["qemu-system-x86_64", "-M", "q35", *accelerator(), "-smp", str(machine.cpus), "-m", machine.memory]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-kernel", str(images.bzimage), "-initrd", str(images.initrd)]
    # Addresses that are the same every time: what _where() says can be looked up.
    kernel_words = "root=/dev/vda console=ttyS0 quiet mitigations=off panic=-1 oops=panic nokaslr"
    words += ["-append", f"{kernel_words} {machine.append}".strip()]
    words += ["-serial", f"file:{console}", "-device", "virtio-rng-pci"]
    for disk in (images.machine, images.workloads, images.python, job, *images.more):
        words += ["-drive", f"file={str(disk).replace(',', ',,')},if=virtio,format=raw,cache=unsafe,snapshot=on"]
    words += ["-device", "virtio-serial-pci"]
    for name, fd in ports.items():
        words += ["-chardev", f"socket,id={name},fd={fd}"]
        if name == MONITOR:
            words += ["-mon", f"chardev={name},mode=readline"]
            continue
        words += ["-device", "virtconsole" if name == "tty" else "virtserialport"]
        words[-1] += f",chardev={name},name={name}"
    return words


@contextlib.contextmanager
def _qemu(words: list[str], errors: Path, pass_fds: list[int], scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running QEMU in a session of its own (Ctrl-C is ours to handle) that dies with us, whatever kills us."""
    with open(errors, "wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=pass_fds, start_new_session=True, env={**os.environ, "TMPDIR": str(scratch)},
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Session:
    """Carries bytes between QEMU's ports and our sinks until the machine is gone or given up."""

    def __init__(self, machine: Machine, sinks: dict[str, Sink]) -> None:
        self.verdict = Verdict()
        self._machine = machine
        self._sinks = {**sinks, "control": self._hear}
        self._heard = b""
        self._out_sent: int | None = None  # bytes that the machine has sent to "out", once it has said so
        self._out_arrived = 0
        self._began = self._beat = self._ticked = time.monotonic()
        self._sockets: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()

    def run(self, images: Images, job: Path, work: Path, terminal: int | None = None) -> Verdict:
        """Start the machine and stay until it is gone. `terminal` is a descriptor whose input goes to the shell."""
        names = [*PORTS, MONITOR, "tty"] if terminal is not None else [*PORTS, MONITOR]
        theirs = {}
        for name in names:
            self._sockets[name], theirs[name] = socket.socketpair()
            self._selector.register(self._sockets[name], selectors.EVENT_READ, name)
        if terminal is not None:
            self._selector.register(terminal, selectors.EVENT_READ, "terminal")
        console, errors = work / "console", work / "qemu.log"
        fds = {name: each.fileno() for name, each in theirs.items()}
        words = command(self._machine, images, job, console, fds)
        try:
            with _qemu(words, errors, list(fds.values()), work) as process:
                for each in theirs.values():
                    each.close()
                self._carry(process)
        finally:
            for each in self._sockets.values():
                each.close()
            self._selector.close()
        self.verdict.console = console.read_text(errors="replace") if console.exists() else ""
        if self.verdict.code is None and not self.verdict.died:
            self.verdict.died = self._why(process.returncode, errors.read_text(errors="replace"))
        return self.verdict

    def resize(self, rows: int, columns: int) -> None:
        """Tell the machine the size of the terminal."""
        with contextlib.suppress(OSError, KeyError):
            self._sockets["control"].send(b"size %d %d\n" % (rows, columns))

    def _carry(self, process: subprocess.Popen[bytes]) -> None:
        pidfd = os.pidfd_open(process.pid)
        self._selector.register(pidfd, selectors.EVENT_READ, "qemu")
        try:
            while process.poll() is None:
                for key, _ in self._selector.select(min(1.0, TICK)):
                    if key.data != "qemu":
                        self._pass_on(key.data)
                self._tick(process.pid)
                if not self.verdict.died and (why := self._overdue()):
                    self.verdict.died = f"{why}; {self._where()}"
                    process.kill()
            for name in list(self._sockets):
                while self._pass_on(name):
                    pass
        finally:
            self._selector.unregister(pidfd)
            os.close(pidfd)

    def _pass_on(self, name: str) -> bool:
        """Move what is there on one port; False at its end."""
        if name == "terminal":
            self._type()
            return True
        try:
            data = self._sockets[name].recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._sockets[name])
            return False
        if sink := self._sinks.get(name):
            sink(data)
        if name == "out":
            self._out_arrived += len(data)
            self._acknowledge()
        return True

    def _acknowledge(self) -> None:
        """The machine waits for this before it ends."""
        if self._out_sent is not None and self._out_arrived >= self._out_sent:
            self._out_sent = None
            with contextlib.suppress(OSError):
                self._sockets["control"].send(b"got\n", socket.MSG_DONTWAIT)

    def _type(self) -> None:
        (key,) = (key for key in self._selector.get_map().values() if key.data == "terminal")
        data = os.read(key.fd, 4096)
        if not data:  # the end of a pipe; a terminal in raw mode sends ^D as a byte
            self._selector.unregister(key.fd)
            data = b"\x04"
        if b"\x1d" in data:  # ^]
            raise KeyboardInterrupt
        self._sockets["tty"].sendall(data)

    def _hear(self, data: bytes) -> None:
        """Words of the lab machine's init (see init/lab)."""
        self._beat = time.monotonic()
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "up":
                self.verdict.up = float(rest)
                self._began = self._beat
            elif word == "left":
                self.verdict.left.append(rest)
            elif word == "out":
                self._out_sent = int(rest)
                self._acknowledge()
            elif word == "rc":
                self.verdict.code = int(rest)

    def _tick(self, pid: int) -> None:
        now = time.monotonic()
        if self.verdict.up is not None and now - self._ticked >= TICK:
            self._ticked = now
            self.verdict.waited = waited_for_cpu(pid)
            with contextlib.suppress(OSError, KeyError):  # full: the machine reads no more, which _overdue will tell
                self._sockets["control"].send(b"tick\n", socket.MSG_DONTWAIT)

    def _overdue(self) -> str:
        now = time.monotonic()
        if self.verdict.up is None:
            return f"it did not come up in {BOOT_LIMIT:.0f} s" if now - self._began > BOOT_LIMIT else ""
        if now - self._beat > BEAT_LIMIT:
            return f"no sign of life for {BEAT_LIMIT:.0f} s"
        limit = self._machine.limit
        if limit and now - self._began > limit + END_LIMIT:
            return f"it did not end the job, whose limit of {limit} s passed {END_LIMIT:.0f} s ago"
        return ""

    def _where(self) -> str:
        """What the CPU does: several looks tell a loop from a halt."""
        monitor = self._sockets[MONITOR]
        with contextlib.suppress(KeyError):
            self._selector.unregister(monitor)
        monitor.settimeout(LOOK_SECONDS)
        said = b""
        for _ in range(LOOKS):
            with contextlib.suppress(OSError):
                monitor.sendall(b"info registers\nx/3i $pc\ninfo lapic\n")
                while data := monitor.recv(1 << 16):
                    said += data
        looks = re.findall(
            r"[RE]IP=[0-9a-f]+|CPL=\d|HLT=\d|0x[0-9a-f]+: +[^\r\n]+|\b(?:ISR|IRR) +[^\r\n]+|initial_count = \d+",
            said.decode(errors="replace"),
        )
        return f"its CPU stands at {' '.join(looks)}" if looks else "QEMU does not say where its CPU stands"

    def _why(self, code: int | None, errors: str) -> str:
        if code:
            name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return f"QEMU ended with {name}: {errors.strip()[-500:] or 'no message'}"
        for line in self.verdict.console.splitlines():
            if "Kernel panic" in line or "Oops" in line or "BUG:" in line:
                return f"its kernel fell over: {line.strip()}"
        return "it powered off without the job's exit code"
