"""Remote migration with real controllers and agents: kills, cancels and cuts at every state. Never two guests; one
wherever one can be; a doubt where nobody can know.
"""

from __future__ import annotations

import os
import signal
import socket

import pytest

from controller.migration import codec
from controller.migration.fixed_cost import FIRST_GUESS_MS, GUESSES
from shared import wire
from shared.handover import Message
from tests.controller.migration.conftest import Died, Lab, Remote
from tests.controller.migration.relay import Cut, Relay

SEND = ("connecting", "proposing", "copying", "pausing", "saving", "final-pass", "preparing", "committed")
RECEIVE = (
    *("listening", "greeting", "ready", "checking", "building", "built", "loading", "prepared", "committed", "running"),
)
SOURCE_AGENT = ("connecting", "greeting", "ready", "proposed", "copying", "rounds", "final", "handed")
DESTINATION_AGENT = ("listening", *SOURCE_AGENT[1:])
FAST = {"prepared": 0.5, "started": 0.5}


def outcome(remote: Remote, what: str) -> dict | None:
    """What became of a command; None when its controller died over it."""
    try:
        return remote.done(what)
    except Died:
        remote.wait()
        return None


def still_works(lab: Lab, source: Remote, destination: Remote) -> None:
    """The guest is the source's and runs; after a failure a retry works."""
    lab.runs_on(source)
    lab.copy(source, destination)


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
    assert source.events == ["migration-started", "migration-finished"]
    progress = sent["progress"]
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
    source.do("send", url=lab.url, settings=FAST)
    sent = outcome(source, "send")
    assert sent["error"]
    outcome(destination, "receive")
    if phase in ("committed", "running"):
        # It had heard COMMIT: only somebody who sees that it is dead can say so.
        assert sent["kind"] == "MigrationInDoubt" and not sent["running"] and sent["progress"]["state"] == "in-doubt"
        assert "migration-in-doubt" in source.events
        lab.is_dead()
        resolve_here(source)
        still_works(lab, source, lab.controller())
    else:
        assert sent["running"]
        still_works(lab, source, lab.controller())


def resolve_here(source: Remote) -> None:
    """When the destination's time is over."""
    while (report := source.call("resolve", here=True))["error"]:
        assert "may still take the guest" in report["error"][0]


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
    if phase in ("committed", "running"):  # too late
        assert sent["error"] is None and received["error"] is None
        lab.runs_on(destination)
    else:
        assert sent["error"] and received["kind"] == "MigrationCancelled"
        still_works(lab, source, destination)


# Cuts ------------------------------------------------------------------------------------------------------------

BEFORE_COMMIT = [
    Cut(message, keep)
    for message, keeps in {
        Message.MACHINE: (0, 4, 100, -1),
        Message.ACCEPTED: (0, 4, 9, -1),
        Message.PAGES: (0, 4, 10, 20, 100, 50000, -1),
        Message.SYNC: (0, 4, -1),
        Message.SYNCED: (0, 4, -1),
        Message.BUILT: (0, 9),
        Message.STATE: (0, 4, 1000, -1),
        Message.END_OF_RAM: (0, 4, -1),
        Message.PREPARED: (0, 4, 9),
        Message.COMMIT: (0, 4),
    }.items()
    for keep in keeps
]


def across(lab: Lab, cut: Cut | None, source: Remote, destination: Remote, **settings: float) -> dict:
    """Send through a relay; what the source says."""
    relay = Relay(f"{lab.folder}/relay", lab.url[5:], cut)
    try:
        return source.call("send", url=f"unix:{lab.folder}/relay", settings={**FAST, **settings})
    finally:
        relay.close()


@pytest.mark.parametrize("cut", BEFORE_COMMIT, ids=lambda cut: f"{cut.message.name} {cut.keep}")
def test_stream_cut_before_the_destination_has_heard_commit(lab, cut):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, settings=FAST)
    sent = across(lab, cut, source, destination)
    received = destination.done("receive")
    assert sent["error"] and received["error"] and not received["has_vm"]
    if cut.message is Message.COMMIT:
        # The source can't know how far it came.
        assert sent["kind"] == "MigrationInDoubt" and not sent["running"]
        lab.is_dead()
        resolve_here(source)
    still_works(lab, source, destination)


