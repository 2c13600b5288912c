"""A vhost-user back end that somebody else runs: dialled at its socket, and again whenever it went away.

    connect ──▶ running ──(hung up, talked nonsense)──▶ restarting ──dialled, replayed──▶ running
       │                                                  │  ▲
       └──(the same)──▶ WorkerError                       └──┘ after 0.05 s, 0.1 s, … LAST_DELAY, until close()
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from controller.fleet import row
from controller.supervision import Supervision, cause_of
from controller.vhost_frontend import Frontend, dial
from shared import log
from shared.errors import FlotillaError, WorkerError, WorkerLost
from shared.reactor import Reactor, describe, sleep
from shared.typed import Any, Final, TypeVar

T = TypeVar("T")
FIRST_DELAY, LAST_DELAY = 0.05, 2.0
KIND: Final = "vhost-user"


class ForeignBackend:
    """Keeps one front end connected until close(). It may come back at the same socket, whenever; the guest waits."""

    def __init__(
        self, reactor: Reactor, frontend: Frontend, device_id: str, path: str, supervision: Supervision
    ) -> None:
        self._reactor = reactor
        self._frontend = frontend
        self._supervision = supervision
        self._id = device_id
        self._path = path
        self._closed = False
        self._restarts = 0
        self._reason = ""  # why nobody serves; "" while somebody does

    async def connect(self, attach: Callable[[], Awaitable[T]]) -> T:
        """For the first time; what `attach` makes of the connected front end. It is dialled again only from then on:
        without what the VM has to know of the device, nobody could wait for its return. Raises WorkerError."""
        self._frontend.on_lost = self._gone
        try:
            await self._frontend.connect(await dial(self._reactor, self._path))
        except (FlotillaError, OSError) as error:
            raise self._useless(error) from error
        try:
            attached = await attach()
            await self._frontend.wait_connected()
        except WorkerLost as error:
            raise self._useless(error) from error
        self._frontend.on_lost = self._lost
        return attached

    def _gone(self, error: Exception | None) -> None:
        self._frontend.give_up(WorkerLost(_why(error)))

    def _useless(self, error: Exception) -> WorkerError:
        return WorkerError(f"{self._id}: its vhost-user back end at {self._path} does not serve: {describe(error)}")

    def close(self) -> None:
        """No more attempts; the front end is its owner's to close."""
        self._closed = True

    def absence(self) -> WorkerError | None:
        """What to tell who needs the device while nobody serves it."""
        if not self._reason:
            return None
        return WorkerError(f"{self._id}: its vhost-user back end at {self._path} is away: {self._reason}")

    def row(self) -> dict[str, Any]:
        """Of `vmm.fleet`. Whose process it is, the socket does not tell."""
        state = "restarting" if self._reason else "running"
        return row(KIND, self._id, 0, state, self._restarts)

    def _lost(self, error: Exception | None) -> None:
        self._reason = _why(error)
        self._supervision.lost(KIND, self._id, 0, cause_of(error), f"{self._path}: {self._reason}")
        self._reactor.spawn(self._redial(), f"reconnect {self._id}")

    async def _redial(self) -> None:
        delay = 0.0
        while not self._closed:
            try:
                await self._frontend.replay(await dial(self._reactor, self._path, 0.0))
            except (FlotillaError, OSError) as error:  # whatever it was, it may be over the next time
                self._reason = describe(error)
                log.debug(f"{self._id}: {self._reason}")
                delay = min(max(2 * delay, FIRST_DELAY), LAST_DELAY)
                await sleep(self._reactor, delay)
                continue
            self._reason = ""
            self._restarts += 1
            self._supervision.restored(KIND, self._id, 0)
            return


def _why(error: Exception | None) -> str:
    return describe(error) if error else "it closed the connection"
