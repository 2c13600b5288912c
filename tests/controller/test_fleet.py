"""controller.fleet, controller.spawn, controller.zygote and the control plane, with real processes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal

import pytest

from controller.fleet import Process, ProcessState, WorkerSpec
from shared.errors import FlotillaError, ProtocolError, WorkerError, WorkerLost
from shared.messages import Verb
from shared.reactor import Future

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


def test_worker_that_exits_at_once_is_an_error_that_names_it(reactor, fleet):
    with pytest.raises(WorkerLost, match="_toy0"):
        reactor.run_until(fleet.start(toy(refuse=True), {}, ignore), SECONDS)


def test_what_a_worker_says_at_its_end_is_one_line(reactor, fleet):
    with pytest.raises(WorkerLost, match=r"this host has no moon\\n\\x1b\[2J!$"):
        reactor.run_until(fleet.start(toy(lacks="moon\n\x1b[2J!"), {}, ignore), SECONDS)


def test_worker_that_says_why_it_can_not_start_is_quoted(reactor, fleet):
    with pytest.raises(WorkerLost, match=r"_toy0 \(pid \d+\) did not come up: this host has no moon"):
        reactor.run_until(fleet.start(toy(lacks="moon"), {}, ignore), SECONDS)


def test_worker_that_never_says_hello_has_been_waited_for_when_that_is_an_error(reactor, fleet, monkeypatch):
    monkeypatch.setattr("controller.fleet.HELLO_SECONDS", 0.5)
    with pytest.raises(WorkerLost, match="did not come up: no answer within"):
        reactor.run_until(fleet.start(toy(hang=True), {}, ignore), SECONDS)
    assert fleet.processes == []


@pytest.mark.parametrize("free", range(6))
def test_controller_without_descriptors_for_a_worker_says_so_and_does_not_wait(reactor, fleet, free):
    process = reactor.run_until(fleet.fork(toy(), {}, ignore), SECONDS)
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
    error = greeting.exception()
    if error is None:
        assert process.state is ProcessState.RUNNING and free > 0
    else:
        assert isinstance(error, WorkerLost)
        assert "did not come up" in str(error) and "Too many open files" in str(error)
        assert fleet.processes == []


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


def test_orderly_stop_ends_with_zero(reactor, fleet):
    process = reactor.run_until(fleet.start(toy(), {}, ignore), SECONDS)
    reactor.run_until(fleet.stop(process), SECONDS)
    assert process.exit_status == 0


def test_a_bug_in_a_handler_is_the_callers_error_too(reactor, fleet):
    process = reactor.run_until(fleet.start(toy(), {}, ignore), SECONDS)
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        reactor.run_until(process.call(Verb.FAULT, what="bug"), SECONDS)
