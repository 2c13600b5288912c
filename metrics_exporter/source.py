"""Where the figures come from: the controller's answer, and what is read from the files that come beside it."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from typing import Final

import msgpack

from shared.control import Channel
from shared.errors import HostError, ProtocolError
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
PSS: Final = re.compile(rb"^Pss:\s+(\d{1,15}) kB$", re.M)


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
            measured = await self._measured()
        except Exception as error:  # also a bug: whoever waits answers for it
            result.set_exception(error)
        except BaseException as error:
            result.set_exception(error)
            raise
        else:
            result.set_result(measured)
        finally:
            self._pending = None

    async def _measured(self) -> Measured:
        began = time.monotonic()
        wire = await self._channel.call(Verb.METRICS, ANSWER_SECONDS)
        pss = await self._read_files()
        figures = from_wire(wire)
        self._taken = time.monotonic()
        self._last = Measured(figures, pss, self._taken - began)
        return self._last

    async def _read_files(self) -> dict[int, int]:
        """All that lie in the sidecar; of an answer that came too late, too. One a turn: clients wait no longer."""
        pss: dict[int, int] = {}
        while True:
            try:
                note, fds = recv_fds(self._sidecar, MAX_NOTE)
            except BlockingIOError:
                return pss
            except OSError as error:
                raise HostError(f"metrics: {error}") from error
            try:
                if not note:
                    return pss
                for pid, fd in zip(_pids(note), fds, strict=False):
                    if (size := _pss(fd)) is not None:
                        pss[pid] = size
                    await sleep(self._reactor, 0)
            finally:
                close_fds(fds)


def _pids(note: bytes) -> list[int]:
    try:
        message = msgpack.unpackb(note)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:  # TypeError: a list as a key
        raise ProtocolError("metrics: a note that is not msgpack") from error
    pids = message.get("pids") if isinstance(message, dict) else None
    if not isinstance(pids, list):
        raise ProtocolError("metrics: a note without pids")
    if not all(type(pid) is int for pid in pids):
        raise ProtocolError("metrics: a note with a pid that is no number")
    return pids


def _pss(fd: int) -> int | None:
    """Proportional set size in bytes, of a process's smaps_rollup; None when it is gone, or this is no such file."""
    try:
        text = os.pread(fd, MAX_ROLLUP, 0)
    except OSError:
        return None
    found = PSS.search(text)
    return int(found[1]) << 10 if found else None
