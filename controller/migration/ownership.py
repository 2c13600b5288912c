"""The ownership word: one 32-bit word in a page that both controllers map says whose the guest is.

    SOURCE ──offer──▶ OFFERED ──claim──▶ CLAIMED ──▶ RUNNING
      ▲                 │  ▲               │ │
      ├────take back────┘  └───give back───┘ │
      └────take back, the destination dead───┘

    offer       the source: the guest is paused and saved          claim       the destination: the state is loaded
    take back   the source: something went wrong                   give back   the destination: it can't go on after all

Every arrow is one compare-and-swap, so exactly one side wins each race, whatever died in between. The destination
touches neither guest RAM nor disk before RUNNING; that is why whatever is not RUNNING can be taken back. RUNNING is
final: from there on the guest is what the destination made of it. The rules below are pure and have a model that
enumerates every interleaving and every kill (tests/controller/migration/test_model.py).
"""

from __future__ import annotations

import fcntl
import os
from enum import IntEnum, StrEnum

from shared.atomics import cas32, load32
from shared.errors import ProtocolError
from shared.linux import F_GET_SEALS, F_SEAL_SHRINK, memfd, mmap_fd, munmap

PAGE_SIZE = 4096


class Owner(IntEnum):
    """Values of the word."""

    SOURCE = 0
    OFFERED = 1
    CLAIMED = 2
    RUNNING = 3


class Action(StrEnum):
    """What the source has to do when its migration stops for whatever reason."""

    TAKE_BACK = "take back"  # compare-and-swap the word to SOURCE; if that fails, look again
    WAIT = "wait"  # for RUNNING or for the destination's death
    GONE = "gone"  # the destination runs the guest
    LOST = "lost"  # the destination ran it, and died


def source_action(word: Owner, destination_ended: bool) -> Action:
    """The source's rule. `destination_ended` must have been read before the word."""
    if word is Owner.RUNNING:
        return Action.LOST if destination_ended else Action.GONE
    if word is Owner.CLAIMED and not destination_ended:
        return Action.WAIT
    return Action.TAKE_BACK


def destination_may_abort(cancelled: bool, load_failed: bool, source_ended: bool) -> bool:
    """The destination's rule with the complete state in hand: a dead source leaves it as the only one who can go on."""
    return load_failed or (cancelled and not source_ended)


class Ownership:
    """The word of one migration, mapped. `fd` is a sealed memfd and belongs to this object."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._address = mmap_fd(fd, PAGE_SIZE)

    @classmethod
    def create(cls) -> Ownership:
        return cls(memfd("ch_owner", PAGE_SIZE))

    @classmethod
    def attach(cls, fd: int) -> Ownership:
        """What the peer sent; takes the descriptor when it succeeds. Raises ProtocolError if the file could shrink."""
        try:
            seals = fcntl.fcntl(fd, F_GET_SEALS)
        except OSError:
            seals = 0
        if not seals & F_SEAL_SHRINK or os.fstat(fd).st_size < PAGE_SIZE:
            raise ProtocolError("the ownership page is not a sealed memfd of one page")
        return cls(fd)

    @property
    def word(self) -> Owner:
        """A value that is none counts as RUNNING: somebody else may run the guest."""
        value = load32(self._address)
        return Owner(value) if value <= Owner.RUNNING else Owner.RUNNING

    def move(self, before: Owner, after: Owner) -> bool:
        """One compare-and-swap. False when the word was not `before`."""
        return cas32(self._address, before, after) == before

    def close(self) -> None:
        munmap(self._address, PAGE_SIZE)
        os.close(self.fd)
