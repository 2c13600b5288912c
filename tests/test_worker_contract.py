"""The contract of every worker (shared/worker.py), held to by each of them: real processes, forked by the real zygote.

A subject is a kind of worker with whatever it needs to be busy: guest memory, a front end and a driver for the devices,
nothing for the toy. `request()` gives it one unit of work, `finished()` tells how many of those it has completed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from controller.fleet import Fleet, Process, WorkerSpec
from controller.pci.virtio import Virtqueue
from controller.vhost_frontend import Frontend
from shared.errors import FlotillaError, ProtocolError, WorkerError
from shared.memory import GuestMemory
from shared.messages import Verb
from shared.reactor import Reactor
from shared.records import replace
from tests.controller.processes import SECONDS, Turned, running
from tests.network import Network, frame
from tests.other_worker import program
from tests.virtqueue import Driver, queue_of

SECTOR = 512
VERSION_1 = 1 << 32


class Subject(Turned):
    """One worker process. Subclasses say how to start it and how to make it work."""

    kind = ""
    has_rings = True
    # A state that no save() ever gives.
    broken_state: dict[str, Any] = {}

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        super().__init__(reactor)
        self.fleet, self.folder = fleet, folder
        self.memory: GuestMemory | None = None
        self.driver: Driver | None = None
        self.frontends: dict[str, Frontend] = {}
        self.done = 0
        self.process: Process

    def spec(self) -> tuple[WorkerSpec, dict[str, int]]:
        """What to start, and the descriptors beside the vhost-user sockets."""
        raise AssertionError("a subject says what to start")

    def start(self, **how: Any) -> None:
        """`how`: fields of the WorkerSpec."""
        spec, fds = self.spec()
        spec = replace(spec, **how)
        pairs = {name: socket.socketpair() for name in self.frontends}
        sockets = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        self.process = self.run(self.fleet.start(spec, {**fds, **sockets}, lambda _: None))
        for fd in fds.values():
            os.close(fd)
        for name, (ours, theirs) in pairs.items():
            theirs.close()
            ours.setblocking(False)
            self.run(self.frontends[name].replay(ours))
        self.activate()

    def activate(self) -> None:
        pass

    def request(self) -> None:
        pass

    def finished(self) -> int:
        if self.driver is not None:
            self.done += len(self.driver.completed())
        return self.done

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.run(self.process.call(verb, SECONDS, **arguments))
        return answer

    def close(self) -> None:
        for frontend in self.frontends.values():
            frontend.close()
        if self.driver is not None:
            self.driver.close()
        if self.memory is not None:
            self.memory.close()

    def queue(self) -> Virtqueue:
        assert self.driver is not None
        return queue_of(self.driver)

    def with_memory(self, *names: str) -> None:
        self.memory = GuestMemory.create(1 << 20)
        self.driver = Driver(self.memory, 0x10000, 0, size=16)
        self.frontends = {name: Frontend(self.reactor, self.memory, name) for name in names}


class ToySubject(Subject):
    kind = "toy"
    has_rings = False

    def spec(self) -> tuple[WorkerSpec, dict[str, int]]:
        return WorkerSpec("toy", "_toy0", "tests.toy_worker", "worker", {"count": 5}), {}


class BlkSubject(Subject):
    kind = "blk_worker"
    broken_state = {"avail_features": 0}

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        super().__init__(reactor, fleet, folder)
        self.with_memory("vhost")
        self.image = folder / "disk.raw"
        self.image.write_bytes(os.urandom(64 * SECTOR))

    def spec(self) -> tuple[WorkerSpec, dict[str, int]]:
        spec = {"path": str(self.image), "num_queues": 1, "queue_size": 16}
        made = WorkerSpec("blk", "_disk0", "blk_worker.__main__", "worker", spec)
        return made, {"disk": os.open(self.image, os.O_RDWR | os.O_CLOEXEC)}

    def activate(self) -> None:
        self.run(self.frontends["vhost"].activate(VERSION_1, (self.queue(),)))

    def request(self) -> None:
        """Read sector 3."""
        assert self.driver is not None
        header = (0).to_bytes(4, "little") + bytes(4) + (3).to_bytes(8, "little")
        self.driver.add([header], [SECTOR, 1])
        self.driver.kick()


class ConsoleSubject(Subject):
    kind = "console_worker"
    broken_state = {"console": {"in_buffer": "no bytes"}}

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        super().__init__(reactor, fleet, folder)
        self.with_memory("console", "rng")

    def spec(self) -> tuple[WorkerSpec, dict[str, int]]:
        spec = {"console": {"mode": "null", "path": ""}, "rng": {"src": "/dev/urandom"}}
        return WorkerSpec("console", "console", "console_worker.__main__", "worker", spec), {}

    def activate(self) -> None:
        self.run(self.frontends["rng"].activate(VERSION_1, (self.queue(),)))

    def request(self) -> None:
        """Ask for 32 random bytes."""
        assert self.driver is not None
        self.driver.add([], [32])
        self.driver.kick()


class NetSubject(Subject):
    kind = "net_worker"
    broken_state = {"pairs": 1}

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        super().__init__(reactor, fleet, folder)
        self.with_memory("vhost")
        assert self.driver is not None
        self.driver.index = 1
        self.network = Network()

    def spec(self) -> tuple[WorkerSpec, dict[str, int]]:
        spec = {
            "mac": "52:54:00:12:34:56", "mtu": 1500, "queue_pairs": 1, "queue_size": 16,
            "offload_tso": True, "offload_ufo": True, "offload_csum": True,
        }  # fmt: skip
        made = WorkerSpec("net", "_net1", "net_worker.__main__", "worker", spec)
        return made, {"tap0": os.dup(self.network.fds[0])}

    def activate(self) -> None:
        self.run(self.frontends["vhost"].activate(VERSION_1, (self.queue(),)))

    def request(self) -> None:
        """Send a frame."""
        assert self.driver is not None
        self.driver.add([bytes(12) + frame(1)])
        self.driver.kick()

    def close(self) -> None:
        super().close()
        self.network.close()


SUBJECTS = (ToySubject, BlkSubject, ConsoleSubject, NetSubject)
with_rings = pytest.mark.parametrize("cls", SUBJECTS[1:], ids=lambda cls: cls.kind)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Subject]]:
    made: list[Subject] = []
    with running(str(tmp_path)) as (reactor, fleet):

        def start(cls: type[Subject], **how: Any) -> Subject:
            made.append(cls(reactor, fleet, tmp_path))
            made[-1].start(**how)
            return made[-1]

        yield start
        for subject in made:
            subject.close()


@pytest.fixture(params=SUBJECTS, ids=lambda cls: cls.kind)
def cls(request: pytest.FixtureRequest) -> type[Subject]:
    chosen: type[Subject] = request.param
    return chosen


@pytest.fixture
def worker(make: Callable[..., Subject], cls: type[Subject]) -> Subject:
    return make(cls)


def lives(worker: Subject) -> bool:
    return bool(worker.call(Verb.HELLO)["pid"] == worker.process.pid)


def test_hello_says_who_it_is(worker: Subject) -> None:
    answer = worker.call(Verb.HELLO)
    assert (answer["kind"], answer["pid"]) == (worker.kind, worker.process.pid)
    assert answer["version"] >= 1


def test_heartbeat_is_an_epoch_that_never_falls(worker: Subject) -> None:
    epochs = [worker.call(Verb.HEARTBEAT)["epoch"] for _ in range(3)]
    assert all(type(epoch) is int for epoch in epochs) and epochs == sorted(epochs)


@with_rings
def test_heartbeat_goes_on_while_rings_run(worker: Subject) -> None:
    first = worker.call(Verb.HEARTBEAT)["epoch"]
    worker.until(lambda: worker.call(Verb.HEARTBEAT)["epoch"] > first)


def test_stats_are_counters_that_work_moves(worker: Subject) -> None:
    before = worker.call(Verb.STATS)
    assert before and all(type(value) is int and value >= 0 for value in before.values())
    if worker.has_rings:
        worker.request()
        worker.until(lambda: worker.finished() == 1)
        worker.until(lambda: worker.call(Verb.STATS) != before)


def test_quiesce_answers_the_bases_of_its_rings(worker: Subject) -> None:
    if worker.has_rings:
        worker.request()
        worker.until(lambda: worker.finished() == 1)
    bases = worker.call(Verb.QUIESCE)["bases"]
    assert all(type(base) is int for base in bases.values())
    assert sorted(bases.values()) == ([1] if worker.has_rings else [])


@with_rings
def test_nothing_is_touched_between_quiesce_and_resume(worker: Subject) -> None:
    worker.call(Verb.QUIESCE)
    assert worker.memory is not None and worker.driver is not None
    with suppress(BlockingIOError):
        os.eventfd_read(worker.driver.call_fd)  # of before the answer
    worker.request()
    before = worker.memory.read(0, worker.memory.size)
    worker.call(Verb.STATS)  # a turn of its main loop, kick included
    worker.call(Verb.STATS)
    assert worker.memory.read(0, worker.memory.size) == before
    with pytest.raises(BlockingIOError):
        os.eventfd_read(worker.driver.call_fd)
    worker.call(Verb.RESUME)
    worker.until(lambda: worker.finished() == 1)


@with_rings
@pytest.mark.parametrize("executed", [False, True], ids=["forked", "executed"])
def test_worker_on_standby_touches_nothing_until_resume(
    make: Callable[..., Subject], cls: type[Subject], tmp_path: Path, executed: bool
) -> None:
    """Also as a program of its own (docs/worker-upgrade.md)."""
    worker = make(cls, standby=True, program=program(tmp_path) if executed else "")
    assert worker.memory is not None and worker.process.name.endswith(".new")
    worker.request()
    before = worker.memory.read(0, worker.memory.size)
    worker.call(Verb.STATS)
    worker.call(Verb.STATS)
    assert worker.memory.read(0, worker.memory.size) == before
    bases = worker.call(Verb.QUIESCE)["bases"]
    assert bases and set(bases.values()) == {0}
    worker.call(Verb.RESUME)
    worker.until(lambda: worker.finished() == 1)


def test_work_goes_on_after_many_rounds_and_nothing_is_done_twice(worker: Subject) -> None:
    for number in range(1, 6):
        worker.request()
        worker.call(Verb.QUIESCE)
        worker.call(Verb.RESUME)
        if worker.has_rings:
            worker.until(lambda number=number: worker.finished() >= number)  # type: ignore[misc]
    assert worker.finished() == (5 if worker.has_rings else 0)


def test_quiesce_and_resume_may_come_twice(worker: Subject) -> None:
    first = worker.call(Verb.QUIESCE)
    assert worker.call(Verb.QUIESCE) == first
    worker.call(Verb.RESUME)
    worker.call(Verb.RESUME)
    worker.request()
    if worker.has_rings:
        worker.until(lambda: worker.finished() == 1)


@with_rings
def test_save_before_quiesce_is_refused(worker: Subject) -> None:
    with pytest.raises(ProtocolError, match="save before quiesce"):
        worker.call(Verb.SAVE)
    assert lives(worker)


def test_saved_state_loads_into_a_fresh_worker_and_is_the_same_there(
    worker: Subject, make: Callable[[type[Subject]], Subject]
) -> None:
    worker.call(Verb.QUIESCE)
    saved = worker.call(Verb.SAVE)
    assert set(saved) == {"kind", "version", "state"} and saved["kind"] == worker.kind
    other = make(type(worker))
    other.call(Verb.QUIESCE)
    other.call(Verb.LOAD, **saved)
    again = other.call(Verb.SAVE)
    assert again == saved
    other.call(Verb.RESUME)
    other.request()
    if other.has_rings:
        other.until(lambda: other.finished() == 1)


def test_saving_changes_nothing(worker: Subject) -> None:
    worker.call(Verb.QUIESCE)
    assert worker.call(Verb.SAVE) == worker.call(Verb.SAVE)
    worker.call(Verb.RESUME)
    worker.request()
    if worker.has_rings:
        worker.until(lambda: worker.finished() == 1)


def test_another_kinds_state_is_refused(worker: Subject) -> None:
    worker.call(Verb.QUIESCE)
    with pytest.raises(ProtocolError, match=f"state of kind 'gpu_worker' given to a {worker.kind}"):
        worker.call(Verb.LOAD, kind="gpu_worker", version=1, state={})
    assert lives(worker)


def test_a_newer_version_is_refused(worker: Subject) -> None:
    worker.call(Verb.QUIESCE)
    with pytest.raises(ProtocolError, match=f"{worker.kind} state has version 99, this release reads .*newer one"):
        worker.call(Verb.LOAD, kind=worker.kind, version=99, state={})
    assert lives(worker)


@with_rings
def test_a_state_that_cannot_be_read_is_refused_and_the_old_one_stays(worker: Subject) -> None:
    worker.call(Verb.QUIESCE)
    before = worker.call(Verb.SAVE)
    with pytest.raises(FlotillaError):
        worker.call(Verb.LOAD, **{**before, "state": worker.broken_state})
    assert worker.call(Verb.SAVE) == before


@pytest.mark.parametrize(("version", "state"), [(2, {"number": "7"}), (3, {"number": 7}), (4, {"count": 7})])
def test_every_known_version_is_loaded_and_saved_as_the_present_one(
    make: Callable[[type[Subject]], Subject], version: int, state: dict[str, Any]
) -> None:
    toy = make(ToySubject)
    toy.call(Verb.QUIESCE)
    toy.call(Verb.LOAD, kind="toy", version=version, state=state)
    assert toy.call(Verb.SAVE) == {"kind": "toy", "version": 4, "state": {"count": 7}}


def test_a_version_older_than_the_oldest_is_refused_and_the_old_state_stays(
    make: Callable[[type[Subject]], Subject],
) -> None:
    toy = make(ToySubject)
    toy.call(Verb.QUIESCE)
    with pytest.raises(ProtocolError, match=r"toy state has version 1, this release reads 2 to 4 \(take it through"):
        toy.call(Verb.LOAD, kind="toy", version=1, state={"count": 7})
    assert toy.call(Verb.SAVE)["state"] == {"count": 5}


def test_a_state_that_an_upgrade_cannot_read_is_refused_by_its_own_version(
    make: Callable[[type[Subject]], Subject],
) -> None:
    toy = make(ToySubject)
    with pytest.raises(ProtocolError, match="toy state of version 2 can't be read: ValueError"):
        toy.call(Verb.LOAD, kind="toy", version=2, state={"number": "many"})
    assert lives(toy)


def test_an_unknown_verb_is_a_typed_error(worker: Subject) -> None:
    with pytest.raises(ProtocolError, match="unknown verb 'dance'"):
        worker.call("dance")
    assert lives(worker)


def test_a_verb_of_another_process_is_a_typed_error(worker: Subject) -> None:
    with pytest.raises(ProtocolError, match="does not serve 'receive'"):
        worker.call(Verb.RECEIVE, url="unix:/nowhere")
    assert lives(worker)


def test_a_missing_field_is_a_typed_error(worker: Subject) -> None:
    with pytest.raises(ProtocolError, match="load: field kind is missing"):
        worker.call(Verb.LOAD)
    assert lives(worker)


def test_log_level_is_taken_and_a_wrong_one_is_refused(worker: Subject) -> None:
    assert worker.call(Verb.LOG_LEVEL, level="debug") == {}
    with pytest.raises(WorkerError, match="log level 'loud'"):
        worker.call(Verb.LOG_LEVEL, level="loud")
    assert lives(worker)


def test_shutdown_ends_with_zero(worker: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.fleet.STOP_SECONDS", SECONDS)
    worker.run(worker.fleet.stop(worker.process))
    assert worker.process.exit_status == 0


def test_shutdown_ends_with_zero_while_quiet(worker: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.fleet.STOP_SECONDS", SECONDS)
    worker.call(Verb.QUIESCE)
    worker.run(worker.fleet.stop(worker.process))
    assert worker.process.exit_status == 0
