"""A guest that has reset itself boots again, however long the host or somebody else's back end keeps it waiting.

    attempt ──────▶ it runs
      ▲    │ └────▶ a reason that does not pass: the caller's, as of any boot
      │    │ what may pass
      └─ waiting ──▶ over: shut down, deleted, or booted by request

Nobody asked for the reset who could ask again, so what may pass is waited for and shown. A request ends the wait.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine

from controller.events import EventMonitor
from shared import log
from shared.errors import FlotillaError, ProtocolError, Timeout, WorkerError
from shared.reactor import Cancelled, Reactor, Task, describe
from shared.typed import Any, Final

RETRY_SECONDS: Final = 1.0
# What a host lacks for a while; anything else that keeps a VM from booting is somebody's to put right.
SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)


class BootAgain:
    """`boot`: everything up to the guest's first instruction, or an error with nothing left behind."""

    def __init__(self, reactor: Reactor, events: EventMonitor, boot: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._reactor = reactor
        self._events = events
        self._boot = boot
        self._attempt: Task[None] | None = None
        self.reason = ""  # why the guest does not run yet

    async def attempt(self) -> None:
        """Boot. Afterwards the guest runs, or `reason` says what is waited for, or the wait was ended. Raises
        FlotillaError and OSError that do not pass."""
        self._attempt = self._reactor.spawn(self._boot(), "boot again")
        try:
            await self._attempt
            self._events.emit("vm", "rebooted")
        except Cancelled:
            self.reason = ""
        except (FlotillaError, OSError) as error:
            if not _may_pass(error):
                self.reason = ""
                raise
            self.waits_for(error)
        finally:
            self._attempt = None

    def waits_for(self, error: Exception) -> None:
        reason = describe(error)
        if reason != self.reason:
            log.error(f"the guest has reset itself and can't boot: {reason}; trying again until it can")
            self._events.emit("vm", "reset-waits", {"reason": reason})
        self.reason = reason

    def over(self) -> None:
        """It runs, or is not to run any more."""
        self.reason = ""

    def give_up(self) -> bool:
        """It is not to boot any more, which an attempt under way hears at once; False when nothing is waited for."""
        if self._attempt is not None:
            self._attempt.cancel()
            return True
        return bool(self.reason)

    async def abandon(self) -> None:
        """Nothing of an attempt is left behind."""
        if (attempt := self._attempt) is None:
            return
        attempt.cancel()
        try:
            await attempt
        except (FlotillaError, OSError, Cancelled) as error:
            log.debug(f"booting the guest that has reset itself: {describe(error)}")


def _may_pass(error: BaseException | None) -> bool:
    """Whether a boot that failed for it is worth another try. Only other people's back ends are talked to at boot."""
    while error is not None:
        if isinstance(error, (WorkerError, ProtocolError, Timeout)):
            return True
        if isinstance(error, OSError) and error.errno in SHORTAGES:
            return True
        error = error.__cause__
    return False
