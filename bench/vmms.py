"""Two VMMs between which a guest moves locally, behind one small interface: ours, Cloud Hypervisor's and QEMU's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from bench import programs
from bench.boot import QEMU_CPU
from bench.errors import BenchError
from bench.processes import Child

SHM: Final = Path("/dev/shm")


class Pair(ABC):
    """One source and one destination. `*_command` start them; the caller does so and tells by started()."""

    source_command: list[str]
    destination_command: list[str]

    def __init__(self) -> None:
        self.children: dict[str, Child] = {}

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        """What is no process of the caller's goes."""
        self.children.clear()

    def started(self, side: str, child: Child) -> None:
        self.children[side] = child

    @abstractmethod
    def prepare(self, patience: float) -> None:
        """Everything that can be done before the migration."""

    @abstractmethod
    def migrate(self, patience: float) -> None:
        """Returns when the migration is complete. Raises BenchError."""

    @abstractmethod
    def finish(self, patience: float) -> dict[str, float]:
        """The VMM's own count of the downtime, where it has one, as own_downtime_ms."""

    def complaints(self) -> str:
        return "; ".join(f"{side}: {child.errors or 'silent'}" for side, child in self.children.items())


class FlotillaPair(Pair):
    """By the commands of Cloud Hypervisor's live-migration document."""

    send: ClassVar[tuple[str, ...]] = ("send-migration", "--local", "unix:{}")
    receive: ClassVar[tuple[str, ...]] = ("receive-migration", "unix:{}")

    def __init__(self, folder: Path, kernel: str, words: str, size: str) -> None:
        super().__init__()
        self.folder = folder
        program = self.program()
        self.source_command = [
            *program, "--api-socket", f"{folder}/api1", "--kernel", kernel, "--cmdline", words, "--cpus", "boot=1",
            "--memory", f"size={size},shared=on", "--serial", "tty", "--console", "off",
        ]  # fmt: skip
        self.destination_command = [*program, "--api-socket", f"{folder}/api2"]

    def program(self) -> list[str]:
        return programs.ours("flotilla")

    def remote_program(self) -> list[str]:
        return programs.ours("ch-remote")

    def remote(self, api: str, *words: str) -> subprocess.Popen[str]:
        command = [*self.remote_program(), "--api-socket", f"{self.folder}/{api}", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True,
            env=programs.environment(),
        )  # fmt: skip

    def prepare(self, patience: float) -> None:
        for api in ("api1", "api2"):
            _wait(partial(self._answers, api), patience, f"answer on {api}")

    def _answers(self, api: str) -> bool:
        with self.remote(api, "ping") as process:
            process.communicate()
        return process.returncode == 0

    def migrate(self, patience: float) -> None:
        path = self.folder / "migration"
        with contextlib.ExitStack() as stack:
            receiver = stack.enter_context(self.remote("api2", *(word.format(path) for word in self.receive)))
            stack.callback(receiver.kill)
            _wait(lambda: path.exists() or receiver.poll() is not None, patience, "socket of receive-migration")
            sender = stack.enter_context(self.remote("api1", *(word.format(path) for word in self.send)))
            stack.callback(sender.kill)
            for name, process in (("send", sender), ("receive", receiver)):
                _must_succeed(f"{name}-migration", process, patience)

    def finish(self, patience: float) -> dict[str, float]:
        try:
            code = self.children["source"].process.wait(patience)
        except subprocess.TimeoutExpired:
            raise BenchError(f"the source VMM is still there {patience:.0f} s after the migration") from None
        if code:
            raise BenchError(f"the source VMM ended with {code}")
        return self._own_count(patience)

    def _own_count(self, patience: float) -> dict[str, float]:
        with self.remote("api2", "migration-progress") as process:
            said, _ = process.communicate(timeout=patience)
        downtime = json.loads(said)["downtime_ms"] if process.returncode == 0 else None
        return {} if downtime is None else {"own_downtime_ms": float(downtime)}


