"""Remote migration with real controllers and agents: kills and cancels at every state. Never two guests, and one
wherever one can be.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.controller.migration.remote_ends import (
    DESTINATION_AGENT,
    RECEIVE,
    SEND,
    SOURCE_AGENT,
    outcome,
    resolve_here,
    still_works,
)


def test_guest_moves_with_its_ram_and_disk_and_its_source_has_nothing_left(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    sent = source.call("send", url=lab.url)
    received = destination.done("receive")
    assert sent["error"] is None and received["error"] is None
    assert sent["fate"] == "there" and sent["processes"] == [] and received["processes"] == ["toy_runner"]
    lab.runs_on(destination)
    assert source.phases == [*SEND, "completed"]
    assert destination.phases == [*RECEIVE, "completed"]
    progress = sent["progress"]
    rounds = ["migration-memory-iteration"] * progress["round"]
    assert source.events == ["migration-started", *rounds, "migration-finished"]
    assert progress["fds_passed"] == 0 and progress["round"] >= 2 and progress["pages"] > 0
    assert progress["zero_pages"] + progress["pages"] >= 2 * progress["ram_bytes"] // 4096
    assert 0 < progress["downtime_ms"] < progress["total_ms"]


def test_hop_after_hop_leaks_no_descriptor(lab):
    one, two = lab.remote_source(), lab.controller()
    lab.copy(one, two)
    lab.copy(two, one)
    before = one.call("fds")["fds"], two.call("fds")["fds"]
    for _ in range(2):
        lab.copy(one, two)
        lab.copy(two, one)
    assert one.fds_come_down_to(before[0]) and two.fds_come_down_to(before[1])


def test_failures_leak_no_descriptor_either(lab):
    source, destination = lab.remote_source(), lab.controller()
    lab.copy(source, destination)
    lab.copy(destination, source)
    before = source.call("fds")["fds"], destination.call("fds")["fds"]
    for step in ("accept", "build", "load"):
        destination.receive_remote(lab.url, fail=step)
        assert source.call("send", url=lab.url)["error"]
        assert destination.done("receive")["error"]
    assert source.fds_come_down_to(before[0]) and destination.fds_come_down_to(before[1])


@pytest.mark.parametrize("step", ("accept", "build", "load", "lock"))
def test_destination_that_fails_tells_the_source_why(lab, step):
    """Also after COMMIT: a disk's lock that it does not get is REFUSED, and the source goes on."""
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, fail=step)
    sent = source.call("send", url=lab.url)
    received = destination.done("receive")
    assert sent["error"][:3] == [
        f"migration to {lab.url} failed; the guest runs on here",
        "the destination refused it",
        f"the toy can't {step} (that was the plan)",
    ]
    assert received["error"][1] == f"the toy can't {step} (that was the plan)" and not received["has_vm"]
    if step == "accept":
        assert "copying" not in source.phases  # not a byte of RAM has moved
    still_works(lab, source, destination)


@pytest.mark.parametrize("step", ("log", "pause", "save", "flush"))
def test_source_that_fails_tells_the_destination_why(lab, step):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    sent = source.call("send", url=lab.url, fail=step)
    assert sent["error"][1] == f"the toy can't {step} (that was the plan)"
    received = destination.done("receive")
    assert received["error"][1:] == ["the source gave up", f"the toy can't {step} (that was the plan)"]
    still_works(lab, source, destination)


def test_guest_that_cannot_be_started_stays_with_its_new_owner(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, fail="start")
    sent = source.call("send", url=lab.url)
    received = destination.done("receive")
    assert sent["error"] is None and received["has_vm"] and "could not be started" in received["error"][0]
    destination.call("resume")
    lab.runs_on(destination)


def test_paused_guest_arrives_paused(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    assert source.call("send", url=lab.url, paused=True)["error"] is None
    received = destination.done("receive")
    assert received["error"] is None and received["running"] is False and lab.ram.owner == 0
    destination.call("resume")
    lab.runs_on(destination)


# Kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", SEND)
def test_source_controller_killed(lab, phase):
    """It was the guest's only owner: COMMIT had not been said. The destination says so and is of use again."""
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    source.do("send", url=lab.url, kill_at=phase)
    assert outcome(source, "send") is None
    if phase == "connecting":
        assert destination.call("cancel")["error"] is None
    received = outcome(destination, "receive")
    assert received["error"] and not received["has_vm"]
    lab.is_dead()
    destination.receive_remote(lab.url)


@pytest.mark.parametrize("phase", RECEIVE)
def test_destination_controller_killed(lab, phase):
    source, destination = lab.remote_source(), lab.controller()
    if phase == "listening":
        destination.do("receive", url=lab.url, kill_at=phase)
        assert outcome(destination, "receive") is None
    else:
        destination.receive_remote(lab.url, kill_at=phase)
    source.do("send", url=lab.url)
    sent = outcome(source, "send")
    assert sent["error"]
    outcome(destination, "receive")
    if phase in ("committed", "running"):
        # It had heard COMMIT: only somebody who sees that it is dead can say so.
        assert sent["kind"] == "MigrationInDoubt" and not sent["running"] and sent["progress"]["state"] == "in-doubt"
        assert "migration-in-doubt" in source.events
        lab.is_dead()
        resolve_here(lab, source)
        still_works(lab, source, lab.controller())
    else:
        assert sent["running"]
        still_works(lab, source, lab.controller())


@pytest.mark.parametrize("state", SOURCE_AGENT)
def test_source_agent_killed(lab, state):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    source.do("send", url=lab.url, agent=f"kill@{state}")
    sent = outcome(source, "send")
    if state == "connecting":
        destination.do("cancel")
    received = outcome(destination, "receive")
    assert sent["error"] and received["error"] and sent["running"]
    still_works(lab, source, destination)


@pytest.mark.parametrize("state", DESTINATION_AGENT)
def test_destination_agent_killed(lab, state):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, agent=f"kill@{state}")
    if state == "listening":
        assert outcome(destination, "receive")["error"]
    sent = source.call("send", url=lab.url)
    received = None if state == "listening" else outcome(destination, "receive")
    assert sent["error"] and sent["running"]
    assert received is None or received["error"]
    still_works(lab, source, destination)


