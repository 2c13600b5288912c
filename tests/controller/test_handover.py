"""controller.handover: a real disk worker under verified load hands over to another process, or does not.

Every program that does wrong is this checkout's own worker, changed in one place (tests/other_worker.py).
"""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.backends import BackendState
from controller.fleet import Fleet, Process
from controller.handover import Handover, Owner, Step, bases_of, differing, less_confined, vet
from controller.sandbox_report import look
from controller.vhost_frontend import Frontend
from controller.vhost_standby import Standby
from controller.watchdog import Limits, Watchdog
from shared.errors import ProtocolError, WorkerError
from shared.memory import GuestMemory
from shared.reactor import Reactor, sleep
from tests.controller.processes import running
from tests.controller.supervised import FLUSH, SECTOR, VERSION_1, Supervised
from tests.other_worker import BEGUN, LIES, STEPS, program
from tests.virtqueue import WRITE, Driver

LANES = 8
READ_REQUEST, WRITE_REQUEST = 0, 1
SECONDS = 120.0
KILLS = int(os.environ.get("FLOTILLA_KILLS", "12"))
NEXT_AND = 1
UNIFORM = 1  # enum blk_shape
pytestmark = pytest.mark.timeout(3 * SECONDS)  # so that a wait which does not end is its test's failure
# Time limits for what is to run into one, the shortest first: on a busy host it may run out before that is reached.
LIMITS = (0.3, 1.0, 3.0, 10.0, 30.0)


