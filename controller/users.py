"""`--worker-uid`: the user, and the group of the same number, of each process that may have one of its own.

With `base=` a name gets the next free number and keeps it, so that a restarted worker is the same user again.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from controller.config.worker_uid import USERS, WorkerUid
from shared.errors import ConfigError, WorkerError
from shared.typed import Final

# Name and number, as of linux/capability.h. KILL is for the controller, which ends what another user runs as.
NEEDED: Final = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}


class Users:
    """Without a wish every process stays the VMM's user."""

    def __init__(self, wish: WorkerUid | None = None) -> None:
        """Raises ConfigError for what this process can't do or its user namespace has not."""
        self._wish = wish
        self._numbers: dict[str, int] = {}
        if wish is not None:
            _check_capabilities(wish)
            for kind in ("uid", "gid"):
                _check_mapped(wish, kind)

    def of(self, name: str, living: AbstractSet[str]) -> int:
        """The user of this process, 0 for no change. `living`: names of the others. Raises WorkerError."""
        if self._wish is None:
            return 0
        if not self._wish.each:
            return self._wish.first
        if name not in self._numbers and len(self._numbers) == USERS:
            self._numbers = {each: number for each, number in self._numbers.items() if each in living}
        if name not in self._numbers:
            free = set(range(USERS)) - set(self._numbers.values())
            if not free:
                raise WorkerError(f"{name}: all {USERS} users of {self._wish.flag} are taken")
            self._numbers[name] = min(free)
        return self._wish.first + self._numbers[name]


def _check_capabilities(wish: WorkerUid) -> None:
    with open("/proc/self/status") as file:
        text = next(line for line in file if line.startswith("CapEff:"))
    effective = int(text.split()[1], 16)
    missing = [name for name, number in NEEDED.items() if not effective >> number & 1]
    if missing:
        raise ConfigError(f"{wish.flag}: this process lacks {', '.join(missing)}", "start it as root")


def _check_mapped(wish: WorkerUid, kind: str) -> None:
    """In a container not every number exists: user_namespaces(7)."""
    with open(f"/proc/self/{kind}_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    if not any(first <= wish.first and wish.last < first + count for first, _, count in ranges):
        raise ConfigError(
            f"{wish.flag}: not all of {kind} {wish.first} to {wish.last} are mapped in this user namespace",
            f"take numbers of /proc/self/{kind}_map",
        )
