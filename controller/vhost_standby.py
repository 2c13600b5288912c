"""A second back end of a device, beside the one that serves: told everything, running nothing, until it is adopted.

    negotiate(sock)      while the other one serves
    prepare(bases)       the other one is quiesced: memory, rings, log, inflight region, as at an activation
    adopt()              the device's front end speaks with this one from here on
    close()              or not

The back end has been quiesced before it hears of the first ring, so prepare() starts none. Whoever uses this holds the
front end's lock from the quiesce on: no driver's wish may come in between.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from controller.vhost_frontend import Frontend
from controller.vhost_link import Link
from controller.vhost_session import Session
from shared import vhost_user as vu
from shared.errors import HostError, WorkerLost
from shared.typed import TYPE_CHECKING, Any
from shared.vhost_user import ProtocolFeature

if TYPE_CHECKING:
    import socket


Mark = tuple[Any, ...]


class Standby(Frontend):
    """Of the device that `front` is the front end of. Methods raise WorkerLost, ProtocolError and HostError."""

    def __init__(self, front: Frontend) -> None:
        super().__init__(front._reactor, front._memory, front.name, own=front._own)
        self._front = front

    async def negotiate(self, sock: socket.socket) -> None:
        """Raises HostError too, when the back end lacks features that the guest uses."""
        self._borrow()
        await self.replay(sock)
        if lacking := self._front.protocol_features & ~self.protocol_features:
            raise HostError(f"{self.name}: the new back end lacks {lacking!s} of vhost-user, which the last one has")

    def _borrow(self, bases: Mapping[int, int] | None = None) -> None:
        """What the back end is to do, as the front end has it now. Its descriptors stay the front end's."""
        front, session = self._front, self._front._session
        self._memory, self._log, self._config_writes = front._memory, front._log, front._config_writes
        self._session = None
        if session is not None:
            self._session = Session(session.features, session.queues, dict(bases or {}), False, session.inflight)

    def _return(self) -> None:
        self._session = self._log = None

    @property
    def wanted(self) -> frozenset[int]:
        """The rings that the driver has activated."""
        session = self._front._session
        return frozenset(queue.index for queue in session.queues) if session is not None else frozenset()

    async def prepare(self, bases: Mapping[int, int]) -> None:
        self._borrow(bases)
        if self._session is not None:
            if lacking := self._session.features & ~self.features:  # it has been activated after negotiate()
                raise HostError(f"{self.name}: the new back end lacks features {lacking:#x} that the guest uses")
            await self._start(self._connection, self._session, bases, wake=False)

    async def differing_config(self) -> int | None:
        """The first byte of the configuration space that reads differently at the two back ends."""
        ours, theirs = await _config(self._front), await _config(self)
        return next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)

    def untouched(self, before: Mark) -> bool:
        """Whether every ring of the device is as it was when mark() was called."""
        return self.mark() == before

    def mark(self) -> Mark:
        """What a back end can't begin a request without changing: used indices, and who is in flight."""
        session = self._front._session
        if session is None:
            return ()
        region = os.pread(session.inflight.fd, session.inflight.area.mmap_size, 0) if session.inflight else b""
        return (*sorted(self._used_indices(session).items()), region)

    @property
    def ready(self) -> bool:
        """It may be adopted; nothing else keeps it from that."""
        return self._link is not None

    @property
    def _connection(self) -> Link:
        if self._link is None:
            raise WorkerLost(f"{self.name}: the back end went away")
        return self._link

    def adopt(self) -> None:
        """The front end's connection is this one now, its last one is closed. One step: nothing is awaited."""
        front, session = self._front, self._front._session
        before, events = front._link, front._events
        front._link, front._events = self._connection, self._events
        front._link.on_lost = front._lost
        self.on_config_change = lambda: front.on_config_change()
        front.features, front.protocol_features = self.features, self.protocol_features
        front.max_queues = self.max_queues
        if session is not None:
            session.link = front._link
        front._live.set()
        self._link = None
        self._return()
        for connection in (before, events):
            if connection is not None:
                connection.close()
        if session is not None:
            # A kick may have been consumed by the last back end, and an interrupt may be owed.
            for queue in session.queues:
                os.eventfd_write(queue.kick_fd, 1)
                os.eventfd_write(queue.call_fd, 1)

    def close(self) -> None:
        self._return()
        super().close()


async def _config(front: Frontend) -> bytes:
    link = front._link
    if link is None:
        raise WorkerLost(f"{front.name}: the back end went away")
    if ProtocolFeature.CONFIG not in front.protocol_features:
        return bytes(vu.MAX_CONFIG_SIZE)
    return await front.read_config(link, vu.MAX_CONFIG_SIZE)
