"""The states of an agent: one enum, one table, one event per transition.

    source                                           destination
                       IDLE                                              IDLE
        connect          │                               listen            │
                     CONNECTING                                        LISTENING
        connected        │                               accepted          │
                      GREETING ········· hello ·········▶               GREETING
        hello            │     ◀········ hello ··········  hello          │
                       READY                                             READY
        build sent       │     ········· BUILD ·········▶  build received  │
                      BUILDING                                          BUILDING
        built received   │     ◀········ BUILT ··········  built sent      │
                       BUILT                                             BUILT
        state sent       │     ········· STATE ·········▶  state received  │
                      OFFERED                                           OFFERED
        started received │     ◀········ STARTED ········  started sent    │
                      FINISHED                                          FINISHED

    READY … OFFERED ── withdrawn sent, refused received ──▶ OVER ◀── refused sent, withdrawn received ── READY … OFFERED
    any but FINISHED and OVER ── failed ──▶ FAILED      the peer, the stream, a deadline, or a cancel

FINISHED, OVER and FAILED are final: what still comes is dropped, and the end of the stream is no error any more. A
message that has no row in its state is a protocol error. Who runs the guest is written nowhere here: the controllers
settle it over the ownership word, whatever an agent thinks (docs/migration.md).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final

from shared.errors import ProtocolError
from shared.handover import Message


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
    REFUSED_SENT = "refused sent"
    REFUSED_RECEIVED = "refused received"
    WITHDRAWN_SENT = "withdrawn sent"
    WITHDRAWN_RECEIVED = "withdrawn received"
    FAILED = "failed"


FINAL: Final = frozenset({State.FINISHED, State.OVER, State.FAILED})
_CONVERSATION: Final = (State.READY, State.BUILDING, State.BUILT, State.OFFERED)

_SOURCE: Final[dict[tuple[State, Event], State]] = {
    (State.IDLE, Event.CONNECT): State.CONNECTING,
    (State.CONNECTING, Event.CONNECTED): State.GREETING,
    (State.GREETING, Event.HELLO): State.READY,
    (State.READY, Event.BUILD_SENT): State.BUILDING,
    (State.BUILDING, Event.BUILT_RECEIVED): State.BUILT,
    (State.BUILT, Event.STATE_SENT): State.OFFERED,
    (State.OFFERED, Event.STARTED_RECEIVED): State.FINISHED,
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
    **{(state, Event.REFUSED_SENT): State.OVER for state in _CONVERSATION},
    **{(state, Event.WITHDRAWN_RECEIVED): State.OVER for state in _CONVERSATION},
}
_FAILURES: Final = {(state, Event.FAILED): State.FAILED for state in State if state not in FINAL}

TRANSITIONS: Final[dict[Role, dict[tuple[State, Event], State]]] = {
    Role.SOURCE: _SOURCE | _FAILURES,
    Role.DESTINATION: _DESTINATION | _FAILURES,
}


def event_of(message: Message, *, sent: bool) -> Event:
    """Raises ProtocolError for a message that moves no state."""
    try:
        return Event(f"{message.name.lower()} {'sent' if sent else 'received'}")
    except ValueError:
        raise ProtocolError(f"{message.name} is not for a controller") from None


class Machine:
    """The state of one agent; `on_change(old, event, new)` hears of every transition."""

    def __init__(self, on_change: Callable[[State, Event, State], None]) -> None:
        self.role = Role.SOURCE
        self.state = State.IDLE
        self._on_change = on_change

    @property
    def over(self) -> bool:
        return self.state in FINAL

    def to(self, event: Event) -> None:
        """Raises ProtocolError when the table has no such transition; the state stays then."""
        before = self.state
        after = TRANSITIONS[self.role].get((before, event))
        if after is None:
            raise ProtocolError(f"{event!s}: not in state {before!s} of a migration's {self.role!s}")
        self.state = after
        self._on_change(before, event, after)