@pytest.mark.parametrize("side", ("source", "destination"))
def test_agents_decide_nothing_once_the_stream_is_handed_over(lab, side):
    """Killed with the guest between the two: it arrives."""
    source, destination = lab.remote_source(), lab.controller()
    at = {"source": "preparing", "destination": "prepared"}
    faults = {"kill_agent_at": at[side]}
    destination.receive_remote(lab.url, **(faults if side == "destination" else {}))
    sent = source.call("send", url=lab.url, **(faults if side == "source" else {}))
    assert sent["error"] is None and destination.done("receive")["error"] is None
    lab.runs_on(destination)


@pytest.mark.parametrize("phase", SEND[2:])
def test_worker_of_the_source_killed(lab, phase):
    source, destination = lab.remote_source(), lab.controller()
    lab.copy(source, destination, kill_runner_at=phase)


@pytest.mark.parametrize("phase", ("built", "loading", "prepared", "running"))
def test_worker_of_the_destination_killed(lab, phase):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, kill_runner_at=phase)
    assert source.call("send", url=lab.url)["error"] is None
    assert destination.done("receive")["error"] is None
    lab.runs_on(destination)


@pytest.mark.parametrize("phase", SEND)
def test_cancelled_by_the_source(lab, phase):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    sent = source.call("send", url=lab.url, cancel_at=phase)
    assert sent["late"] == ""
    if phase == "connecting":
        destination.do("cancel")  # it may not have seen anybody
    received = outcome(destination, "receive")
    assert sent["kind"] == "MigrationCancelled" and sent["progress"]["state"] == "cancelled"
    assert received["error"]
    still_works(lab, source, destination)


@pytest.mark.parametrize("phase", RECEIVE[1:])
def test_cancelled_by_the_destination(lab, phase):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, cancel_at=phase)
    sent = source.call("send", url=lab.url)
    received = outcome(destination, "receive")
    if phase in ("committed", "running"):
        assert received["late"] == "the guest is this VMM's by now"
        assert sent["error"] is None and received["error"] is None
        lab.runs_on(destination)
    else:
        assert received["late"] == ""
        assert sent["error"] and received["kind"] == "MigrationCancelled"
        still_works(lab, source, destination)


def test_source_is_told_that_it_cancels_too_late_once_commit_has_been_said(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, stop_at="committed")
    source.do("send", url=lab.url)
    destination.wait_phase("committed")
    assert source.call("cancel")["late"] == "the destination has been told to run the guest"
    destination.go_on()
    assert source.done("send")["error"] is None and destination.done("receive")["error"] is None
    lab.runs_on(destination)


def test_cancel_that_is_repeated_is_not_too_late(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    source.do("send", url=lab.url, hold_flush=True)
    source.wait_event("flushing")
    os.kill(source.pid, signal.SIGSTOP)
    source.await_stop()
    source.do("cancel")
    source.do("cancel")
    source.go_on()
    assert source.done("cancel")["late"] == source.done("cancel")["late"] == ""
    assert source.done("send")["kind"] == "MigrationCancelled"
    assert destination.done("receive")["error"]


def test_cancel_that_comes_with_commit_counts_or_is_told_to_be_late(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    source.do("send", url=lab.url, stop_at="committed")  # with COMMIT still to be said
    source.wait_phase("committed")
    source.await_stop()
    os.kill(destination.pid, signal.SIGSTOP)
    destination.await_stop()
    source.go_on()
    source.call("fds")  # COMMIT is on its way
    destination.do("cancel")
    destination.go_on()
    sent, received = source.done("send"), destination.done("receive")
    if received["late"]:
        assert sent["error"] is None and received["error"] is None
        lab.runs_on(destination)
    else:
        assert sent["running"] and received["kind"] == "MigrationCancelled"
        still_works(lab, source, destination)
