"""Faults that any worker can be told to have; what is particular to a kind of device is its own (`fault`).

    kill@VERB      end, as by SIGKILL, when a request of this verb comes: before it is carried out or answered
    hang@VERB      the main loop stands still at that moment, for `value` ms; 0: for ever
    corrupt-control    one message on the control channel that is none
    out-of-memory      take memory until there is none: whoever asks for it sets RLIMIT_AS first
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from shared import log
from shared.errors import HostError, ProtocolError
from shared.reactor import Reactor

if TYPE_CHECKING:
    from shared.control import Channel, Handler

# The status of a process that a test or a rehearsal ended: what a shell says of one that SIGKILL ended.
KILLED: Final = 137
# No vhost-user header and no msgpack.
GARBAGE: Final = b"\xff" * 64
HOARD_MIB: Final = 4096
NOTHING: Final[Mapping[str, Any]] = {}


class Rehearsal:
    """The `fault` handler of one worker. `fault` gets every word that is not in the table above."""

    def __init__(
        self, reactor: Reactor, channel: Channel, fault: Callable[[str, int, Mapping[str, Any]], None]
    ) -> None:
        self._reactor = reactor
        self._channel = channel
        self._fault = fault

    def __call__(self, arguments: dict[str, Any]) -> dict[str, Any]:
        what, value = arguments["what"], arguments.get("value", 0)
        how, at, verb = what.partition("@")
        if at:
            self._strike_at(how, verb, value)
        elif what == "corrupt-control":
            self._channel.garble(GARBAGE)
        elif what == "out-of-memory":
            self._reactor.call_soon(starve)  # behind the answer
        else:
            self._fault(what, value, arguments.get("options") or NOTHING)
        return {}

    def _strike_at(self, how: str, verb: str, value: int) -> None:
        handlers = self._channel.handlers
        if how not in ("kill", "hang") or verb not in handlers:
            raise ProtocolError(f"fault {how}@{verb}: kill or hang at one of {', '.join(map(str, handlers))}")
        handler: Handler = handlers[verb]

        def struck(arguments: dict[str, Any]) -> Any:
            handlers[verb] = handler
            if how == "kill":
                os._exit(KILLED)
            stand_still(value)
            return handler(arguments)

        handlers[verb] = struck


def stand_still(ms: int) -> None:
    """Hold this thread for so many milliseconds; 0: for ever."""
    from threading import Event

    Event().wait(ms / 1000 if ms else None)


def starve() -> None:
    """Raises HostError when an allocation fails, which is this process's end; ProtocolError where none does."""
    hoard = []
    try:
        for _ in range(HOARD_MIB):
            hoard.append(bytearray(1 << 20))
    except MemoryError:
        hoard.clear()
        log.error("out of memory: an allocation failed")  # said now: its front end ends it as soon as it lets go
        raise HostError("out of memory: an allocation failed") from None
    hoard.clear()
    raise ProtocolError(f"out-of-memory: {HOARD_MIB} MiB could be had", "set RLIMIT_AS before")
