"""The states of an agent: one enum, one table, one event per transition. Three ways lead on from READY.

    source                                           destination
                       IDLE                                              IDLE
        connect          │                               listen            │
                     CONNECTING                                        LISTENING
        connected        │                               accepted          │
                      GREETING ········· hello ·········▶               GREETING
        hello            │     ◀········ hello ··········  hello          │
                       READY                                             READY
    local
        build sent       │     ········· BUILD ·········▶  build received  │
                      BUILDING                                          BUILDING
        built received   │     ◀········ BUILT ··········  built sent      │
                       BUILT                                             BUILT
        state sent       │     ········· STATE ·········▶  state received  │
                      OFFERED                                           OFFERED
        started received │     ◀········ STARTED ········  started sent    │
                      FINISHED                                          FINISHED
    remote
        machine sent     │     ········ MACHINE ········▶  machine received│
                      PROPOSED                                          PROPOSED
        accepted received│     ◀······· ACCEPTED ········  accepted sent   │
                      COPYING  ········ PAGES … ········▶               COPYING
        built received   │     ◀········ BUILT ··········  built sent      │
                      ROUNDS   ········ PAGES … ········▶               ROUNDS
        state sent       │     ········· STATE ·········▶  state received  │
                      FINAL    ········ PAGES … ········▶               FINAL
        end of ram sent  │     ······ END_OF_RAM ·······▶  … received      │
                      HANDED                                            HANDED
    a source in doubt, over a connection of its own
                       READY                                             READY
        ask sent         │     ··········· ASK ·········▶  ask received    │
                       ASKED                                             ASKED
        outcome received │     ◀········ OUTCOME ········  outcome sent    │
                     ANSWERED                                          ANSWERED
        heard sent       │     ·········· HEARD ········▶  heard received  │
                      FINISHED                                          FINISHED

    any between READY and these last ones ── withdrawn, refused ──▶ OVER
    any but the last ones ── failed ──▶ FAILED      the peer, the stream, a deadline, or a cancel

FINISHED, HANDED, OVER and FAILED are the last: what still comes is dropped, and the end of the stream is no error any
more. In HANDED the stream is the controllers', who say PREPARED, COMMIT and STARTED over it themselves: no agent's
death decides anything then. PAGES, SYNC and SYNCED move no state; PAGES_IN says where they may come. A message that has
no row in its state is a protocol error. Who runs the guest is written nowhere here: the controllers settle it, whatever
an agent thinks (docs/migration.md).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final

from shared.errors import ProtocolError
from shared.handover import AGENTS_ONLY, Message


class Role(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class State(StrEnum):
    IDLE = "idle"
    CONNECTING = "connecting"
    LISTENING = "listening"
    GREETING = "greeting"
    READY = "ready"
    BUILDING = "building"
    BUILT = "built"
    OFFERED = "offered"
    PROPOSED = "proposed"
    COPYING = "copying"
    ROUNDS = "rounds"
    FINAL = "final"
    HANDED = "handed"
    ASKED = "asked"
    ANSWERED = "answered"
    FINISHED = "finished"
    OVER = "over"
    FAILED = "failed"


class Event(StrEnum):
    CONNECT = "connect"
    CONNECTED = "connected"
    LISTEN = "listen"
    ACCEPTED = "accepted"
    HELLO = "hello"
    BUILD_SENT = "build sent"
    BUILD_RECEIVED = "build received"
    BUILT_SENT = "built sent"
    BUILT_RECEIVED = "built received"
    STATE_SENT = "state sent"
    STATE_RECEIVED = "state received"
    STARTED_SENT = "started sent"
    STARTED_RECEIVED = "started received"
    MACHINE_SENT = "machine sent"
    MACHINE_RECEIVED = "machine received"
    ACCEPTED_SENT = "accepted sent"
    ACCEPTED_RECEIVED = "accepted received"
    END_OF_RAM_SENT = "end of ram sent"
    END_OF_RAM_RECEIVED = "end of ram received"
    ASK_SENT = "ask sent"
    ASK_RECEIVED = "ask received"
    OUTCOME_SENT = "outcome sent"
    OUTCOME_RECEIVED = "outcome received"
    HEARD_SENT = "heard sent"
    HEARD_RECEIVED = "heard received"
    REFUSED_SENT = "refused sent"
    REFUSED_RECEIVED = "refused received"
    WITHDRAWN_SENT = "withdrawn sent"
    WITHDRAWN_RECEIVED = "withdrawn received"
    FAILED = "failed"


LAST: Final = frozenset({State.FINISHED, State.HANDED, State.OVER, State.FAILED})
PAGES_IN: Final = frozenset({State.COPYING, State.ROUNDS, State.FINAL})
_CONVERSATION: Final = (
    *(State.READY, State.BUILDING, State.BUILT, State.OFFERED),
    *(State.PROPOSED, State.COPYING, State.ROUNDS, State.FINAL),
    *(State.ASKED, State.ANSWERED),
)

_SOURCE: Final[dict[tuple[State, Event], State]] = {
    (State.IDLE, Event.CONNECT): State.CONNECTING,
    (State.CONNECTING, Event.CONNECTED): State.GREETING,
    (State.GREETING, Event.HELLO): State.READY,
    (State.READY, Event.BUILD_SENT): State.BUILDING,
    (State.BUILDING, Event.BUILT_RECEIVED): State.BUILT,
    (State.BUILT, Event.STATE_SENT): State.OFFERED,
    (State.OFFERED, Event.STARTED_RECEIVED): State.FINISHED,
    (State.READY, Event.MACHINE_SENT): State.PROPOSED,
    (State.PROPOSED, Event.ACCEPTED_RECEIVED): State.COPYING,
    (State.COPYING, Event.BUILT_RECEIVED): State.ROUNDS,
    (State.ROUNDS, Event.STATE_SENT): State.FINAL,
    (State.FINAL, Event.END_OF_RAM_SENT): State.HANDED,
    (State.READY, Event.ASK_SENT): State.ASKED,
    (State.ASKED, Event.OUTCOME_RECEIVED): State.ANSWERED,
    (State.ANSWERED, Event.HEARD_SENT): State.FINISHED,
    **{(state, Event.WITHDRAWN_SENT): State.OVER for state in _CONVERSATION},
    **{(state, Event.REFUSED_RECEIVED): State.OVER for state in _CONVERSATION},
}
_DESTINATION: Final[dict[tuple[State, Event], State]] = {
    (State.IDLE, Event.LISTEN): State.LISTENING,
    (State.LISTENING, Event.ACCEPTED): State.GREETING,
    (State.GREETING, Event.HELLO): State.READY,
    (State.READY, Event.BUILD_RECEIVED): State.BUILDING,
    (State.BUILDING, Event.BUILT_SENT): State.BUILT,
    (State.BUILT, Event.STATE_RECEIVED): State.OFFERED,
    (State.OFFERED, Event.STARTED_SENT): State.FINISHED,
    (State.READY, Event.MACHINE_RECEIVED): State.PROPOSED,
    (State.PROPOSED, Event.ACCEPTED_SENT): State.COPYING,
    (State.COPYING, Event.BUILT_SENT): State.ROUNDS,
    (State.ROUNDS, Event.STATE_RECEIVED): State.FINAL,
    (State.FINAL, Event.END_OF_RAM_RECEIVED): State.HANDED,
    (State.READY, Event.ASK_RECEIVED): State.ASKED,
    (State.ASKED, Event.OUTCOME_SENT): State.ANSWERED,
    (State.ANSWERED, Event.HEARD_RECEIVED): State.FINISHED,
    **{(state, Event.REFUSED_SENT): State.OVER for state in _CONVERSATION},
    **{(state, Event.WITHDRAWN_RECEIVED): State.OVER for state in _CONVERSATION},
}
_FAILURES: Final = {(state, Event.FAILED): State.FAILED for state in State if state not in LAST}

TRANSITIONS: Final[dict[Role, dict[tuple[State, Event], State]]] = {
    Role.SOURCE: _SOURCE | _FAILURES,
    Role.DESTINATION: _DESTINATION | _FAILURES,
}


def event_of(message: Message, *, sent: bool) -> Event:
    """Raises ProtocolError for a message that moves no state."""
    try:
        return Event(f"{message.name.lower().replace('_', ' ')} {'sent' if sent else 'received'}")
    except ValueError:
        who = "another agent" if message in AGENTS_ONLY else "the controllers' own conversation"
        raise ProtocolError(f"{message.name} is for {who} and has no place here") from None


class Machine:
    """The state of one agent; `on_change(old, event, new)` hears of every transition."""

    def __init__(self, on_change: Callable[[State, Event, State], None]) -> None:
        self.role = Role.SOURCE
        self.state = State.IDLE
        self._on_change = on_change

    @property
    def over(self) -> bool:
        return self.state in LAST

    def check_pages(self, message: Message) -> None:
        """Raises ProtocolError where no pages may be under way."""
        if self.state not in PAGES_IN:
            raise ProtocolError(f"{message.name}: not in state {self.state!s} of a migration's {self.role!s}")

    def to(self, event: Event) -> None:
        """Raises ProtocolError when the table has no such transition; the state stays then."""
        before = self.state
        after = TRANSITIONS[self.role].get((before, event))
        if after is None:
            raise ProtocolError(f"{event!s}: not in state {before!s} of a migration's {self.role!s}")
        self.state = after
        self._on_change(before, event, after)
