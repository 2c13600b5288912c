"""What the controllers of a migration say to each other, through their agents; the agents only look at the type.

    HEARTBEAT   agent to agent; the controllers never see it
    BUILD       source ──▶ destination   the machine, and every descriptor that goes with it
    BUILT       destination ──▶ source   everything exists and waits; with the destination's pidfd
    STATE       source ──▶ destination   the paused guest's state
    STARTED     destination ──▶ source   the guest runs there, and how long each step took
    REFUSED     destination ──▶ source   no, and why
    WITHDRAWN   source ──▶ destination   never mind, and why

Bodies are msgpack maps (controller/migration/codec.py), frames a header and a body (migration_agent/wire.py).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from shared.messages import MAX_MESSAGE

MAX_FDS: Final = 64  # of one message
MAX_BODY: Final = MAX_MESSAGE - 4096  # a body passes the control plane too, in an envelope of its own
MAX_REASON: Final = 64 << 10


class Message(IntEnum):
    HEARTBEAT = 1
    BUILD = 2
    BUILT = 3
    STATE = 4
    STARTED = 5
    REFUSED = 6
    WITHDRAWN = 7


class Limit(NamedTuple):
    body: int  # bytes
    fds: int


LIMITS: Final[dict[Message, Limit]] = {
    Message.HEARTBEAT: Limit(0, 0),
    Message.BUILD: Limit(MAX_BODY, MAX_FDS),
    Message.BUILT: Limit(MAX_REASON, 1),
    Message.STATE: Limit(MAX_BODY, 0),
    Message.STARTED: Limit(MAX_REASON, 0),
    Message.REFUSED: Limit(MAX_REASON, 0),
    Message.WITHDRAWN: Limit(MAX_REASON, 0),
}
