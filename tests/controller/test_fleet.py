"""controller.fleet, controller.spawn, controller.zygote and the control plane, with real processes."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal

import pytest
import zmq

from controller import spawn
from controller.fleet import Process, ProcessState, WorkerSpec
from controller.supervision import process_state
from shared.control import context
from shared.errors import FlotillaError, ProtocolError, WorkerError, WorkerLost
from shared.messages import Verb
from shared.reactor import Cancelled, Future, sleep
from tests.leaks import descendants

SECONDS = 20


def toy(**spec):
    return WorkerSpec("toy", "_toy0", "tests.toy_worker", "worker", spec)


def ignore(_: Process) -> None:
    pass


def status(pid: int, field: str) -> str:
    with open(f"/proc/{pid}/status") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith(field))


def test_worker_is_the_controllers_child_and_keeps_the_contract(reactor, fleet):
    process = reactor.run_until(fleet.start(toy(count=5), {}, ignore), SECONDS)
    assert status(process.pid, "PPid") == str(os.getpid())
    assert status(process.pid, "Name") == "toy0"
    assert reactor.run_until(process.call(Verb.STATS), SECONDS) == {"count": 5}
    saved = reactor.run_until(process.call(Verb.SAVE), SECONDS)
    assert saved == {"kind": "toy", "version": 4, "state": {"count": 5}}
    reactor.run_until(process.call(Verb.LOAD, **{**saved, "state": {"count": 9}}), SECONDS)
    assert reactor.run_until(process.call(Verb.STATS), SECONDS) == {"count": 9}


def test_worker_has_given_up_privileges_and_leaves_no_name_behind(reactor, fleet, tmp_path):
    process = reactor.run_until(fleet.start(toy(), {}, ignore), SECONDS)
    assert status(process.pid, "NoNewPrivs") == "1"
    assert int(status(process.pid, "CapEff"), 16) == 0
    assert os.listdir(tmp_path) == []


def test_killed_worker_fails_its_pending_call_and_is_reported_once(reactor, fleet):
    ended: Future[Process] = Future()
    process = reactor.run_until(fleet.start(toy(), {}, ended.set_result), SECONDS)
    os.kill(process.pid, signal.SIGSTOP)
    call = reactor.spawn(process.call(Verb.STATS))
    call.add_done_callback(lambda _: None)
    os.kill(process.pid, signal.SIGKILL)
    assert reactor.run_until(ended, SECONDS) is process
    assert process.state is ProcessState.ENDED
    assert isinstance(call.exception(), WorkerLost)
    assert process not in fleet.processes


def test_workers_survive_the_zygotes_death_and_the_next_one_starts_a_new_zygote(reactor, fleet):
    first = reactor.run_until(fleet.start(toy(count=1), {}, ignore), SECONDS)
    zygote = fleet.zygote.pid
    os.kill(zygote, signal.SIGKILL)
    second = reactor.run_until(fleet.start(toy(count=2), {}, ignore), SECONDS)
    assert fleet.zygote.pid != zygote
    assert reactor.run_until(first.call(Verb.STATS), SECONDS) == {"count": 1}
    assert reactor.run_until(second.call(Verb.STATS), SECONDS) == {"count": 2}


def test_a_zygote_that_does_not_answer_in_time_is_replaced_and_its_late_answer_is_nobodys(reactor, fleet, monkeypatch):
    before = descendants()
    first = reactor.run_until(fleet.start(toy(count=1), {}, ignore), SECONDS)
    silent = fleet.zygote.pid
    os.kill(silent, signal.SIGSTOP)
    # Only the one that is stopped: its successor has its imports before it.
    monkeypatch.setattr("controller.spawn.SPAWN_SECONDS", 0.1)
    fleet.zygote.on_start = lambda _: monkeypatch.undo()
    with contextlib.suppress(FlotillaError):
        reactor.run_until(fleet.start(toy(count=2), {}, ignore), SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.kill(silent, signal.SIGCONT)
    third = reactor.run_until(fleet.start(toy(count=3), {}, ignore), SECONDS)
    assert reactor.run_until(third.call(Verb.STATS), SECONDS) == {"count": 3}
    second = next(process for process in fleet.processes if process not in (first, third))
    assert reactor.run_until(second.call(Verb.STATS), SECONDS) == {"count": 2}
    assert descendants() - before == {fleet.zygote.pid, first.pid, second.pid, third.pid}
    assert fleet.zygote.pid != silent


def test_a_zygote_has_more_time_each_time_that_it_was_not_enough(reactor, fleet, monkeypatch):
    """A host on which Python starts slowly: one that is replaced as fast as it starts would never serve."""
    monkeypatch.setattr("controller.spawn.SPAWN_SECONDS", 0.005)
    for _ in range(8):
        with contextlib.suppress(FlotillaError):
            process = reactor.run_until(fleet.start(toy(count=1), {}, ignore), SECONDS)
            break
    assert reactor.run_until(process.call(Verb.STATS), SECONDS) == {"count": 1}
    assert fleet.zygote.starts > 2


# A zygote stops between the fork and the answer.
HALF_WAY = """
import msgpack, os, signal
pack = msgpack.packb
def stop_at_the_answer(message, *rest, **named):
    if isinstance(message, dict) and message.keys() == {"pid"}:
        os.kill(os.getpid(), signal.SIGSTOP)
    return pack(message, *rest, **named)
