"""Remote migration whose stream is cut, held and answered by strangers: one guest, or a doubt where nobody can know."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from controller.migration import codec
from shared import wire
from shared.handover import Message
from tests.controller.migration.conftest import Lab, Remote
from tests.controller.migration.relay import Cut, Relay
from tests.controller.migration.remote_ends import across, ask_here, outcome, resolve_here, still_works

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


@pytest.mark.parametrize("cut", BEFORE_COMMIT, ids=lambda cut: f"{cut.message.name} {cut.keep}")
def test_stream_cut_before_the_destination_has_heard_commit(lab, cut):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    sent = across(lab, cut, source, destination)
    received = destination.done("receive")
    assert sent["error"] and received["error"] and not received["has_vm"]
    if cut.message is Message.COMMIT:
        # The source can't know how far it came.
        assert sent["kind"] == "MigrationInDoubt" and not sent["running"]
        lab.is_dead()
        resolve_here(lab, source)
    still_works(lab, source, destination)


@pytest.mark.parametrize("cut", [Cut(Message.COMMIT, -1), Cut(Message.STARTED, 0), Cut(Message.STARTED, 9)], ids=str)
def test_stream_cut_after_the_destination_has_heard_commit_is_a_doubt_and_two_guests_never_run(lab, cut):
    source, destination = lab.remote_source(), lab.controller()
    destination.receive_remote(lab.url)
    sent = across(lab, cut, source, destination)
    assert sent["kind"] == "MigrationInDoubt" and sent["progress"]["state"] == "in-doubt"
    assert destination.done("receive")["error"] is None
    lab.runs_on(destination)
    # Whoever says it is here is told by the disk's lock that it is not.
    report = ask_here(source)
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
    destination.go_on()
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
    destination.go_on()
    sent, received = source.done("send"), destination.done("receive")
    assert sent["error"][1] == "the destination refused it" and sent["running"], sent
    assert received["error"]
    still_works(lab, source, destination)


# A source in doubt asks -------------------------------------------------------------------------------------------

ASKING = {"ask_again": 0.05}


def falls_into_doubt(lab: Lab, cut: Cut, source: Remote, destination: Remote) -> None:
    """Over a relay that cuts the stream and is gone then: at first nobody can be asked."""
    destination.receive_remote(lab.url)
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
    destination.receive_remote(lab.url, fail="lock")
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
    destination.receive_remote(lab.url, settings={"answer": 0.5})
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

    def answers(self, first: Callable[[], object] = lambda: None) -> None:
        """Returns when the source has hung up, without having said that it heard. `first` is done before a word."""
        connection, _ = self._listener.accept()
        first()
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
    while [exists for _, exists in destination.paths][:3] != [True, False, True]:
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
    resolve_here(lab, source)
    while "nobody listens on" in str((sent := source.call("send", url=lab.url))["error"]):
        assert sent["running"], sent
        other.wait_event("migration-receive-ready")  # a question keeps others out until it has been answered
    assert sent["error"] is None, sent
    assert other.done("receive")["error"] is None
    lab.runs_on(other)


def test_question_that_is_under_way_when_somebody_decides_is_asked_to_its_end(lab):
    """A VMM that receives there would take a cut for that of its own guest's stream."""
    source, destination = lab.remote_source(), lab.controller()
    falls_into_doubt(lab, Cut(Message.STARTED), source, destination)
    assert destination.done("receive")["error"] is None
    stranger = Stranger(f"{lab.folder}/relay", {"outcome": "nothing", "secret": ""})

    def decide() -> None:
        source.do("resolve", here=False)
        while source.call("fds")["progress"]["state"] == "in-doubt":
            pass

    stranger.answers(decide)
    stranger.close()
    assert source.done("resolve")["error"] is None
    lab.runs_on(destination)


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
    resolve_here(lab, source)
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
