"""`flotilla doctor`: what of Flotilla works on this host, what does not, why, and what to do about it.

Looks at the host first, then runs the probe guest: it boots, writes and verifies a disk, survives the kill of its vCPU
process and moves to a second VMM. One line per check: `ok`, `warn` (something is missing that a VM can do without) or
`FAIL` (no VM runs here). Exit code 1 with a FAIL, else 0. Each check has a limit; one that passes it is a FAIL.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from controller.runtime import RuntimeDir
from controller.spawn import interpreter
from shared import native
from shared.errors import FlotillaError, HostError
from shared.kvm import REQUIRED_CAPS, Kvm
from shared.linux import memfd

USAGE: Final = "Usage: flotilla doctor [--json] [--sandbox]\n"
PROGRAM: Final = "from controller.main import main; sys.exit(main())"
REMOTE: Final = "from ch_remote.main import main; sys.exit(main())"
PACKAGES: Final = ("zmq", "msgpack", "posix_ipc", "fastapi", "uvicorn")
SETUP: Final = "bash deploy/setup.sh installs what is missing"
LAB: Final = "bash deploy/lab.sh shell gives a host whose KVM runs Linux"
DISK_SIZE: Final = 16 << 20
CMDLINE: Final = "mode=blkload span=8m report_ms=100"
SHM_SPACE: Final = 16 << 20
GUEST_SECONDS: Final = 30.0
F_GET_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1034, 2, 4
CLONE_NEWNET, CLONE_NEWUSER = 0x4000_0000, 0x1000_0000


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found; `hint` is what to do about it."""

    status: Status
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A finding with the name of its check and the milliseconds that it took: one row of --json."""

    check: str
    status: Status
    text: str
    hint: str
    ms: int


def ok(text: str) -> Finding:
    return Finding(Status.OK, text)


def warn(text: str, hint: str = "") -> Finding:
    return Finding(Status.WARN, text, hint)


def fail(text: str, hint: str = "") -> Finding:
    return Finding(Status.FAIL, text, hint)


# The host -------------------------------------------------------------------------------------------------------------


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return fail(f"Python {version} without {', '.join(missing)}", SETUP)
    return ok(f"Python {version} with {', '.join(PACKAGES)}")


def check_native() -> Finding:
    for name in native.LOOPS:
        native.load(name)
    return ok(f"built: {', '.join(native.LOOPS)}")


def software_kvm() -> bool | None:
    """True: ring 0 is interpreted. False: KVM stands on hardware. None: not known."""
    if any(os.path.isdir(f"/sys/module/{name}") for name in ("kvm_intel", "kvm_amd")):
        return False
    return True if os.path.isdir("/sys/module/kvm_pvm") else None


def check_kvm() -> Finding:
    # The capabilities are a check of their own: here it is enough that it is there and ours to use.
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        Kvm().close()  # says it with the right hint
    kind = {False: "on hardware", True: "in software (kvm_pvm)", None: "of an unknown kind"}[software_kvm()]
    return ok(f"/dev/kvm is ours to use; KVM {kind}")


def check_capabilities() -> Finding:
    Kvm().close()
    return ok(f"KVM has all {len(REQUIRED_CAPS)} capabilities that the machine needs")


def check_linux_guests() -> Finding:
    software = software_kvm()
    if software:
        return warn("no stock Linux guest: a software KVM (kvm_pvm) interprets ring 0, and not all of it", LAB)
    if software is None:
        return warn("not known: neither kvm_intel nor kvm_amd is loaded", f"try one; if it does not boot, {LAB}")
    return ok("KVM on hardware runs Linux guests")


def check_nested() -> Finding:
    if software_kvm():
        return warn("no guest gets a KVM of its own: software KVM", LAB)
    for module in ("kvm_intel", "kvm_amd"):
        with contextlib.suppress(OSError):
            if Path(f"/sys/module/{module}/parameters/nested").read_text().strip() in ("1", "Y"):
                return ok(f"guests get a KVM of their own ({module})")
            return warn("no guest gets a KVM of its own", f"load {module} with nested=1")
    return warn("no guest gets a KVM of its own: no hardware module is loaded")


def check_memfd() -> Finding:
    """Guest RAM is a sealed memfd: a size that cannot change is what makes it safe to hand to workers."""
    fd = memfd("doctor", 4096)
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    finally:
        os.close(fd)
    if seals & (F_SEAL_SHRINK | F_SEAL_GROW) != F_SEAL_SHRINK | F_SEAL_GROW:
        return fail(f"the seals of a memfd are {seals:#x}, SHRINK and GROW are not among them", "a newer kernel")
    return ok("memfd can be sealed")


def check_shm() -> Finding:
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        return fail("/dev/shm is missing or not writable", "mount -t tmpfs -o mode=1777 tmpfs /dev/shm")
    found = os.statvfs("/dev/shm")
    free = found.f_bavail * found.f_frsize
    if free < SHM_SPACE:
        return warn(f"/dev/shm has {free >> 10} KiB free", "remove what is left there, or mount it with a larger size")
    return ok(f"/dev/shm has {free >> 20} MiB free")


def check_runtime_dir() -> Finding:
    folder = RuntimeDir()
    folder.close()
    return ok(f"runtime directory {os.path.dirname(folder.path)} can be used")


def check_namespaces() -> Finding:
    """Tried in a process of its own: a thread cannot enter a user namespace."""
    code = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
        "print(libc.unshare(int(sys.argv[1])) and ctypes.get_errno())"
    )
    answers = {}
    for name, flags in {"network": CLONE_NEWNET, "user": CLONE_NEWUSER | CLONE_NEWNET}.items():
        command = interpreter(code, str(flags))
        done = subprocess.run(command, capture_output=True, text=True, timeout=GUEST_SECONDS, check=True)
        answers[name] = int(done.stdout)
    if answers["network"] == 0:
        return ok("workers get network namespaces of their own")
    why = os.strerror(answers["network"])
    if answers["user"] == 0:
        return warn(f"workers keep the host's network: {why}", "run as root, or inside `unshare -Urn`")
    also = os.strerror(answers["user"])
    return warn(f"workers keep the host's network: {why}; nor is there a user namespace: {also}", "run as root")


# The probe guest ------------------------------------------------------------------------------------------------------


class Guest:
    """One VMM: the guest's serial port on its stdout, an API socket, stderr in a file."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.api = folder / f"{name}.api"
        self._errors = folder / f"{name}.err"
        command = interpreter(PROGRAM, *arguments, "--api-socket", str(self.api))
        with open(self._errors, "wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        assert self.process.stdout is not None
        self._stdout = self.process.stdout
        self.output = b""

    def until(self, pattern: bytes, since: int = 0) -> re.Match[bytes]:
        """Wait for the guest to say something. Raises HostError for anything that it calls BAD, and at the limit."""
        end = time.monotonic() + GUEST_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while True:
                if bad := re.search(rb"[^\n]*BAD[^\n]*|probe: error[^\n]*", self.output):
                    raise HostError(f"the guest says: {bad[0].decode(errors='replace')}")
                if match := re.compile(pattern).search(self.output, since):
                    return match
                ready = selector.select(max(0.0, end - time.monotonic()))
                data = os.read(self._stdout.fileno(), 65536) if ready else b""
                if not data:
                    how = "the VMM ended" if ready else f"not within {GUEST_SECONDS:.0f} s"
                    raise HostError(f"the guest does not say {pattern.decode()!r}: {how}; {self.complaint}")
                self.output += data

    @property
    def complaint(self) -> str:
        text = " ".join(self._errors.read_text(errors="replace").split())
        return f"stderr: {text[-500:]}" if text else "stderr is empty"

    def remote(self, *words: str) -> list[str]:
        return interpreter(REMOTE, "--api-socket", str(self.api), *words)

    def ask(self, *words: str) -> Any:
        """JSON of a request that must succeed."""
        done = subprocess.run(self.remote(*words), capture_output=True, text=True, timeout=GUEST_SECONDS, check=False)
        if done.returncode:
            raise HostError(f"ch-remote {words[0]} failed: {' '.join((done.stdout + done.stderr).split())}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(GUEST_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stdout.close()


class Trial:
    """The probe guest's life, one check after the other. A check whose guest is not there says so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._guests: list[Guest] = []

    @property
    def _guest(self) -> Guest:
        if not self._guests:
            raise HostError("not tried: the probe guest does not run")
        return self._guests[-1]

    def close(self) -> None:
        for guest in self._guests:
            guest.close()

    def boots(self) -> Finding:
        from guest.build import build

        kernel, disk = build(), self._folder / "disk.raw"
        disk.write_bytes(bytes(DISK_SIZE))
        began = time.monotonic()
        guest = Guest(
            self._folder, "vmm1", "--kernel", str(kernel), "--cmdline", CMDLINE, "--memory", "size=128M",
            "--disk", f"path={disk}", "--serial", "tty", "--console", "off",
        )  # fmt: skip
        self._guests.append(guest)
        try:
            guest.until(b"P")
            took = time.monotonic() - began
            guest.until(b"probe: ready")
        except HostError:
            guest.close()
            self._guests.clear()
            raise
        return ok(f"the probe guest boots; first serial byte after {took * 1e3:.0f} ms")

    def disk(self) -> Finding:
        guest = self._guest
        match = guest.until(rb"blk ok [^\n]*scans=([1-9]\d*)[^\n]*\n")
        return ok(f"the guest's disk holds what was written: {match[0].decode().split(' dis')[0].strip()}")

    def vcpu_kill(self) -> Finding:
        guest = self._guest
        wait(lambda: pings(guest), "the API")
        before = self._vcpu(guest)
        os.kill(before["pid"], signal.SIGKILL)
        wait(lambda: self._vcpu(guest)["restarts"] > before["restarts"], "a new vCPU process")
        guest.until(rb"blk ok [^\n]*\n", since=len(guest.output))
        return ok(f"vCPU process {before['pid']} was killed; {self._vcpu(guest)['pid']} took over and nothing was lost")

    @staticmethod
    def _vcpu(guest: Guest) -> dict[str, Any]:
        """Its row, once it has a process: that of one which is being replaced has pid 0."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [row for row in guest.ask("fleet") if row["kind"] == "vcpu" and row["pid"]]
            return bool(found)

        wait(look, "a vCPU process")
        return found[0]

    def migrates(self) -> Finding:
        source, path = self._guest, self._folder / "migration"
        destination = Guest(self._folder, "vmm2")
        self._guests.append(destination)
        wait(lambda: pings(destination), "the second VMM's API")
        receiver = subprocess.Popen(
            destination.remote("receive-migration", f"unix:{path}"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            wait(lambda: path.exists() or receiver.poll() is not None, "the receiver's socket")
            source.ask("send-migration", "--local", f"unix:{path}")
            said, _ = receiver.communicate(timeout=GUEST_SECONDS)
        finally:
            receiver.kill()
            receiver.communicate()
        if receiver.returncode:
            raise HostError(f"ch-remote receive-migration failed: {' '.join(said.decode(errors='replace').split())}")
        destination.until(rb"blk ok [^\n]*\n")
        if code := source.process.wait(GUEST_SECONDS):
            raise HostError(f"the source VMM ended with {code} after the migration")
        return ok("the running guest moved to a second VMM and went on with its disk")


def pings(guest: Guest) -> bool:
    """Whether the API of its VMM answers."""
    return subprocess.run(guest.remote("ping"), capture_output=True, check=False).returncode == 0


def wait(check: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + GUEST_SECONDS
    while not check():
        if time.monotonic() > end:
            raise HostError(f"{what}: not within {GUEST_SECONDS:.0f} s")
        time.sleep(0.02)


# The report -----------------------------------------------------------------------------------------------------------


def checks(trial: Trial) -> list[tuple[str, Callable[[], Finding], float]]:
    """(name, check, limit in seconds) in the order in which they are made."""
    return [
        ("python", check_python, 10),
        ("native loops", check_native, 10),
        ("kvm", check_kvm, 10),
        ("kvm capabilities", check_capabilities, 10),
        ("linux guests", check_linux_guests, 10),
        ("nested", check_nested, 10),
        ("memfd", check_memfd, 10),
        ("shared memory", check_shm, 10),
        ("runtime directory", check_runtime_dir, 10),
        ("namespaces", check_namespaces, 30),
        ("probe guest", trial.boots, 90),
        ("disk", trial.disk, 60),
        ("vcpu kill", trial.vcpu_kill, 120),
        ("local migration", trial.migrates, 120),
    ]


def make(name: str, check: Callable[[], Finding], seconds: float) -> Line:
    """One check, in a thread that is left behind when it passes its limit. Never raises."""
    found: list[Finding] = []
    began = time.monotonic()
    thread = threading.Thread(target=lambda: found.append(_finding(check)), name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    finding = found[0] if found else fail(f"no answer within {seconds:.0f} s", "see the kernel's log (dmesg)")
    return Line(name, finding.status, finding.text, finding.hint, round((time.monotonic() - began) * 1e3))


def _finding(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except FlotillaError as error:
        return fail(error.message, error.hint)
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        return fail(f"{type(error).__name__}: {error}")


def show(line: Line) -> None:
    hint = f" ({line.hint})" if line.hint else ""
    print(f"{line.status:4}  {line.check:17}  {line.text}{hint}", flush=True)


def main(argv: Sequence[str]) -> int:
    """`argv` is what follows the word doctor. 0: Flotilla can run here, 1: it can't, 2: not understood."""
    if "--sandbox" in argv and set(argv) <= {"--sandbox", "--json"}:
        from controller.doctor_sandbox import main as sandbox

        return sandbox("--json" in argv)
    if list(argv) not in ([], ["--json"]):
        sys.stdout.write(USAGE) if argv in (["-h"], ["--help"]) else sys.stderr.write(USAGE)
        return 0 if argv in (["-h"], ["--help"]) else 2
    lines: list[Line] = []
    # A short name: a unix socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="fl.") as folder:
        trial = Trial(Path(folder))
        try:
            for name, check, seconds in checks(trial):
                lines.append(make(name, check, seconds))
                if not argv:
                    show(lines[-1])
        finally:
            trial.close()
    usable = all(line.status is not Status.FAIL for line in lines)
    if argv:
        json.dump({"usable": usable, "checks": [asdict(line) for line in lines]}, sys.stdout)
        sys.stdout.write("\n")
    else:
        print("Flotilla can run here." if usable else "Flotilla can't run here: see the lines with FAIL.")
    return 0 if usable else 1
