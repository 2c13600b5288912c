"""What the two sides of a migration say to each other, and how long it may be.

                agents only
    HEARTBEAT   either way                  I live
    PAGES       source ──▶ destination      a piece of guest RAM (shared/pages.py has its body)
    SYNC        source ──▶ destination      the pages before this: have you got them?
    SYNCED      destination ──▶ source      yes
                local: descriptors go along, no page is copied
    BUILD       source ──▶ destination      the machine, and every descriptor that goes with it
    BUILT       destination ──▶ source      everything exists and waits; with the destination's pidfd (local)
    STATE       source ──▶ destination      the paused guest's state
    STARTED     destination ──▶ source      the guest runs there, and how long each step took
                remote: bytes only
    MACHINE     source ──▶ destination      the machine; no descriptors
    ACCEPTED    destination ──▶ source      it can run here, send its RAM. BUILT follows when everything exists
    END_OF_RAM  source ──▶ destination      after STATE and the last page; the agents' part is over
    PREPARED    destination ──▶ source      loaded; a word from you and it runs
    COMMIT      source ──▶ destination      it is yours. STARTED or REFUSED answers
    HEARD       source ──▶ destination      I have heard that
    ASK         source ──▶ destination      in doubt, over a new connection: what has become of the guest?
    OUTCOME     destination ──▶ source      it runs here, it never will, or I don't know it. HEARD answers
                both
    REFUSED     destination ──▶ source      no, and why
    WITHDRAWN   source ──▶ destination      never mind, and why

Bodies are msgpack maps (controller/migration/codec.py), frames a header and a body (shared/wire.py).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from shared import pages
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
    MACHINE = 8
    ACCEPTED = 9
    PAGES = 10
    SYNC = 11
    SYNCED = 12
    END_OF_RAM = 13
    PREPARED = 14
    COMMIT = 15
    HEARD = 16
    ASK = 17
    OUTCOME = 18


AGENTS_ONLY: Final = frozenset({Message.HEARTBEAT, Message.PAGES, Message.SYNC, Message.SYNCED})


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
    Message.MACHINE: Limit(MAX_BODY, 0),
    Message.ACCEPTED: Limit(MAX_REASON, 0),
    Message.PAGES: Limit(pages.MAX_BODY, 0),
    Message.SYNC: Limit(0, 0),
    Message.SYNCED: Limit(0, 0),
    Message.END_OF_RAM: Limit(MAX_REASON, 0),
    Message.PREPARED: Limit(MAX_REASON, 0),
    Message.COMMIT: Limit(MAX_REASON, 0),
    Message.HEARD: Limit(MAX_REASON, 0),
    Message.ASK: Limit(MAX_REASON, 0),
    Message.OUTCOME: Limit(MAX_REASON, 0),
}
