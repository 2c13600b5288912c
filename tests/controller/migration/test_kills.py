"""Kill -9 of controllers, agents and workers, and cancel, at every state: never two guests, and one wherever one can
be.
"""

from __future__ import annotations

import signal

import pytest

from tests.controller.migration.conftest import Lab, Remote
from tests.controller.migration.remote_ends import outcome

SEND = ("connecting", "building", "pausing", "saving", "offered", "handed-over")
RECEIVE = ("listening", "greeting", "ready", "building", "built", "loading", "claimed", "running")
SOURCE_AGENT = ("connecting", "greeting", "ready", "building", "built", "offered", "finished")
DESTINATION_AGENT = ("listening", "greeting", "ready", "building", "built", "offered", "finished")


def still_works(lab: Lab, source: Remote, destination: Remote) -> None:
    """The guest is the source's and runs; after a failure a retry works."""
    lab.runs_on(source)
    lab.migrate(source, destination)


@pytest.mark.parametrize("phase", SEND)
def test_source_controller_killed(lab, phase):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    source.do("send", url=lab.url, kill_at=phase)
    assert outcome(source, "send") is None
    if phase == "connecting":  # nobody ever came
        assert destination.call("cancel")["error"] is None
    received = outcome(destination, "receive")
    if phase == "handed-over":
        assert received["error"] is None
        lab.runs_on(destination)
    else:
        # The killed controller was the guest's only owner; its destination says so and is of use again.
        assert received["error"] and not received["has_vm"]
        lab.is_dead()
        destination.receive(lab.url)


@pytest.mark.parametrize("phase", RECEIVE)
def test_destination_controller_killed(lab, phase):
    source, destination = lab.source(), lab.controller()
    if phase == "listening":
        destination.do("receive", url=lab.url, kill_at=phase)
        assert outcome(destination, "receive") is None
    else:
        destination.receive(lab.url, kill_at=phase)
    source.do("send", url=lab.url, settings={"dying": 20.0})
    sent = outcome(source, "send")
    assert outcome(destination, "receive") is None or phase == "listening"
    assert sent["error"]
    if phase == "running":
        # It had taken the guest over and was its only owner.
        assert sent["kind"] == "GuestLost" and sent["progress"]["phase"] == "lost"
        assert str(destination.pid) in sent["error"][0]
        lab.is_dead()
    else:
        assert sent["running"]
        still_works(lab, source, lab.controller())


@pytest.mark.parametrize("state", SOURCE_AGENT)
def test_source_agent_killed(lab, state):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    source.do("send", url=lab.url, agent=f"kill@{state}", settings={"report": 0.2})
    sent = outcome(source, "send")
    if state == "connecting":
        destination.do("cancel")
    received = outcome(destination, "receive")
    if state == "finished":
        assert sent["error"] is None and received["error"] is None
        lab.runs_on(destination)
    else:
        assert sent["error"] and received["error"] and sent["running"]
        assert "migration agent" in "".join(sent["error"])
        still_works(lab, source, destination)


@pytest.mark.parametrize("state", DESTINATION_AGENT)
def test_destination_agent_killed(lab, state):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, agent=f"kill@{state}")
    if state == "listening":
        assert outcome(destination, "receive")["error"]
    source.do("send", url=lab.url, settings={"report": 0.2})
    sent = outcome(source, "send")
    received = None if state == "listening" else outcome(destination, "receive")
    if state == "finished":
        assert sent["error"] is None and received["error"] is None
        lab.runs_on(destination)
    else:
        assert sent["error"] and sent["running"]
        if received is not None:
            assert "migration agent" in "".join(received["error"])
        still_works(lab, source, destination)


@pytest.mark.parametrize("phase", SEND[1:])
def test_worker_of_the_source_killed(lab, phase):
    source, destination = lab.source(), lab.controller()
    lab.migrate(source, destination, kill_runner_at=phase)


@pytest.mark.parametrize("phase", ("built", "loading", "claimed", "running"))
def test_worker_of_the_destination_killed(lab, phase):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, kill_runner_at=phase)
    assert source.call("send", url=lab.url)["error"] is None
    assert destination.done("receive")["error"] is None
    lab.runs_on(destination)


@pytest.mark.parametrize("phase", SEND)
def test_cancelled_by_the_source(lab, phase):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    sent = source.call("send", url=lab.url, cancel_at=phase)
    if phase == "connecting" and sent["kind"] == "MigrationCancelled":
        destination.do("cancel")  # it may not have seen anybody
    received = outcome(destination, "receive")
    if sent["error"] is None:
        # Too late: the destination may have claimed it by the time that the source looks at the word.
        assert phase in ("offered", "handed-over") and received["error"] is None
        lab.runs_on(destination)
    else:
        assert sent["kind"] == "MigrationCancelled" and sent["progress"]["state"] == "cancelled"
        assert received["error"]
        still_works(lab, source, destination)


