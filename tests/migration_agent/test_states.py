"""The agent's state machine: the table is whole, the straight ways are what the drawing shows, the rest is refused."""

from __future__ import annotations

import itertools

import pytest

from migration_agent.states import LAST, TRANSITIONS, Event, Machine, Role, State, event_of
from shared.errors import ProtocolError
from shared.handover import AGENTS_ONLY, Message

STRAIGHT = {
    Role.SOURCE: [
        (Event.CONNECT, State.CONNECTING), (Event.CONNECTED, State.GREETING), (Event.HELLO, State.READY),
        (Event.BUILD_SENT, State.BUILDING), (Event.BUILT_RECEIVED, State.BUILT), (Event.STATE_SENT, State.OFFERED),
        (Event.STARTED_RECEIVED, State.FINISHED),
    ],
    Role.DESTINATION: [
        (Event.LISTEN, State.LISTENING), (Event.ACCEPTED, State.GREETING), (Event.HELLO, State.READY),
        (Event.BUILD_RECEIVED, State.BUILDING), (Event.BUILT_SENT, State.BUILT), (Event.STATE_RECEIVED, State.OFFERED),
        (Event.STARTED_SENT, State.FINISHED),
    ],
}  # fmt: skip
REMOTE = {
    Role.SOURCE: [
        *STRAIGHT[Role.SOURCE][:3], (Event.MACHINE_SENT, State.PROPOSED), (Event.ACCEPTED_RECEIVED, State.COPYING),
        (Event.BUILT_RECEIVED, State.ROUNDS), (Event.STATE_SENT, State.FINAL), (Event.END_OF_RAM_SENT, State.HANDED),
    ],
    Role.DESTINATION: [
        *STRAIGHT[Role.DESTINATION][:3], (Event.MACHINE_RECEIVED, State.PROPOSED),
        (Event.ACCEPTED_SENT, State.COPYING), (Event.BUILT_SENT, State.ROUNDS), (Event.STATE_RECEIVED, State.FINAL),
        (Event.END_OF_RAM_RECEIVED, State.HANDED),
    ],
}  # fmt: skip
INQUIRY = {
    Role.SOURCE: [
        *STRAIGHT[Role.SOURCE][:3], (Event.ASK_SENT, State.ASKED), (Event.OUTCOME_RECEIVED, State.ANSWERED),
        (Event.HEARD_SENT, State.FINISHED),
    ],
    Role.DESTINATION: [
        *STRAIGHT[Role.DESTINATION][:3], (Event.ASK_RECEIVED, State.ASKED), (Event.OUTCOME_SENT, State.ANSWERED),
        (Event.HEARD_RECEIVED, State.FINISHED),
    ],
}  # fmt: skip
COMMIT = (Message.PREPARED, Message.COMMIT)  # over the stream that the agents have handed over


def machine(role: Role) -> tuple[Machine, list[tuple[State, Event, State]]]:
    seen: list[tuple[State, Event, State]] = []
    made = Machine(lambda before, event, after: seen.append((before, event, after)))
    made.role = role
    return made, seen


@pytest.mark.parametrize("way", [STRAIGHT, REMOTE, INQUIRY], ids=["local", "remote", "inquiry"])
@pytest.mark.parametrize("role", Role)
def test_the_straight_way_and_one_event_per_transition(role, way):
    made, seen = machine(role)
    for event, state in way[role]:
        made.to(event)
        assert made.state is state
    assert made.over
    assert [event for _, event, _ in seen] == [event for event, _ in way[role]]
    assert all(after is before for (_, _, after), (before, _, _) in itertools.pairwise(seen))


@pytest.mark.parametrize("role", Role)
def test_every_state_but_the_final_ones_can_fail_and_final_ones_are_final(role):
    table = TRANSITIONS[role]
    for state in State:
        leaves = [event for before, event in table if before is state]
        assert (Event.FAILED in leaves) == (state not in LAST)
        assert bool(leaves) == (state not in LAST)


@pytest.mark.parametrize("role", Role)
def test_everything_without_a_row_is_refused_and_changes_nothing(role):
    for state, event in itertools.product(State, Event):
        if (state, event) in TRANSITIONS[role]:
            continue
        made, seen = machine(role)
        made.state = state
        with pytest.raises(ProtocolError, match=f"{event!s}: not in state {state!s}"):
            made.to(event)
        assert made.state is state and not seen


def test_each_message_goes_one_way_only():
    for message in Message:
        if message in AGENTS_ONLY or message in COMMIT:
            with pytest.raises(ProtocolError):
                event_of(message, sent=True)
            continue
        senders = [
            role
            for role in Role
            if any(event is event_of(message, sent=True) for _, event in TRANSITIONS[role])
        ]
        receivers = [
            role
            for role in Role
            if any(event is event_of(message, sent=False) for _, event in TRANSITIONS[role])
        ]
        assert len(senders) == len(receivers) == 1 and senders != receivers


@pytest.mark.parametrize("role", Role)
def test_pages_may_come_from_accepted_to_the_end_of_ram_only(role):
    made, _ = machine(role)
    allowed = []
    for event, state in REMOTE[role]:
        made.to(event)
        try:
            made.check_pages(Message.PAGES)
            allowed.append(state)
        except ProtocolError:
            pass
    assert allowed == [State.COPYING, State.ROUNDS, State.FINAL]