class UpstreamPair(FlotillaPair):
    """Upstream of the version that options belong to (v52 and later). Its own seccomp filter kills a migration."""

    send = ("send-migration", "destination_url=unix:{},local=on")
    receive = ("receive-migration", "receiver_url=unix:{}")

    def program(self) -> list[str]:
        binary = programs.cloud_hypervisor()
        if not binary:
            raise BenchError("no binary given (see bench/programs.py)")
        return [binary, "--seccomp", "false", "-v"]

    def remote_program(self) -> list[str]:
        return [programs.cloud_hypervisor_remote()]

    def finish(self, patience: float) -> dict[str, float]:
        return super().finish(patience)

    def _own_count(self, patience: float) -> dict[str, float]:
        text = (self.folder / "source.stderr").read_text(errors="replace")
        match = re.search(r"downtime of (\d+)ms", text)
        return {"own_downtime_ms": float(match[1])} if match else {}


class QemuPair(Pair):
    """microvm with its RAM in a file that both map, x-ignore-shared: what QEMU calls a local migration."""

    def __init__(self, folder: Path, kernel: str, words: str, size: str) -> None:
        super().__init__()
        self.folder = folder
        self.ram = SHM / f"{folder.name}.ram"
        self._monitors: dict[str, Monitor] = {}
        program = programs.qemu()

        def command(side: str) -> list[str]:
            return [
                program, "-accel", "kvm", "-M", "microvm,memory-backend=ram", "-cpu", QEMU_CPU, "-m", size,
                "-object", f"memory-backend-file,id=ram,mem-path={self.ram},size={size},share=on", "-nodefaults",
                "-display", "none", "-kernel", kernel, "-append", words, "-serial", "stdio",
                "-qmp", f"unix:{folder}/{side}.qmp,server=on,wait=off",
            ]  # fmt: skip

        self.source_command = command("source")
        self.destination_command = [*command("destination"), "-incoming", "defer"]

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for monitor in self._monitors.values():
            monitor.close()
        self.ram.unlink(missing_ok=True)

    def prepare(self, patience: float) -> None:
        for side in ("source", "destination"):
            monitor = self._monitors[side] = Monitor(self.folder / f"{side}.qmp", patience)
            capabilities = [{"capability": "x-ignore-shared", "state": True}]
            monitor.call("migrate-set-capabilities", capabilities=capabilities)
        self._monitors["source"].call("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 300})
        self._monitors["destination"].call("migrate-incoming", uri=f"unix:{self.folder}/migration")

    def migrate(self, patience: float) -> None:
        self._monitors["source"].call("migrate", uri=f"unix:{self.folder}/migration")
        _wait(lambda: self._status()["status"] == "completed", patience, "end of QEMU's migration")

    def _status(self) -> dict[str, Any]:
        report: dict[str, Any] = self._monitors["source"].call("query-migrate")
        if report["status"] in ("failed", "cancelled"):
            raise BenchError(f"QEMU's migration {report['status']}: {report.get('error-desc', 'no reason given')}")
        return report

    def finish(self, patience: float) -> dict[str, float]:
        return {"own_downtime_ms": float(self._status()["downtime"])}


class FlotillaRemotePair(FlotillaPair):
    """The same as if to another host: RAM is copied, by `way` tcp or unix. `copied` has the rounds after finish()."""

    def __init__(self, folder: Path, kernel: str, words: str, size: str, way: str, downtime_ms: int) -> None:
        super().__init__(folder, kernel, words, size)
        self.way = way
        self.downtime_ms = downtime_ms
        self.copied: dict[str, Any] = {}
        self.url = f"unix:{folder}/migration" if way == "unix" else f"tcp:127.0.0.1:{free_port()}"

    def migrate(self, patience: float) -> None:
        with contextlib.ExitStack() as stack:
            receiver = stack.enter_context(self.remote("api2", "receive-migration", self.url))
            stack.callback(receiver.kill)
            ready = partial(_listens, self.url)
            _wait(lambda: ready() or receiver.poll() is not None, patience, "receive-migration that listens")
            words = f"destination_url={self.url},downtime_ms={self.downtime_ms},timeout_s={patience:.0f}"
            sender = stack.enter_context(self.remote("api1", "send-migration", words))
            stack.callback(sender.kill)
            for name, process in (("send", sender), ("receive", receiver)):
                _must_succeed(f"{name}-migration", process, patience)

    def _own_count(self, patience: float) -> dict[str, float]:
        with self.remote("api2", "migration-progress") as process:
            said, _ = process.communicate(timeout=patience)
        progress = json.loads(said)
        copied = self.copied = progress["breakdown"]["copied"]
        total = copied["copy_ms"] + float(progress["downtime_ms"])
        return {
            "own_downtime_ms": float(progress["downtime_ms"]),
            "own_total_ms": total,
            "wire_mb": progress["page_bytes"] / 1e6,
            "mb_per_s": progress["page_bytes"] / total / 1e3,
            "first_round_mb_per_s": copied["rounds"][0]["bytes"] / copied["rounds"][0]["ms"] / 1e3,
            "rounds": len(copied["rounds"]) + 1,
        }


class QemuRemotePair(QemuPair):
    """microvm with anonymous RAM; the one channel that QEMU has unless told otherwise, with no limit but the
    machine."""

    def __init__(self, folder: Path, kernel: str, words: str, size: str, way: str, downtime_ms: int) -> None:
        super().__init__(folder, kernel, words, size)
        self.downtime_ms = downtime_ms
        self.uri = f"unix:{folder}/migration" if way == "unix" else f"tcp:127.0.0.1:{free_port()}"

        def anonymous(command: list[str]) -> list[str]:
            return [word.replace("microvm,memory-backend=ram", "microvm") for word in _without(command, "-object")]

        self.source_command = anonymous(self.source_command)
        self.destination_command = anonymous(self.destination_command)

    def prepare(self, patience: float) -> None:
        for side in ("source", "destination"):
            self._monitors[side] = Monitor(self.folder / f"{side}.qmp", patience)
        limits = {"max-bandwidth": 1 << 40, "downtime-limit": self.downtime_ms}
        self._monitors["source"].call("migrate-set-parameters", **limits)
        self._monitors["destination"].call("migrate-incoming", uri=self.uri)

    def migrate(self, patience: float) -> None:
        self._monitors["source"].call("migrate", uri=self.uri)
        _wait(lambda: self._status()["status"] == "completed", patience, "end of QEMU's migration")

    def finish(self, patience: float) -> dict[str, float]:
        status = self._status()
        ram = status["ram"]
        return {
            "own_downtime_ms": float(status["downtime"]),
            "own_total_ms": float(status["total-time"]),
            "wire_mb": ram["transferred"] / 1e6,
            "mb_per_s": ram["transferred"] / max(1, status["total-time"]) / 1e3,
            "rounds": float(ram["dirty-sync-count"]),
        }


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(url: str) -> bool:
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        return os.path.exists(rest)
    port = f":{int(rest.rpartition(':')[2]):04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(port) and line.split()[3] == "0A" for line in lines)


def _without(command: list[str], flag: str) -> list[str]:
    """The command without a flag and its value."""
    at = command.index(flag)
    return command[:at] + command[at + 2 :]


class Monitor:
    """A QMP connection."""

    def __init__(self, path: Path, patience: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(patience)
        _wait(lambda: self._socket.connect_ex(os.fspath(path)) == 0, patience, f"answer on {path.name}")
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.call("qmp_capabilities")

    def call(self, name: str, **arguments: Any) -> Any:
        """Raises BenchError with QEMU's words."""
        self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._file.flush()
        while line := self._file.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise BenchError(f"QEMU refuses {name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise BenchError(f"QEMU ended during {name}")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _must_succeed(name: str, process: subprocess.Popen[str], patience: float) -> None:
    try:
        said, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{name} does not end within {patience:.0f} s") from None
    if process.returncode:
        raise BenchError(f"{name} ended with {process.returncode}: {' '.join(said.split())}")


def _wait(check: Callable[[], bool], patience: float, what: str) -> None:
    end = time.monotonic() + patience
    while not check():
        if time.monotonic() > end:
            raise BenchError(f"no {what} within {patience:.0f} s")
        time.sleep(0.005)
