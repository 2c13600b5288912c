"""A vhost-user back end that somebody else runs: dialled at its socket, and again whenever it went away."""

from __future__ import annotations

from controller.vhost_frontend import Frontend, dial
from shared import log
from shared.errors import FlotillaError
from shared.reactor import Reactor, describe

REDIAL_SECONDS = 5.0


class ForeignBackend:
    """Keeps one front end connected until close(). It may come back at the same socket, whenever; the guest waits."""

    def __init__(self, reactor: Reactor, frontend: Frontend, device_id: str, path: str) -> None:
        self._reactor = reactor
        self._frontend = frontend
        self._id = device_id
        self._path = path
        self._closed = False

    async def connect(self) -> None:
        """For the first time. Raises HostError."""
        self._frontend.on_lost = self._lost
        await self._frontend.connect(await dial(self._reactor, self._path))

    def close(self) -> None:
        """No more attempts; the front end is its owner's to close."""
        self._closed = True

    def _lost(self, error: Exception | None) -> None:
        why = describe(error) if error else "closed"
        log.error(f"{self._id}: vhost-user back end at {self._path} lost: {why}")
        self._reactor.spawn(self._redial(), f"reconnect {self._id}")

    async def _redial(self) -> None:
        while not self._closed:
            try:
                await self._frontend.replay(await dial(self._reactor, self._path, REDIAL_SECONDS))
                log.info(f"{self._id}: vhost-user back end at {self._path} is back")
                return
            except FlotillaError as error:
                log.debug(f"{self._id}: {describe(error)}")