@pytest.mark.parametrize("cut", [Cut(Message.COMMIT, -1), Cut(Message.STARTED, 0), Cut(Message.STARTED, 9)], ids=str)
def test_stream_cut_after_the_destination_has_heard_commit_is_a_doubt_and_two_guests_never_run(lab, cut):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, settings=FAST)
    sent = across(lab, cut, source, destination)
    assert sent["kind"] == "MigrationInDoubt" and sent["progress"]["state"] == "in-doubt"
    assert destination.done("receive")["error"] is None
    lab.runs_on(destination)
    # Whoever says it is here is told by the disk's lock that it is not.
    while "may still take" in (report := source.call("resolve", here=True))["error"][0]:
        pass
    assert "can't go on here" in report["error"][0] and "locked" in report["error"][1]
    settled = source.call("resolve", here=False)
    assert settled["error"] is None and not settled["has_vm"] and settled["progress"]["state"] == "completed"
    lab.runs_on(destination)
    assert source.call("resolve", here=True)["error"] == ["No migration is in doubt"]


def test_whole_stream_through_a_relay_and_relay_killed(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    assert across(lab, None, source, destination)["error"] is None
    assert destination.done("receive")["error"] is None
    lab.runs_on(destination)


def test_late_answer_settles_a_doubt(lab):
    """A destination that is stopped over COMMIT answers when it goes on, and the source lets go."""
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, stop_at="committed")
    sent = source.call("send", url=lab.url, settings={"started": 0.3, "prepared": 60})
    assert sent["kind"] == "MigrationInDoubt"
    os.kill(destination.pid, signal.SIGCONT)
    source.wait_event("resolved")
    assert destination.done("receive")["error"] is None
    lab.runs_on(destination)


def test_commit_that_comes_too_late_is_refused_and_settles_the_doubt(lab):
    """A destination that is stopped before it hears COMMIT, for longer than the source must fear it."""
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, stop_at="prepared", settings={"prepared": 0.3})
    # It is stopped before PREPARED goes out, so that the source waits; the clock runs already.
    source.do("send", url=lab.url, settings={"prepared": 30})
    source.wait_phase("preparing")
    destination.wait_phase("prepared")
    lab.pass_time(0.5)
    os.kill(destination.pid, signal.SIGCONT)
    sent, received = source.done("send"), destination.done("receive")
    assert sent["error"][1] == "the destination refused it" and sent["running"], sent
    assert received["error"]
    still_works(lab, source, destination)


# A source in doubt asks -------------------------------------------------------------------------------------------

ASKING = {**FAST, "ask_again": 0.05}


def falls_into_doubt(lab: Lab, cut: Cut, source: Remote, destination: Remote) -> None:
    """Over a relay that cuts the stream and is gone then: at first nobody can be asked."""
    destination.receive_remote(lab.url, settings=ASKING)
    sent = across(lab, cut, source, destination, **ASKING)
    assert sent["kind"] == "MigrationInDoubt" and sent["progress"]["state"] == "in-doubt", sent


@pytest.mark.parametrize("cut", [Cut(Message.COMMIT, -1), Cut(Message.STARTED, 0), Cut(Message.STARTED, 9)], ids=str)
def test_source_in_doubt_asks_and_lets_go_of_a_guest_that_runs_there(lab, cut):
    source, destination = lab.remote_source(), lab.controller()
    falls_into_doubt(lab, cut, source, destination)
    assert destination.done("receive")["error"] is None
    listens_again(destination)
    relay = Relay(f"{lab.folder}/relay", lab.url[5:])
    try:
        assert resolved(source) == "there"
    finally:
        relay.close()
    lab.runs_on(destination)
    listens_no_more(destination)


@pytest.mark.parametrize("keep", [0, 4])
def test_source_in_doubt_asks_and_goes_on_with_a_guest_that_never_will_run_there(lab, keep):
    """At once: it need not wait until no COMMIT can be under way any more."""
    source, destination = lab.remote_source(), lab.controller()
    falls_into_doubt(lab, Cut(Message.COMMIT, keep), source, destination)
    assert destination.done("receive")["error"]
    lab.is_dead()
    listens_again(destination)
    relay = Relay(f"{lab.folder}/relay", lab.url[5:])
    try:
        assert resolved(source) == "here"
    finally:
        relay.close()
    lab.runs_on(source)
    listens_no_more(destination)
    still_works(lab, source, destination)


def test_refusal_that_was_cut_off_is_asked_for(lab):
    """The destination has heard COMMIT and does not get a disk's lock."""
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, settings=ASKING, fail="lock")
    sent = across(lab, Cut(Message.REFUSED), source, destination, **ASKING)
    assert sent["kind"] == "MigrationInDoubt"
    assert destination.done("receive")["error"]
    listens_again(destination)
    relay = Relay(f"{lab.folder}/relay", lab.url[5:])
    try:
        assert resolved(source) == "here"
    finally:
        relay.close()
    lab.runs_on(source)