msgpack.packb = stop_at_the_answer
"""


@pytest.fixture
def half_way(monkeypatch):
    exec_python = spawn.exec_python

    def start(code, arguments, fds):
        monkeypatch.undo()
        return exec_python(HALF_WAY + code, arguments, fds)

    monkeypatch.setattr("controller.spawn.exec_python", start)


async def stopped(reactor, zygote):
    while process_state(zygote.pid)[0] != "T":
        await sleep(reactor, 0.002)


def test_what_a_zygote_had_forked_when_it_was_killed_is_the_worker(reactor, fleet, half_way):
    before = descendants()
    start = reactor.spawn(fleet.start(toy(count=1), {}, ignore))
    start.add_done_callback(lambda _: None)
    reactor.run_until(stopped(reactor, fleet.zygote), SECONDS)
    fleet.zygote.kill()
    process = reactor.run_until(start, SECONDS)
    assert reactor.run_until(process.call(Verb.STATS), SECONDS) == {"count": 1}
    assert descendants() - before == {process.pid}


def test_what_a_zygote_had_forked_when_the_start_was_cancelled_is_ended(reactor, fleet, half_way):
    before = descendants()
    start = reactor.spawn(fleet.start(toy(count=1), {}, ignore))
    start.add_done_callback(lambda _: None)
    reactor.run_until(stopped(reactor, fleet.zygote), SECONDS)
    assert len(descendants() - before) == 2
    start.cancel()
    with pytest.raises(Cancelled):
        reactor.run_until(start, SECONDS)
    assert descendants() == before
    process = reactor.run_until(fleet.start(toy(count=2), {}, ignore), SECONDS)
    assert reactor.run_until(process.call(Verb.STATS), SECONDS) == {"count": 2}


def test_while_it_is_held_a_zygote_forks_only_who_outlives_the_controller(reactor, fleet):
    fleet.zygote.hold()
    held = reactor.spawn(fleet.start(toy(count=1), {}, ignore))
    spec = WorkerSpec("toy", "_toy1", "tests.toy_worker", "worker", {"count": 2}, orphan=True)
    first = reactor.run_until(fleet.start(spec, {}, ignore), SECONDS)
    assert fleet.processes == [first] and not held.done()
    fleet.zygote.release()
    assert reactor.run_until(reactor.run_until(held, SECONDS).call(Verb.STATS), SECONDS) == {"count": 1}


def test_worker_that_exits_at_once_is_an_error_that_names_it(reactor, fleet):
    with pytest.raises(WorkerLost, match="_toy0"):
        reactor.run_until(fleet.start(toy(refuse=True), {}, ignore), SECONDS)


def test_what_a_worker_says_at_its_end_is_one_line(reactor, fleet):
    with pytest.raises(WorkerLost, match=r"this host has no moon\\n\\x1b\[2J!$"):
        reactor.run_until(fleet.start(toy(lacks="moon\n\x1b[2J!"), {}, ignore), SECONDS)


def test_worker_that_says_why_it_can_not_start_is_quoted(reactor, fleet):
    with pytest.raises(WorkerLost, match=r"_toy0 \(pid \d+\) did not come up: this host has no moon"):
        reactor.run_until(fleet.start(toy(lacks="moon"), {}, ignore), SECONDS)


@pytest.mark.parametrize(
    ("spec", "reason"), [({"lacks": "moon"}, "this host has no moon"), ({"refuse": True}, "ended with 3")]
)
def test_worker_that_has_ended_before_it_is_greeted_did_not_come_up(reactor, fleet, spec, reason):
    process = reactor.run_until(fleet.fork(toy(**spec), {}, ignore), SECONDS)
    reactor.run_until(process.ended.wait(), SECONDS)
    with pytest.raises(WorkerLost, match=rf"_toy0 \(pid {process.pid}\) did not come up: .*{reason}$"):
        reactor.run_until(fleet.greet(process), SECONDS)


def test_worker_that_never_says_hello_has_been_waited_for_when_that_is_an_error(reactor, fleet, monkeypatch):
    monkeypatch.setattr("controller.fleet.HELLO_SECONDS", 0.5)
    with pytest.raises(WorkerLost, match="did not come up: no answer within"):
        reactor.run_until(fleet.start(toy(hang=True), {}, ignore), SECONDS)
    assert fleet.processes == []


@pytest.mark.parametrize("free", range(6))
def test_controller_without_descriptors_for_a_worker_says_so_and_does_not_wait(reactor, fleet, free):
    process = reactor.run_until(fleet.fork(toy(), {}, ignore), SECONDS)
    another = context().socket(zmq.DEALER)  # ZeroMQ has its threads, without whose descriptors it aborts
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(process.pidfd))
        for _ in range(free):
            os.close(taken.pop())
        greeting = reactor.spawn(fleet.greet(process))
        greeting.add_done_callback(lambda _: None)
        with contextlib.suppress(FlotillaError):
            reactor.run_until(greeting, SECONDS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
        another.close()
    error = greeting.exception()
    if error is None:
        assert process.state is ProcessState.RUNNING and free > 0
    else:
        assert isinstance(error, WorkerLost)
        assert "did not come up" in str(error) and "Too many open files" in str(error)
        assert fleet.processes == []


def test_worker_that_can_not_be_watched_for_want_of_a_descriptor_is_ended(reactor, fleet, monkeypatch):
    forked = []

    def none_left(pid: int) -> int:
        forked.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", none_left)
    with pytest.raises(WorkerError, match="_toy0: Too many open files"):
        reactor.run_until(fleet.fork(toy(), {}, ignore), SECONDS)
    assert not os.path.exists(f"/proc/{forked[0]}") and fleet.processes == []


def test_unknown_verb_missing_field_and_wrong_type_are_typed_errors(reactor, fleet):
    process = reactor.run_until(fleet.start(toy(), {}, ignore), SECONDS)
    with pytest.raises(ProtocolError, match="unknown verb 'dance'"):
        reactor.run_until(process.call("dance"), SECONDS)
    with pytest.raises(ProtocolError, match="load: field kind is missing"):
        reactor.run_until(process.call(Verb.LOAD), SECONDS)
    with pytest.raises(ProtocolError, match="load: field version has type str"):
        reactor.run_until(process.call(Verb.LOAD, kind="toy", version="1", state={}), SECONDS)
    with pytest.raises(ProtocolError, match="state of kind 'blk'"):
        reactor.run_until(process.call(Verb.LOAD, kind="blk", version=1, state={}), SECONDS)
    with pytest.raises(ProtocolError, match="toy state has version 5, this release reads 2 to 4"):
        reactor.run_until(process.call(Verb.LOAD, kind="toy", version=5, state={}), SECONDS)


def test_orderly_stop_ends_with_zero(reactor, fleet, monkeypatch):
    monkeypatch.setattr("controller.fleet.STOP_SECONDS", SECONDS)
    process = reactor.run_until(fleet.start(toy(), {}, ignore), SECONDS)
    reactor.run_until(fleet.stop(process), SECONDS)
    assert process.exit_status == 0


def test_a_bug_in_a_handler_is_the_callers_error_too(reactor, fleet):
    process = reactor.run_until(fleet.start(toy(), {}, ignore), SECONDS)
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        reactor.run_until(process.call(Verb.FAULT, what="bug"), SECONDS)
