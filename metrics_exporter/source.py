"""Where the figures come from: the controller's answer, and what is read from the files that come beside it."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Final

import msgpack

from shared.control import Channel
from shared.errors import FlotillaError, ProtocolError
from shared.figures import Figures, from_wire
from shared.linux import close_fds, recv_fds
from shared.messages import Verb
from shared.reactor import Future, Reactor, sleep

ANSWER_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 20.0
# Figures that are younger are given out again: a flood of requests must not become one on the guest's controller.
FRESH_SECONDS: Final = 0.5
MAX_NOTE: Final = 4096
MAX_ROLLUP: Final = 4096


@dataclass(frozen=True, slots=True)
class Measured:
    """`pss_bytes` by pid, for those that could be read. `seconds`: what it took to collect all of it."""

    figures: Figures
    pss_bytes: dict[int, int]
    seconds: float


class Source:
    """One control channel and one sidecar. Requests that come while an answer is waited for share it."""

    def __init__(self, reactor: Reactor, endpoint: str, sidecar: socket.socket) -> None:
        self._reactor = reactor
        self._channel = Channel(reactor, endpoint, bind=False, once=True)
        self._sidecar = sidecar
        sidecar.setblocking(False)
        self._pending: Future[Measured] | None = None
        self._last: Measured | None = None
        self._taken = 0.0

    async def connected(self) -> None:
        """The endpoint's name is needed no more. Raises Timeout."""
        await self._channel.connected(CONNECT_SECONDS)
        self._channel.emit("ready")

    async def measure(self) -> Measured:
        """Raises FlotillaError."""
        if self._pending is None:
            if self._last is not None and time.monotonic() - self._taken < FRESH_SECONDS:
                return self._last
            self._pending = Future()
            self._reactor.spawn(self._collect(self._pending), "collect")
        return await self._pending

    async def _collect(self, result: Future[Measured]) -> None:
        """A task of its own: a client that goes away takes nobody's answer with it."""
        try:
            began = time.monotonic()
            wire = await self._channel.call(Verb.METRICS, ANSWER_SECONDS)
            pss = await self._read_files()
            self._taken = time.monotonic()
            self._last = Measured(from_wire(wire), pss, self._taken - began)
        except FlotillaError as error:
            self._pending = None
            result.set_exception(error)
        else:
            self._pending = None
            result.set_result(self._last)

    async def _read_files(self) -> dict[int, int]:
        """All that lie in the sidecar; of an answer that came too late, too. One a turn: clients wait no longer."""
        pss: dict[int, int] = {}
        while True:
            try:
                note, fds = recv_fds(self._sidecar, MAX_NOTE)
            except BlockingIOError:
                return pss
            if not note:
                return pss
            pids = [*_pids(note)]
            for pid, fd in zip(pids, fds, strict=False):
                if (size := _pss(fd)) is not None:
                    pss[pid] = size
                await sleep(self._reactor, 0)
            close_fds(fds)


def _pids(note: bytes) -> list[int]:
    message = msgpack.unpackb(note)
    pids = message.get("pids") if isinstance(message, dict) else None
    if not isinstance(pids, list):
        raise ProtocolError("metrics: a note without pids")
    return pids


def _pss(fd: int) -> int | None:
    """Proportional set size in bytes, of a process's smaps_rollup; None when it is gone."""
    try:
        text = os.pread(fd, MAX_ROLLUP, 0)
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) << 10
    return None
