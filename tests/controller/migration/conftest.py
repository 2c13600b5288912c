"""The lab of the migration tests: controllers that are real processes, and a guest that can be watched from outside."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.locks import is_locked
from shared.linux import memfd
from tests.controller.migration.toy import fork_controller
from tests.controller.migration.toy_runner import PAGE, Ram, is_alive

SECONDS = 20.0


class Died(Exception):
    """The controller ended before it said what was expected."""


class Remote:
    """The test's end of one controller."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._runtime = tempfile.mkdtemp(prefix="m.", dir=lab.folder)
        self.pid = fork_controller(theirs, self._runtime)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)
        self.exit_status: int | None = None
        self.events: list[str] = []
        self.phases: list[str] = []
        self.paths: list[tuple[str, bool]] = []

    def await_stop(self) -> None:
        """With `stop_at`: it tells the phase a moment before it stops, and a SIGCONT in between would be lost."""
        deadline = time.monotonic() + SECONDS
        while (state := os.waitid(os.P_PIDFD, self.pidfd, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
            assert time.monotonic() < deadline, f"controller {self.pid} does not stop; phases so far {self.phases}"
            select.select([], [], [], 0.001)
        assert state.si_code == os.CLD_STOPPED, f"controller {self.pid} ended in phases {self.phases}"

    def go_on(self) -> None:
        self.await_stop()
        signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def receive_remote(self, url: str, **faults: Any) -> None:
        """The same from another host."""
        lab = self._lab
        self.receive(url, ram=lab.ram_fd, pulse=lab.pulse, disk=lab.disk, **faults)

    def do(self, what: str, **arguments: Any) -> None:
        self._line.send(json.dumps({"do": what, **arguments}).encode())

    def read(self) -> dict[str, Any]:
        """The next report. Raises Died."""
        if not select.select([self._line], [], [], SECONDS)[0]:
            pytest.fail(f"controller {self.pid} says nothing; phases so far {self.phases}")
        data = self._line.recv(1 << 20)
        if not data:
            raise Died(f"controller {self.pid} ended in phases {self.phases}")
        report: dict[str, Any] = json.loads(data)
        if report.get("phase"):
            self.phases.append(report["phase"])
        elif "path" in report:
            self.paths.append((report["path"], report["exists"]))
        elif "event" in report:
            self.events.append(report["event"])
        return report

    def wait_event(self, event: str) -> None:
        while self.read().get("event") != event:
            pass

    def wait_phase(self, phase: str) -> None:
        while self.read().get("phase") != phase:
            pass

    def done(self, what: str) -> dict[str, Any]:
        """The outcome of a command. Raises Died."""
        while (report := self.read()).get("done") != what:
            pass
        return report

    def call(self, what: str, **arguments: Any) -> dict[str, Any]:
        self.do(what, **arguments)
        return self.done(what)

    def receive(self, url: str, **faults: Any) -> None:
        """Returns when it listens."""
        self.do("receive", url=url, **faults)
        self.wait_event("migration-receive-ready")

    def fds_come_down_to(self, limit: int) -> bool:
        """Whether no more descriptors stay open; zmq closes its own a little later, in a thread of its own."""
        deadline = time.monotonic() + SECONDS
        while self.call("fds")["fds"] > limit:
            if time.monotonic() > deadline:
                return False
        return True

    @property
    def ended(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def kill(self) -> None:
        if not self.ended:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        if self.exit_status is None:
            assert select.select([self.pidfd], [], [], SECONDS)[0], f"controller {self.pid} does not end"
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            assert result is not None
            self.exit_status = result.si_status

    def close(self) -> None:
        self.kill()
        os.close(self.pidfd)
        self._line.close()


class Lab:
    """One guest, and the controllers that may run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ram_fd = memfd("toy_ram", PAGE)
        self.pulse = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.ram = Ram(self.ram_fd)
        self.url = f"unix:{folder}/sock"
        self.disk = str(folder / "disk")
        Path(self.disk).write_bytes(bytes(512))
        self._remotes: list[Remote] = []

    def controller(self) -> Remote:
        remote = Remote(self)
        self._remotes.append(remote)
        return remote

    def source(self) -> Remote:
        """A controller whose guest runs."""
        remote = self.controller()
        remote.call("boot", ram=self.ram_fd, pulse=self.pulse)
        self.runs_on(remote)
        return remote

    def remote_source(self) -> Remote:
        """A controller whose guest runs and can be copied to another host."""
        remote = self.controller()
        remote.call("boot", ram=self.ram_fd, pulse=self.pulse, disk=self.disk)
        self.runs_on(remote)
        return remote

    def pass_time(self, seconds: float) -> None:
        """Not a wait for anything: a clock is what is tested."""
        select.select([], [], [], seconds)

    def beats(self) -> bool:
        """Whether the guest runs, somewhere; waits for it."""
        try:
            os.eventfd_read(self.pulse)
        except BlockingIOError:
            pass
        return bool(select.select([self.pulse], [], [], SECONDS)[0])

    def runs_on(self, remote: Remote) -> None:
        """Exactly one guest, and it is this controller's."""
        deadline = time.monotonic() + SECONDS
        while True:
            assert self.beats(), "the guest does not run"
            owner = self.ram.owner
            if owner and is_alive(owner) and _parent(owner) == remote.pid:
                break
            assert time.monotonic() < deadline, f"the guest's runner {owner} is not controller {remote.pid}'s"
        assert self.ram.violations == 0, "two ran the guest at once"

    def is_dead(self) -> None:
        """Nobody runs the guest. True only once its controllers have been waited for."""
        owner = self.ram.owner
        deadline = time.monotonic() + SECONDS
        while owner and is_alive(owner):
            assert time.monotonic() < deadline, f"runner {owner} still lives"
        assert self.ram.violations == 0

    def disk_is_free(self) -> None:
        """Nobody has the disk's lock: what a killed controller has started ends a moment later than it."""
        deadline = time.monotonic() + SECONDS
        with open(self.disk, "rb") as disk:
            while is_locked(disk.fileno()):
                assert time.monotonic() < deadline, "the disk is still locked"
                select.select([], [], [], 0.001)

    def migrate(self, source: Remote, destination: Remote, **faults: Any) -> None:
        """One that must work."""
        destination.receive(self.url)
        report = source.call("send", url=self.url, **faults)
        assert report["error"] is None, report["error"]
        assert destination.done("receive")["error"] is None
        self.runs_on(destination)

    def copy(self, source: Remote, destination: Remote, **faults: Any) -> None:
        """One to another host that must work."""
        destination.receive_remote(self.url)
        report = source.call("send", url=self.url, **faults)
        assert report["error"] is None, report["error"]
        assert destination.done("receive")["error"] is None
        self.runs_on(destination)

    def close(self) -> None:
        for remote in self._remotes:
            remote.close()
        os.close(self.ram_fd)
        os.close(self.pulse)


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture
def lab(runtime_folder: Path) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="mig.") as folder:
        made = Lab(Path(folder))
        yield made
        made.close()