class Load:
    """Lanes of a queue; each writes its sector and reads it back, again and again, and looks at what it gets."""

    def __init__(self, reactor: Reactor, memory: GuestMemory, driver: Driver) -> None:
        self.reactor, self.memory, self.driver = reactor, memory, driver
        self.generation, self.done, self.stopping, self.busy = [0] * LANES, 0, False, 0

    def _ask(self, lane: int) -> None:
        """Even turns write, odd ones read what the one before has written."""
        d, turn, at, slot = self.driver, self.generation[lane], self.driver.buffers_at + 0x1000 * lane, 3 * lane
        writes = turn % 2 == 0
        kind = WRITE_REQUEST if writes else READ_REQUEST
        self.memory.write(at, kind.to_bytes(4, "little") + bytes(4) + lane.to_bytes(8, "little"))
        self.memory.write(at + 16, self._content(lane, turn) if writes else bytes(SECTOR))
        self.memory.write(at + 16 + SECTOR, b"\xff")
        d.describe(slot, at, 16, NEXT_AND, slot + 1)
        d.describe(slot + 1, at + 16, SECTOR, NEXT_AND | (0 if writes else WRITE), slot + 2)
        d.describe(slot + 2, at + 16 + SECTOR, 1, WRITE)
        d.offer(slot)
        self.busy += 1

    @staticmethod
    def _content(lane: int, turn: int) -> bytes:
        return (lane << 32 | turn).to_bytes(8, "little") * (SECTOR // 8)

    def _check(self, lane: int) -> None:
        turn, at = self.generation[lane], self.driver.buffers_at + 0x1000 * lane
        assert self.memory.read(at + 16 + SECTOR, 1) == b"\0", f"lane {lane}, turn {turn}: an I/O error"
        if turn % 2:
            assert self.memory.read(at + 16, SECTOR) == self._content(lane, turn - 1), f"lane {lane}, turn {turn}"

    async def run(self) -> None:
        with self.driver.at_once():
            for lane in range(LANES):
                self._ask(lane)
        self.driver.kick()
        while self.busy:
            for head, _ in self.driver.completed():
                lane, self.busy = head // 3, self.busy - 1
                self._check(lane)
                self.generation[lane] += 1
                self.done += 1
                if not self.stopping:
                    self._ask(lane)
            self.driver.kick()
            await sleep(self.reactor, 0.001)


class Rig(Supervised):
    """A disk under load."""

    seconds = SECONDS

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        super().__init__(reactor, fleet, folder)
        self.serve_disk(bytes(64 * SECTOR), VERSION_1 | FLUSH)
        self.load = Load(reactor, self.memory, self.driver)
        self._task = reactor.spawn(self.load.run(), "load")

    def goes_on(self) -> None:
        """Every lane takes a few more turns."""
        wanted = [turn + 4 for turn in self.load.generation]
        self.until(lambda: self._task.done() or all(n >= m for n, m in zip(self.load.generation, wanted, strict=True)))
        assert not self._task.done()

    @property
    def process(self) -> Process:
        assert self.backend.process is not None
        return self.backend.process

    def strike(self, what: str, value: int = 0, **options: int) -> None:
        """All lanes ask anew after this fault, together, and are in flight when this returns."""
        self.load.stopping = True
        self.run(self._task)
        self.run(self.process.call("fault", what=what, value=value, options=options))
        self.load.stopping = False
        self._task = self.reactor.spawn(self.load.run(), "load")
        while not self.run(self.process.call("stats"))["inflight"]:
            pass

    def handover(self, change: str | None = None, ready: float = SECONDS, done: float = SECONDS) -> Handover:
        """Not begun yet. `change`: to a program of another version, which has it."""
        path = "" if change is None else program(self.folder, change)
        return Handover(self.reactor, self.fleet, self.backend, path, ready, done)

    def upgraded(self, change: str | None = None) -> None:
        before = self.process
        made = self.run(self.handover(change).run())
        assert made.old_pid == before.pid and made.new_pid == self.process.pid != before.pid
        assert self.process.name == "_disk0" and before.ended.is_set() and self.fleet.processes == [self.process]
        assert self.events[-1] == ("worker-upgraded", {name: getattr(made, name) for name in made._fields})
        self.goes_on()

    def refused(self, handover: Handover) -> str:
        with pytest.raises(WorkerError) as raised:
            self.run(handover.run())
        assert self.events[-1][0] == "worker-upgrade-failed" or self.events[-2][0] == "worker-upgrade-failed"
        return str(raised.value)

    def kept(self, before: Process) -> None:
        """It never left."""
        assert self.process is before and self.fleet.processes == [before] and not before.aside
        assert self.backend.state is BackendState.SERVING and not self.backend.disturbed
        assert not [event for event, _ in self.events if event == "worker-lost"]
        self.goes_on()

    def close(self) -> None:
        """Of a test that failed while its worker hung, the load never ends."""
        self.load.stopping = True
        try:
            self.reactor.run_until(self._task, SECONDS / 4)
        finally:
            super().close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(str(tmp_path)) as (reactor, fleet):
        made = Rig(reactor, fleet, tmp_path)
        yield made
        made.close()


# Straight on ----------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_forked_process_takes_over_again_and_again(rig: Rig) -> None:
    ops, open_files = 0, descriptors()
    for _ in range(10):
        rig.upgraded()
        before, ops = ops, rig.run(rig.backend.stats())["write_ops"]
        assert ops > before
        rig.until(lambda: descriptors() == open_files)  # ZeroMQ closes what it has let go of in a thread of its own
    columns = rig.fleet.supervision.columns("blk", "_disk0")
    assert (columns["upgrades"], columns["program"], columns["last_cause"]) == (10, None, None)


def test_another_program_takes_over_and_serves_after_its_death_too(rig: Rig) -> None:
    like = look(rig.process.pid)
    rig.upgraded("")
    path = rig.backend.program
    assert path and rig.fleet.supervision.columns("blk", "_disk0")["program"] == path
    row = look(rig.process.pid)
    assert {name: row[name] for name in like if name != "descriptors"} == {
        name: like[name] for name in like if name != "descriptors"
    }
    pid = rig.process.pid
    os.kill(pid, signal.SIGKILL)
    rig.until(lambda: rig.backend.state is BackendState.SERVING and rig.process.pid != pid)
    assert path.encode() in Path(f"/proc/{rig.process.pid}/cmdline").read_bytes()
    rig.goes_on()
    rig.upgraded()
    assert rig.backend.program == ""


def test_program_that_does_not_start_any_more_gives_way_to_this_releases_worker(rig: Rig) -> None:
    rig.upgraded("")
    os.unlink(rig.backend.program)
    pid = rig.process.pid
    os.kill(pid, signal.SIGKILL)
    rig.until(lambda: rig.backend.state is BackendState.SERVING and rig.process.pid != pid)
    assert rig.backend.program == "" and rig.fleet.supervision.columns("blk", "_disk0")["program"] is None
    rig.goes_on()


def test_program_that_is_less_confined_when_it_is_started_again_gives_way(rig: Rig) -> None:
    rig.upgraded("")
    program(rig.folder, "from shared import seccomp; seccomp.install = lambda *_: None")
    pid = rig.process.pid
    os.kill(pid, signal.SIGKILL)
    rig.until(lambda: rig.backend.state is BackendState.SERVING and rig.process.pid != pid)
    assert rig.backend.program == ""


# A host that is short of something -----------------------------------------------------------------------------------


def test_host_without_descriptors_is_told_as_a_failed_upgrade(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rig.process

    def full(_standby: Standby) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Standby, "mark", full)
        said = rig.refused(rig.handover())
    assert "goes on serving it: verify: " in said and said.endswith("Too many open files")
    rig.kept(before)


def test_process_that_is_ending_is_no_measure_of_confinement(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zombie's namespaces can't be read."""
    before = rig.process
    whole = look(before.pid)
    with monkeypatch.context() as patch:
        patch.setattr("controller.handover.look", lambda _: {key: whole[key] for key in whole if key != "namespaces"})
        said = rig.refused(rig.handover())
    assert said.endswith("start: _disk0 is ending: its namespaces can't be read")
    rig.kept(before)


# A new process that goes wrong --------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", STEPS)
def test_program_that_dies_half_way(rig: Rig, step: str) -> None:
    before, (change, at) = rig.process, STEPS[step]
    said = rig.refused(rig.handover(change.format(what="die")))
    assert f"_disk0: not upgraded, pid {before.pid} goes on serving it: {at}: " in said
    rig.kept(before)


def test_failed_upgrades_leave_no_descriptor_open(rig: Rig) -> None:
    open_files = descriptors()
    for step in ("hello", "features", "load", "rings", "resume"):
        rig.refused(rig.handover(STEPS[step][0].format(what="die")))
        rig.until(lambda: descriptors() == open_files)


@pytest.mark.parametrize("step", STEPS)
def test_program_that_hangs_half_way(rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr("controller.vhost_frontend.SECONDS", 2 * SECONDS)  # the upgrade's own limit is the shorter one
    before, (change, at) = rig.process, STEPS[step]
    for limit in LIMITS:
        ready = limit if at in (Step.START, Step.CONNECT) else SECONDS
        said = rig.refused(rig.handover(change.format(what="hang"), ready, limit))
        rig.kept(before)
        if f": {at}: " in said:
            break
    assert f"pid {before.pid} goes on serving it: {at}: no answer within" in said
    rig.upgraded()


def test_program_that_never_says_hello(rig: Rig) -> None:
    before = rig.process
    assert "start: no answer within 0.3 s" in rig.refused(rig.handover("stand_still()", 0.3))
    rig.kept(before)


@pytest.mark.parametrize("lie", LIES)
def test_program_that_lies(rig: Rig, lie: str) -> None:
    """About what it is, or what it has loaded."""
    before, (change, message) = rig.process, LIES[lie]
    said = rig.refused(rig.handover(change))
    assert message in said
    rig.kept(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("only words\n", "can't be executed: Exec format error"),
        ("#!/nobody/there\n", "can't be executed: No such file"),
        ("#!/bin/sh\nexit 5\n", "ended with 5"),
        ("#!/bin/cat\n", "did not come up"),
    ],
    ids=["no program", "no interpreter", "ends at once", "another program"],
)
def test_program_that_does_not_start(rig: Rig, text: str, message: str) -> None:
    before, path = rig.process, rig.folder / "no-worker"
    path.write_text(text)
    path.chmod(0o755)
    said = rig.refused(Handover(rig.reactor, rig.fleet, rig.backend, str(path), SECONDS, SECONDS))
    assert "start: " in said and message in said
    rig.kept(before)


@pytest.mark.parametrize("what", ["die", "hang"])
def test_program_that_stops_after_it_began_to_serve(rig: Rig, what: str) -> None:
    """Neither of the two knows its rings any more: a fresh process of the old program recovers them."""
    before = rig.process
    for done in LIMITS if what == "hang" else (SECONDS,):
        handover = rig.handover(BEGUN.format(what=what), done=done)
        said = rig.refused(handover)
        if before.ended.is_set():
            break
        rig.events.clear()
    assert "its worker is started again: resume: " in said and handover.owner is Owner.NOBODY
    rig.until(lambda: rig.backend.state is BackendState.SERVING)
    assert rig.process is not before and rig.backend.program == "" and rig.fleet.processes == [rig.process]
    assert [event for event, _ in rig.events] == ["worker-lost", "worker-upgrade-failed", "worker-restarted"]
    rig.goes_on()


# The old one ----------------------------------------------------------------------------------------------------------


def _at(handover: Handover, step: Step) -> bool:
    return handover.step is step


@pytest.mark.parametrize("step", [Step.START, Step.CONNECT, Step.LOAD, Step.PREPARE, Step.VERIFY])
def test_old_process_killed_before_the_point_of_no_return(rig: Rig, step: Step) -> None:
    before = rig.process
    change = {
        Step.START: "at_verb('hello', 'wait')", Step.CONNECT: "at_message(1, 'wait')",
        Step.LOAD: "at_verb('load', 'wait')", Step.PREPARE: "at_message(5, 'wait')",
        Step.VERIFY: "at_verb('save', 'wait')",
    }  # fmt: skip
    handover = rig.handover(change[step])
    task = rig.reactor.spawn(handover.run(), "upgrade")
    task.add_done_callback(lambda _: None)
    rig.until(lambda: task.done() or (_at(handover, step) and (rig.folder / "started").exists()
              and handover.change.new_pid))  # fmt: skip
    os.kill(before.pid, signal.SIGKILL)
    rig.until(before.ended.is_set)
    os.kill(handover.change.new_pid, signal.SIGUSR1)
    with pytest.raises(WorkerError, match="its worker is started again"):
        rig.run(task)
    rig.until(lambda: rig.backend.state is BackendState.SERVING)
    assert rig.process.pid not in (before.pid, handover.change.new_pid) and rig.fleet.processes == [rig.process]
    rig.goes_on()


def test_old_process_killed_after_the_point_of_no_return(rig: Rig) -> None:
    before, handover = rig.process, rig.handover("at_verb('resume', 'wait')")
    task = rig.reactor.spawn(handover.run(), "upgrade")
    rig.until(lambda: _at(handover, Step.RESUME))
    os.kill(before.pid, signal.SIGKILL)
    rig.until(before.ended.is_set)
    os.kill(handover.change.new_pid, signal.SIGUSR1)
    change = rig.run(task)
    assert rig.process.pid == change.new_pid and rig.fleet.processes == [rig.process]
    assert [event for event, _ in rig.events] == ["worker-lost", "worker-restarted", "worker-upgraded"]
    rig.goes_on()


def test_old_process_that_is_slow_to_finish_goes_on_when_the_time_is_over(rig: Rig) -> None:
    """A disk that takes longer than the limit: what is in flight is waited for, and nobody is replaced."""
    before = rig.process
    rig.run(before.call("fault", what="delay", value=1000))
    # What is in flight may end within the limit; the answer doesn't.
    rig.run(before.call("fault", what="hang@quiesce", value=1000))
    assert "quiesce: no answer within 0.2 s" in rig.refused(rig.handover(done=0.2))
    rig.run(before.call("fault", None, what="clear"))
    rig.kept(before)


def test_old_process_keeps_its_disk_as_long_as_that_finishes_requests(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backlog lasts 6.5 s and a request is finished every 0.8 s or sooner: the seed's doing."""
    monkeypatch.setattr("controller.handover.RESUME_SECONDS", 3.0)
    before = rig.process
    rig.strike("delay", 4500, spread_ms=3000, shape=UNIFORM, seed=34361, count=LANES)
    assert "quiesce: no answer within 0.2 s" in rig.refused(rig.handover(done=0.2))
    rig.kept(before)
    assert rig.process is before


def test_old_process_that_hangs_is_replaced_and_its_requests_are_not_blamed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.handover.RESUME_SECONDS", 0.2)
    before = rig.process
    rig.strike("hang")
    assert "its worker is started again: quiesce: no answer within 0.2 s" in rig.refused(rig.handover(done=0.2))
    assert before.ended.is_set() and not before.blameable
    rig.until(lambda: rig.backend.state is BackendState.SERVING)
    assert rig.fleet.supervision.columns("blk", "_disk0")["last_cause"] == "hung"
    rig.goes_on()


def test_old_process_that_is_stopped_before_it_resumes_is_found(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has a time limit for it: the watchdog looks."""
    monkeypatch.setattr("controller.handover.RESUME_SECONDS", SECONDS)
    before, handover = rig.process, rig.handover(done=0.2)
    rig.strike("hang")
    watchdog = Watchdog(rig.reactor, rig.fleet, Limits(period=0.2, answer={}, other=SECONDS))
    watchdog.start()
    task = rig.reactor.spawn(handover.run(), "upgrade")
    task.add_done_callback(lambda _: None)
    rig.until(lambda: handover._new is not None and handover._new.ended.is_set())
    os.kill(before.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="its worker is started again: quiesce: no answer within"):
        rig.run(task)
    assert before.ended.is_set() and not before.blameable
    rig.until(lambda: rig.backend.state is BackendState.SERVING)
    watchdog.stop()
    rig.goes_on()


@pytest.mark.timeout(3 * SECONDS + 4 * KILLS)
def test_random_kills_of_old_or_new_at_any_moment_lose_nothing_and_one_serves(rig: Rig) -> None:
    """Paced by the steps and by turns of the reactor, so that every moment of an upgrade is met."""
    choice, outcomes = random.Random(KILLS), {True: 0, False: 0}
    for _ in range(KILLS):
        before, handover = rig.process, rig.handover()
        task = rig.reactor.spawn(handover.run(), "upgrade")
        task.add_done_callback(lambda _: None)
        step, turns = choice.choice(list(Step)), choice.randrange(8)
        rig.until(lambda handover=handover, step=step, task=task: task.done() or list(Step).index(handover.step)
                  >= list(Step).index(step))  # fmt: skip
        for _ in range(turns):
            rig.run(sleep(rig.reactor, 0))
        victim = choice.choice((before.pid, handover.change.new_pid))
        if victim in {process.pid for process in rig.fleet.processes}:
            os.kill(victim, signal.SIGKILL)
        rig.until(task.done)
        rig.until(lambda: rig.backend.state is BackendState.SERVING and len(rig.fleet.processes) == 1)
        assert rig.fleet.processes == [rig.process]
        outcomes[task.exception() is None] += 1
        rig.goes_on()
    assert all(outcomes.values()), outcomes


@pytest.mark.parametrize("step", [Step.START, Step.LOAD, Step.RESUME])
def test_device_closed_meanwhile(rig: Rig, step: Step) -> None:
    change = {
        Step.START: "at_verb('hello', 'wait')", Step.LOAD: "at_verb('load', 'wait')",
        Step.RESUME: "at_verb('resume', 'wait')",
    }  # fmt: skip
    rig.load.stopping = True
    rig.run(rig._task)
    handover = rig.handover(change[step])
    task = rig.reactor.spawn(handover.run(), "upgrade")
    task.add_done_callback(lambda _: None)
    rig.until(lambda: _at(handover, step))
    rig.run(rig.backend.close())
    assert rig.fleet.processes == [] and task.done() and isinstance(task.exception(), WorkerError)


def test_device_closed_while_its_new_process_is_being_forked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a hello that never comes."""
    monkeypatch.setattr("controller.fleet.HELLO_SECONDS", 2 * SECONDS)
    rig.load.stopping = True
    rig.run(rig._task)
    rig.fleet.zygote.hold()
    task = rig.reactor.spawn(rig.handover("stand_still()", 2 * SECONDS).run(), "upgrade")
    task.add_done_callback(lambda _: None)
    rig.until(lambda: rig.backend.disturbed)
    close = rig.reactor.spawn(rig.backend.close(), "close")
    rig.until(lambda: rig.backend.closing)
    rig.fleet.zygote.release()
    rig.run(close)
    assert rig.fleet.processes == [] and task.done() and isinstance(task.exception(), WorkerError)


# What is compared -----------------------------------------------------------------------------------------------------


def test_the_field_that_differs_is_named() -> None:
    state = {"a": 1, "config": {"b": [1, 2], "c": "x"}}
    assert differing(state, {"config": {"c": "x", "b": [1, 2]}, "a": 1}) == ""
    assert differing(state, {**state, "a": 2}) == "a"
    assert differing(state, {**state, "a": True}) == "a"
    assert differing(state, {"a": 1, "config": {"b": [1, 2]}}) == "config.c"
    assert differing(state, {**state, "more": 0}) == "more"
    assert differing(state, None) == "state"


def test_every_way_of_being_less_confined_is_named() -> None:
    like = {
        "uid": 0, "gid": 0, "groups": [4], "seccomp": "filter", "no_new_privs": True, "capabilities": "0",
        "bounding": "0", "namespaces": ["net", "uts"], "root": "empty", "open_files": 1024, "core": 0,
    }  # fmt: skip
    assert less_confined(like, like) == ""
    more = {"groups": [], "capabilities": "0", "namespaces": ["ipc", "net", "uts"], "open_files": 64}
    assert less_confined({**like, **more}, like) == ""
    weaker = {
        "uid": 5, "gid": 5, "groups": [4, 5], "seccomp": "none", "no_new_privs": False,
        "capabilities": "200000", "bounding": "1", "namespaces": ["uts"], "root": "own",
        "open_files": 4096, "core": "unlimited",
    }  # fmt: skip
    for name, value in weaker.items():
        assert less_confined({**like, name: value}, like).startswith(f"{name} is ")
        assert less_confined({key: like[key] for key in like if key != name}, like) == f"{name} can't be read"
    unconfined = {**like, "seccomp": "none", "root": "shared", "namespaces": []}
    assert less_confined(unconfined, unconfined) == ""


def test_a_thread_without_a_filter_is_seen(rig: Rig) -> None:
    process = rig.process
    confinement = look(process.pid)
    vet(process, process.identity, confinement)
    mine = Process("blk", "_disk0", os.getpid(), -1)
    mine.identity = process.identity
    with pytest.raises(WorkerError, match="less confined"):
        vet(mine, process.identity, confinement)


def test_bases_come_by_ring_or_by_device_and_ring(rig: Rig) -> None:
    one, other = Standby(rig.frontend), Standby(Frontend(rig.reactor, rig.memory, "__rng"))
    assert bases_of({"bases": {0: 7}}, {"vhost": one}) == {"vhost": {0: 7}}
    assert bases_of({"bases": {"a.0": 7, "b.0": 9}}, {"a": one, "b": other}) == {"a": {0: 7}, "b": {0: 9}}
    wrong = ({0: 65536}, {0: "7"}, {"0.x": 7}, {"\u00b2": 7}, {"1" * 5000: 7})
    for nonsense in ({}, {"bases": None}, *({"bases": bases} for bases in wrong)):
        with pytest.raises(ProtocolError, match="no base for ring 0 of _disk0"):
            bases_of(nonsense, {"vhost": one})
