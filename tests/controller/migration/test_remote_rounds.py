"""The rounds of a remote migration: a guest that writes too fast, a copy that does not end, the estimate."""

from __future__ import annotations

import pytest

from controller.migration.fixed_cost import FIRST_GUESS_MS, GUESSES
from shared.handover import Message
from tests.controller.migration.relay import Cut, Relay
from tests.controller.migration.remote_ends import still_works

HOUR = 3600  # of which a test says itself when it is over


def test_guest_that_writes_too_fast_is_cancelled_when_the_time_is_up(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    source.do("send", url=lab.url, bounds={"downtime_ms": 1, "timeout_s": HOUR})
    for _ in range(3):
        source.wait_event("migration-memory-iteration")
    source.call("time_up")
    sent = source.done("send")
    assert f"timeout_s={HOUR} is over and downtime_ms=1 was not reached" in sent["error"][1]
    assert sent["progress"]["round"] > 2
    assert destination.done("receive")["error"][1] == "the source gave up"
    still_works(lab, source, destination)


def test_first_round_that_does_not_end_is_cancelled_when_the_time_is_up(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    relay = Relay(f"{lab.folder}/relay", lab.url[5:], Cut(Message.SYNCED, 0, hold=True))
    sent = source.call("send", url=f"unix:{lab.folder}/relay", bounds={"timeout_s": 1})
    relay.close()
    assert sent["error"][1].startswith("timeout_s=1 is over before all of the guest's RAM was copied once")
    assert destination.done("receive")["error"]
    still_works(lab, source, destination)


def test_what_an_attempt_has_shown_of_the_destination_is_in_the_estimate_of_the_next(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, fail="lock")  # after PREPARED, which has told how long loading took
    first = source.call("send", url=lab.url)["progress"]["breakdown"]
    assert destination.done("receive")["error"]
    destination.receive_remote(lab.url)
    second = source.call("send", url=lab.url)["progress"]["breakdown"]
    assert destination.done("receive")["error"] is None
    assert first["copied"]["fixed_ms"] == FIRST_GUESS_MS
    expected = FIRST_GUESS_MS - GUESSES["load"] + first["prepare"]["load_ms"]
    assert second["copied"]["fixed_ms"] == pytest.approx(expected, abs=0.01)


def test_guest_that_writes_too_fast_goes_all_the_same_when_told_so(lab):
    source, destination = lab.remote_source(), lab.controller()
    lab.copy(source, destination, bounds={"downtime_ms": 1, "timeout_s": 1, "strategy": "ignore"})


@pytest.mark.parametrize(
    "bounds",
    [{"downtime_ms": 1, "timeout_s": 1, "strategy": "ignore"}, {"downtime_ms": 60000, "timeout_s": 10}],
    ids=["the time is up", "the bound is met"],
)
def test_guest_goes_though_every_round_is_older_than_a_fresh_flush(lab, bounds):
    source, destination = lab.remote_source(), lab.controller()
    lab.copy(source, destination, fresh_s=0.0, bounds=bounds)


def test_destination_has_the_figures_of_a_source_that_is_gone(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    sent = source.call("send", url=lab.url)["progress"]["breakdown"]
    figures = destination.done("receive")["progress"]["breakdown"]["source"]
    assert figures.pop("final_pass_ms") == sent["copied"]["final_pass_ms"]
    assert set(figures) == {"connect_ms", "propose", "build", "pause", "save_ms", "prepare"}
    assert figures == {name: sent[name] for name in figures}


# Disks that take their time ----------------------------------------------------------------------------------------


def flushing(lab, **faults):
    """A source whose disk takes as long as it is told, and its destination."""
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    source.do("send", url=lab.url, hold_flush=True, **faults)
    source.wait_event("flushing")
    lab.runs_on(source)
    return source, destination


def test_disk_that_takes_its_time_is_waited_for_while_the_guest_runs(lab):
    source, destination = flushing(lab)
    source.call("flushed")
    assert source.done("send")["error"] is None and destination.done("receive")["error"] is None
    lab.runs_on(destination)


def test_cancel_is_heard_while_a_disk_takes_its_time(lab):
    source, destination = flushing(lab)
    source.do("cancel")
    assert source.done("send")["kind"] == "MigrationCancelled"
    assert destination.done("receive")["error"]
    source.call("flushed")
    still_works(lab, source, destination)


def test_end_of_the_destination_is_noticed_while_a_disk_takes_its_time(lab):
    source, destination = flushing(lab)
    destination.kill()
    assert source.done("send")["running"]
    source.call("flushed")
    still_works(lab, source, lab.controller())


def test_time_that_is_up_while_a_disk_takes_its_time_names_the_disk(lab):
    source, destination = flushing(lab, bounds={"timeout_s": HOUR})
    source.call("time_up")
    sent = source.done("send")
    over = f"timeout_s={HOUR} is over while what the guest has written was flushed to _pulse0"
    assert sent["error"][1].startswith(over)
    assert destination.done("receive")["error"]
    source.call("flushed")
    still_works(lab, source, destination)
