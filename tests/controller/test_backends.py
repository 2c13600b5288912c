"""controller.backends: a worker that can't start, starts late, or is asked to end while it starts. Real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.backends import LAST_DELAY, Backend, BackendState
from controller.fleet import Fleet, WorkerSpec
from controller.vhost_frontend import Frontend
from shared.errors import WorkerError
from shared.memory import GuestMemory
from shared.reactor import Reactor, sleep
from tests.controller.processes import SECONDS, Turned, running


class Rig(Turned):
    """A fleet, and back ends that are closed at the end."""

    def __init__(self, reactor: Reactor, fleet: Fleet) -> None:
        super().__init__(reactor)
        self.fleet = fleet
        self.memory = GuestMemory.create(1 << 20)
        self.made: list[Backend] = []

    def toy(self, **spec: Any) -> Backend:
        """A worker without devices."""
        return self._backend(WorkerSpec("toy", "_toy0", "tests.toy_worker", "worker", spec), {}, {})

    def disk(self, image: int, **spec: Any) -> Backend:
        """A block worker; `image` may be anything open."""
        spec = {"path": "disk.raw", **spec}
        frontends = {"vhost": Frontend(self.reactor, self.memory, "_disk0")}
        worker = WorkerSpec("blk", "_disk0", "blk_worker.__main__", "worker", spec)
        return self._backend(worker, frontends, {"disk": image})

    def _backend(self, spec: WorkerSpec, frontends: dict[str, Frontend], fds: dict[str, int]) -> Backend:
        self.made.append(Backend(self.reactor, self.fleet, spec, frontends, fds))
        return self.made[-1]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(str(tmp_path)) as (reactor, fleet):
        made = Rig(reactor, fleet)
        yield made
        for backend in made.made:
            made.run(backend.close())
        made.memory.close()


def test_worker_that_can_not_start_fails_after_a_few_tries_with_its_reason(rig: Rig) -> None:
    backend = rig.toy(lacks="moon")
    with pytest.raises(WorkerError, match=r"_toy0: no worker serves it: .*this host has no moon"):
        rig.run(backend.start())
    row = backend.row()
    assert row is not None
    assert (row["state"], row["restarts"], row["pid"]) == ("quarantined", 3, 0)
    assert "this host has no moon" in rig.fleet.supervision.columns("toy", "_toy0")["last_reason"]
    assert rig.fleet.processes == []


def test_who_needs_a_worker_that_can_not_start_is_told_device_and_reason(rig: Rig, tmp_path: Path) -> None:
    image = os.open(tmp_path, os.O_RDONLY)  # a folder is no disk
    backend = rig.disk(image)
    os.close(image)
    task = rig.reactor.spawn(backend.start_for_good())
    with pytest.raises(WorkerError, match=r"_disk0: no worker serves it: .*neither a file nor a block device"):
        rig.run(backend.wait_serving(SECONDS))
    assert not task.done()


def test_worker_that_can_not_start_is_tried_again_until_it_can(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"")  # not one sector
    image = os.open(path, os.O_RDWR)
    backend = rig.disk(image)
    os.close(image)
    task = rig.reactor.spawn(backend.start_for_good())
    rig.until(lambda: backend.state is BackendState.QUARANTINED)
    path.write_bytes(bytes(4096))
    rig.run(task)
    assert backend.state is BackendState.SERVING and backend.row() is None
    rig.run(backend.wait_serving(SECONDS))


def test_nobody_waits_for_a_worker_that_hangs_for_longer_than_he_said(rig: Rig) -> None:
    backend = rig.toy(hang=True)
    rig.reactor.spawn(backend.start_for_good())
    with pytest.raises(WorkerError, match="_toy0 is still starting"):
        rig.run(backend.wait_serving(0.2))


def test_close_ends_a_worker_that_is_only_coming_up(rig: Rig) -> None:
    backend = rig.toy(hang=True)
    task = rig.reactor.spawn(backend.start_for_good())
    rig.until(lambda: backend.process is not None)
    rig.run(backend.close())
    assert rig.fleet.processes == []
    rig.run(task)


def test_close_ends_a_worker_that_is_being_forked(rig: Rig) -> None:
    backend = rig.toy()
    task = rig.reactor.spawn(backend.start_for_good())
    rig.run(sleep(rig.reactor, 0))
    assert backend.process is None
    rig.run(backend.close())
    rig.run(task)
    assert rig.fleet.processes == []


def test_worker_that_is_dying_when_its_successor_needs_its_place_is_a_loss(rig: Rig) -> None:
    """Whoever notices first: the end of its connection may come before that of its process."""
    backend = rig.toy()
    rig.run(backend.start())
    process = backend.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    clearing = backend._clear()
    clearing.send(None)  # at once: in the reactor its end could be seen first
    rig.run(process.ended.wait())
    assert not process.wanted
    clearing.close()


def test_failed_worker_is_restarting_no_more_when_the_vm_ends(rig: Rig) -> None:
    """The pause between two attempts must not keep anybody: close() returns, and the loop notices by itself."""
    backend = rig.toy(refuse=True)
    task = rig.reactor.spawn(backend.start_for_good())
    rig.until(lambda: backend.state is BackendState.QUARANTINED)
    rig.run(backend.close())
    rig.reactor.run_until(task, LAST_DELAY + SECONDS)
    assert rig.fleet.processes == []
