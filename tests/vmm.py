"""Starting the real program in tests: `cloud-hypervisor` with the probe guest, its serial output, its API.

`Vmm` is a context manager; leaving it ends the process in order if it can, by SIGKILL if it must.
"""

from __future__ import annotations

import json
import os
import re
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest import build
from tests.leaks import places

ROOT = Path(__file__).resolve().parent.parent
SECONDS = float(os.environ.get("FLOTILLA_TEST_SECONDS", "30"))  # longer on a host that has other work
END_SECONDS = 25  # a VMM that hangs in its end ends by itself after 20 s
PROGRAM = "import sys; from controller.main import main; sys.exit(main())"
REMOTE = "import sys; from ch_remote.main import main; sys.exit(main())"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_remote(
    *words: str, timeout: float = SECONDS, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REMOTE, *words],
        capture_output=True, text=True, timeout=timeout, env=environment(), check=False, pass_fds=pass_fds,
    )  # fmt: skip


def probe() -> str:
    return str(build.build())


class Vmm:
    """One VMM. `output` is what the guest has printed so far, `errors` standard error."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        name: str = "vmm",
        api: bool = True,
        pass_fds: tuple[int, ...] = (),
        program: str = PROGRAM,
    ) -> None:
        self.api = folder / f"{name}.api" if api else None
        self._errors = folder / f"{name}.err"
        command = [sys.executable, "-c", program, *arguments]
        if self.api is not None:
            command += ["--api-socket", str(self.api)]
        with open(self._errors, "wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment(), cwd=folder,
                pass_fds=pass_fds,
            )  # fmt: skip
        self.output = b""
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)

    @classmethod
    def guest(cls, folder: Path, cmdline: str, *arguments: str, **options: Any) -> Vmm:
        """A VMM with the probe guest: serial on stdout, by default 128 MiB and no console."""
        own = ["--kernel", probe(), "--cmdline", cmdline, "--serial", "tty"]
        if "--console" not in arguments:
            own += ["--console", "off"]
        if "--memory" not in arguments:
            own += ["--memory", "size=128M"]
        return cls(folder, *own, *arguments, **options)

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"not ended {END_SECONDS} s after SIGTERM:\n{places(self.process.pid)}", file=sys.stderr)
                self.process.kill()
                self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self._selector.close()

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def _read(self, timeout: float) -> bool:
        assert self.process.stdout is not None
        if not self._selector.select(timeout):
            return True
        data = self.process.stdout.read()
        if data:
            self.output += data
        return data != b""

    def expect(self, pattern: str, seconds: float = SECONDS, since: int = 0) -> re.Match[bytes]:
        """Wait for the guest to print something. Fails with what it printed instead."""
        wanted = re.compile(pattern.encode())
        end = time.monotonic() + seconds
        while True:
            if match := wanted.search(self.output, since):
                return match
            left = end - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"no {pattern!r} in {self.output[-1500:]!r}\n{self.errors[-3000:]}")

    def more(self, pattern: str, seconds: float = SECONDS) -> re.Match[bytes]:
        """Wait for it to be printed from now on."""
        while self._selector.select(0):
            if not self._read(0):
                break
        return self.expect(pattern, seconds, since=len(self.output))

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code; the output is drained meanwhile."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.05)
        while self._read(0) and self._selector.select(0):
            pass
        return self.process.wait(max(0.1, end - time.monotonic()))

    def remote(
        self, *words: str, timeout: float = SECONDS, pass_fds: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return run_remote("--api-socket", str(self.api), *words, timeout=timeout, pass_fds=pass_fds)

    def start_remote(self, *words: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """A request that takes its time; the caller waits for it."""
        command = [sys.executable, "-c", REMOTE, "--api-socket", str(self.api), *words]
        return subprocess.Popen(command, stderr=stderr, env=environment())

    def ask(self, *words: str) -> Any:
        """A request that must succeed; its JSON, if any."""
        done = self.remote(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.errors[-3000:]}"
        return json.loads(done.stdout) if done.stdout.strip() else None

    def wait_api(self) -> None:
        """Until the API answers."""
        poll(lambda: self.api is not None and self.api.exists() and self.remote("ping").returncode == 0)

    def fleet(self) -> dict[str, dict[str, Any]]:
        """Rows of vmm.fleet by device name."""
        return {row["device"]: row for row in self.ask("fleet")}

    def pid_of(self, device: str) -> int:
        """Waits for one that is being replaced: its row's pid is 0."""
        return int(poll(lambda: self.fleet().get(device, {}).get("pid")))


def events(path: Path, *names: str) -> list[tuple[str, dict[str, Any]]]:
    """What has been written to an event monitor, but for a record that is being written; without names, all."""
    *records, _ = path.read_text().split("\n\n")
    told = [(record["event"], record["properties"] or {}) for record in map(json.loads, records)]
    return [record for record in told if not names or record[0] in names]


def poll(check: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Wait until check() is true; what it gave."""
    end = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {check}"
        select_nothing(0.01)


def until_socket(sock: Path, worker: subprocess.Popen[Any]) -> None:
    """Until it is there; a worker that has ended won't make it."""
    poll(lambda: sock.exists() or worker.poll() is not None)
    assert worker.poll() is None, f"the worker ended with {worker.returncode}, and {sock} is not there"


def read_until(fd: int, enough: Callable[[bytes], bool], seconds: float = SECONDS) -> bytes:
    """What comes from it from now on, until that is enough. Fails with what came instead."""
    seen, end = b"", time.monotonic() + seconds
    while not enough(seen):
        ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"not within {seconds} s: {enough}; {len(seen)} bytes came, the last are {seen[-1500:]!r}"
        seen += os.read(fd, 4096)
    return seen


def select_nothing(seconds: float) -> None:
    with selectors.DefaultSelector() as selector:
        selector.select(seconds)