def test_destination_whose_source_is_dead_stops_listening_after_a_while(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, settings={**ASKING, "answer": 0.5})
    sent = across(lab, Cut(Message.STARTED), source, destination, **ASKING)
    assert sent["kind"] == "MigrationInDoubt"
    source.kill()
    assert destination.done("receive")["error"] is None
    listens_again(destination)
    listens_no_more(destination)
    lab.runs_on(destination)


class Stranger:
    """Listens where a destination was, and answers every question with the same."""

    def __init__(self, path: str, answer: dict[str, str]) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._listener.settimeout(20)
        self._answer = wire.encode(Message.OUTCOME, codec.encode(Message.OUTCOME, answer))

    def answers(self) -> None:
        """Returns when the source has hung up, without having said that it heard."""
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(20)
            connection.sendall(wire.encode_hello())
            decoder, answered = wire.Decoder(), False
            while data := connection.recv(decoder.wants):
                item = decoder.feed(data)
                if isinstance(item, wire.Frame):
                    assert item.type in (Message.HEARTBEAT, Message.ASK, Message.WITHDRAWN)
                    if item.type is Message.ASK:
                        connection.sendall(self._answer)
                        answered = True
            assert answered

    def close(self) -> None:
        self._listener.close()
        os.unlink(self._path)


def listens_again(destination: Remote) -> None:
    while [exists for _, exists in destination.paths] != [True, False, True]:
        destination.read()


def resolved(source: Remote) -> str:
    while (report := source.read()).get("event") != "resolved":
        pass
    return str(report["fate"])


def listens_no_more(destination: Remote) -> None:
    while [exists for _, exists in destination.paths][3:] != [False]:
        destination.read()
    assert not os.path.exists(destination.paths[-1][0])


def test_another_vmm_that_receives_there_now_does_not_answer_and_goes_on_receiving(lab):
    """Asked again and again, by a source whose own destination is dead."""
    source, destination, other = lab.remote_source(), lab.controller(), lab.controller()
    destination.receive_remote(lab.url, kill_at="running")
    source.do("send", url=lab.url, settings=ASKING)
    assert outcome(source, "send")["kind"] == "MigrationInDoubt"
    assert outcome(destination, "receive") is None
    other.receive_remote(lab.url)
    for _ in range(3):
        other.wait_event("migration-receive-ready")  # somebody has asked, and it listens again
    assert source.call("fds")["progress"]["state"] == "in-doubt"
    resolve_here(source)
    assert source.call("send", url=lab.url)["error"] is None
    assert other.done("receive")["error"] is None
    lab.runs_on(other)


def test_stranger_that_answers_without_the_secret_is_not_believed(lab):
    """It says what would make two guests run."""
    source, destination = lab.remote_source(), lab.controller()
    falls_into_doubt(lab, Cut(Message.STARTED), source, destination)
    assert destination.done("receive")["error"] is None
    lab.runs_on(destination)
    for secret in ("", "0" * 32):
        stranger = Stranger(f"{lab.folder}/relay", {"outcome": "refused", "secret": secret})
        stranger.answers()
        assert source.call("fds")["progress"]["state"] == "in-doubt"
        stranger.close()
    lab.runs_on(destination)
    assert source.call("resolve", here=False)["error"] is None


def test_send_to_a_destination_that_only_answers_is_refused_with_what_to_do(lab):
    source, destination = lab.remote_source(), lab.controller()
    falls_into_doubt(lab, Cut(Message.COMMIT), source, destination)
    assert destination.done("receive")["error"]
    resolve_here(source)
    listens_again(destination)
    sent = source.call("send", url=lab.url)
    assert sent["error"][1:] == ["the destination refused it", "nobody receives here now (receive-migration first)"]
    still_works(lab, source, destination)  # a receive there takes the place of the answers


def test_silent_peer_in_the_rounds_is_noticed(lab):
    """A network that carries nothing any more and says so to nobody."""
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url, settings={"idle": 0.6})
    cut = Cut(Message.SYNCED, 0, hold=True)
    sent = across(lab, cut, source, destination, idle=0.6)
    assert any("silent for 0.6 s" in line for line in sent["error"])
    assert destination.done("receive")["error"]
    still_works(lab, source, destination)


# Rounds ----------------------------------------------------------------------------------------------------------


def test_guest_that_writes_too_fast_is_cancelled_when_the_time_is_up(lab):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    sent = source.call("send", url=lab.url, bounds={"downtime_ms": 1, "timeout_s": 1})
    assert "timeout_s=1 is over and downtime_ms=1 was not reached" in sent["error"][1]
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