@pytest.mark.parametrize("phase", RECEIVE)
def test_cancelled_by_the_destination(lab, phase):
    source, destination = lab.source(), lab.controller()
    if phase == "listening":
        destination.do("receive", url=lab.url, cancel_at=phase)
        assert outcome(destination, "receive")["kind"] == "MigrationCancelled"
        still_works(lab, source, destination)
        return
    destination.receive(lab.url, cancel_at=phase)
    sent = source.call("send", url=lab.url)
    received = outcome(destination, "receive")
    if phase in ("claimed", "running"):
        assert received["late"] == "the guest is this VMM's by now"
        assert sent["error"] is None and received["error"] is None
        lab.runs_on(destination)
    else:
        assert sent["error"] and received["kind"] == "MigrationCancelled"
        still_works(lab, source, destination)


def test_cancel_while_nobody_comes(lab):
    destination = lab.controller()
    destination.receive(lab.url)
    destination.do("cancel")
    received = destination.done("receive")
    assert received["kind"] == "MigrationCancelled"
    assert received["processes"] == [] and received["paths"] == []
    destination.receive(lab.url)


def test_an_agent_that_hangs_with_the_guest_paused_costs_a_deadline_not_the_guest(lab):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    sent = source.call("send", url=lab.url, agent="hang@offered", settings={"call": 0.3})
    assert sent["error"] and sent["running"]
    assert outcome(destination, "receive")["error"]
    still_works(lab, source, destination)


def test_an_agent_that_hangs_while_connecting_can_be_cancelled(lab):
    source = lab.source()
    source.do("send", url=lab.url, agent="hang@connecting")
    source.wait_phase("connecting")
    source.do("cancel")
    assert source.done("send")["kind"] == "MigrationCancelled"
    lab.runs_on(source)


def stopped_at_claimed(lab, **arguments):
    """(source, destination): the destination is stopped with the word at CLAIMED, before the source waits for it."""
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, stop_at="claimed")
    source.do("send", url=lab.url, stop_at="handed-over", **arguments)
    source.wait_phase("handed-over")
    destination.await_stop()
    source.go_on()
    return source, destination


@pytest.mark.parametrize("how", ["a cancel", "a deadline"])
@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_destination_stopped_while_it_holds_the_claim(lab, how, end):
    """Neither a cancel nor a deadline makes two of one guest; whoever asks is told the pid and what to do."""
    source, destination = stopped_at_claimed(lab, settings={"started": 0.3} if how == "a deadline" else {})
    answer = source.call("cancel") if how == "a cancel" else None
    assert answer is None or f"pid {destination.pid}" in answer["late"]
    source.wait_phase("settling") if "settling" not in source.phases else None
    waits_for = (answer or source.call("fds"))["progress"]["waits_for"]
    assert f"pid {destination.pid}" in waits_for
    assert f"kill -CONT {destination.pid}" in waits_for and f"kill -KILL {destination.pid}" in waits_for
    assert not source.call("fds")["running"]
    signal.pidfd_send_signal(destination.pidfd, end)
    sent = outcome(source, "send")
    assert sent["progress"]["waits_for"] == ""
    if end == signal.SIGCONT:
        assert sent["error"] is None and sent["fate"] == "there"
        assert outcome(destination, "receive")["error"] is None
        lab.runs_on(destination)
    else:
        assert sent["error"] and sent["running"]
        destination.wait()
        still_works(lab, source, lab.controller())


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_destination_that_falls_silent_once_it_runs_the_guest(lab, end):
    """It may be dying, which its pidfd tells last: the source waits a moment before it says where the guest is."""
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, stop_at="running")
    source.do("send", url=lab.url, settings={"report": 0.1, "dying": 20.0 if end == signal.SIGKILL else 0.1})
    source.wait_phase("settling")
    if end == signal.SIGKILL:
        destination.kill()
        sent = outcome(source, "send")
        assert sent["kind"] == "GuestLost" and str(destination.pid) in sent["error"][0]
        lab.is_dead()
    else:
        sent = outcome(source, "send")
        assert sent["error"] is None and sent["fate"] == "there"
        destination.go_on()
        assert outcome(destination, "receive")["error"] is None
        lab.runs_on(destination)
