"""The worker as the zygote starts it: control plane by ZeroMQ, front end on an inherited socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.control import Channel, unlink_endpoint
from shared.errors import ProtocolError
from shared.reactor import Reactor, readable
from shared.worker import CONTRACT
from tests.blk_worker.driver import IN, OK, OUT, Driver, memory_for
from tests.blk_worker.rig import image, sector_bytes
from tests.vhost_frontend import Frontend
from tests.vmm import SECONDS

SIZE = 32
START = """
import sys
from blk_worker.__main__ import main
from shared.worker import Start
name, path, endpoint, disk, vhost = sys.argv[1:]
spec = {"path": path, "readonly": False, "direct": False, "serial": None, "sparse": True, "num_queues": 1,
        "queue_size": 32}
sys.exit(main(Start("blk", name, spec, {"disk": int(disk), "vhost": int(vhost)}, endpoint)))
"""


class Running:
    """A worker process with both its planes."""

    def __init__(self, disk: Path, folder: Path, name: str) -> None:
        self.reactor = Reactor()
        self.endpoint = f"ipc://{folder}/{name}"
        ours, theirs = socket.socketpair()
        fds = (os.open(disk, os.O_RDWR), theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, name, str(disk), self.endpoint, *map(str, fds)], pass_fds=fds
        )
        os.close(fds[0])
        theirs.close()
        ours.settimeout(SECONDS)
        self.sock = ours
        self.channel = Channel(self.reactor, self.endpoint, bind=False)

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        return self.reactor.run_until(self.channel.call(verb, SECONDS, **arguments))

    def close(self) -> None:
        """That `shutdown` is answered is not promised: the worker may be gone before its answer is sent."""
        self.reactor.spawn(self.channel.call("shutdown", None), "shutdown")
        pidfd = os.pidfd_open(self.process.pid)
        self.reactor.run_until(readable(self.reactor, pidfd, SECONDS))
        os.close(pidfd)
        assert self.process.wait() == 0
        self.channel.close()
        self.reactor.close()
        self.sock.close()
        unlink_endpoint(self.endpoint)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.raw", 2048)


@pytest.fixture
def worker(disk: Path, runtime_folder: Path) -> Iterator[Running]:
    running = Running(disk, runtime_folder, "_disk0")
    yield running
    running.close()


def test_contract_from_hello_to_a_successor(worker: Running, disk: Path, runtime_folder: Path) -> None:
    who = {"kind": "blk_worker", "version": 1, "pid": worker.process.pid, "contract": CONTRACT}
    assert worker.call("hello") == who
    memory = memory_for(1, SIZE)
    drive = Driver(memory, SIZE, indirect=True)
    frontend = Frontend(worker.sock, memory, [drive])
    assert len(frontend.config()) == 60
    frontend.start(drive, 0)
    assert drive.do(OUT, 3, sector_bytes(3, 1))[0] == OK
    first, second = worker.call("heartbeat"), worker.call("heartbeat")
    assert first["epoch"] <= second["epoch"]
    assert worker.call("stats")["write_ops"] == 1
    with pytest.raises(ProtocolError):
        worker.call("save")

    assert worker.call("quiesce") == {"bases": {0: 1}}
    drive.submit(IN, 3, length=512)
    drive.kick()
    saved = worker.call("save")
    assert saved["kind"] == "blk_worker"
    assert drive.used_idx() == 1

    successor = Running(disk, runtime_folder, "_disk0.2")
    successor.call("load", **saved)
    after = Frontend(successor.sock, memory, [drive])
    after.start(drive, 1)
    assert list(drive.wait(1).values()) == [(OK, sector_bytes(3, 1))]
    assert after.stop(drive) == 2
    after.close()
    successor.close()

    worker.call("resume")
    frontend.close()
    drive.close()
    memory.close()


@pytest.mark.parametrize("bad", [{"kind": "console_worker"}, {"version": 99}, {"state": {}}], ids=str)
def test_foreign_state_is_refused(worker: Running, bad: dict[str, Any]) -> None:
    worker.call("quiesce")
    saved = worker.call("save")
    with pytest.raises(ProtocolError):
        worker.call("load", **(saved | bad))
    assert worker.call("save") == saved


def test_fault_by_message(worker: Running) -> None:
    worker.call("fault", what="delay", value=1)
    worker.call("fault", what="clear")
    with pytest.raises(ProtocolError, match="unknown fault"):
        worker.call("fault", what="explode")


def test_flush_is_answered_once_the_disk_has_everything(worker: Running) -> None:
    assert worker.call("flush") == {}
