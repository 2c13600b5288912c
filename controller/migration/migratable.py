"""What a VM must be able to do so that it can move. Times are milliseconds, states msgpack-able (bytes allowed)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from controller.migration.fixed_cost import FixedCost
from shared.pages import Bitmap

Parts = list[tuple[int, int, int, int]]  # (gpa, size, offset, slot)


class Migratable(Protocol):
    """One VM. At the source: config_json … build_info, pause, save, and resume if it comes back.

    At the destination: made by a Build, then load, start_loaded; destroy() if it does not come to that. Until
    start_loaded() a destination must neither write guest RAM nor touch a disk nor start a ring (the source may run the
    guest on at any moment, in the same RAM), and its destroy() must close descriptors only: F_UNLCK on a lock's
    description that the source sent would unlock the source.
    """

    def config_json(self) -> dict[str, Any]: ...

    def memory_parts(self) -> tuple[Parts, list[int]]:
        """The regions and one descriptor for each."""

    def disk_fds(self) -> dict[str, int]:
        """By disk id: the descriptions that hold the locks."""

    def tap_fds(self) -> dict[str, list[int]]:
        """By network device's id: the descriptors of its TAP, one per queue pair."""

    def build_info(self) -> dict[str, Any]: ...

    async def pause(self) -> Mapping[str, float]:
        """Stop the guest; per worker, how long it took. When it raises, the guest must be running again."""

    async def resume(self) -> None: ...

    async def save(self) -> dict[str, Any]: ...

    async def load(self, state: dict[str, Any]) -> Mapping[str, float] | None: ...

    async def start_loaded(self) -> Mapping[str, float] | None:
        """Rings, then vCPUs. The guest is ours for good: a worker that dies meanwhile is replaced as at any time."""

    async def destroy(self) -> None: ...


class DirtyPages(Protocol):
    """Which pages are written while they are copied (controller/dirty.py)."""

    async def start(self) -> None: ...

    def mark_all(self, into: Bitmap) -> None: ...

    def harvest(self, into: Bitmap) -> None: ...

    async def stop(self) -> None: ...

    def close(self) -> None: ...


class RemoteMigratable(Migratable, Protocol):
    """What moving to another host takes beside that. At the source all but the last two; at the destination those."""

    @property
    def fixed_cost(self) -> FixedCost:
        """What its pauses, saves, loads and starts have taken so far; it is told each of them."""

    @property
    def ended_itself(self) -> bool:
        """The guest has switched itself off or reset itself: there is nothing to move any more."""

    def machine_info(self) -> dict[str, Any]:
        """build_info(), and what the destination compares itself with before it takes a byte."""

    def dirty_pages(self) -> DirtyPages: ...

    async def flush_disks(self, seconds: float | None) -> None:
        """What the guest has written is on stable storage, for another host to read. None: however long that takes.
        Raises WorkerError that names the disk."""

    def unlock_disks(self) -> None:
        """The guest is paused and about to be committed: the destination takes the locks before it starts."""

    def lock_disks(self) -> None:
        """Raises HostError that names the disk and its holder. At the source after a rollback, at the destination
        before the start."""

    def drop_caches(self) -> None:
        """Forget what this host has cached of the disks: the source has written them."""


# config_json, parts, ram_fds, disk_fds, tap_fds, info. The descriptors belong to the callee from the call on, also if
# it raises.
Build = Callable[
    [dict[str, Any], Parts, list[int], dict[str, int], dict[str, list[int]], dict[str, Any]],
    Awaitable[RemoteMigratable],
]
# config_json, parts, info: RAM's descriptors, one per part, and disks that are open and not locked. Raises
# MigrationError and ConfigError that name what this host lacks.
Accept = Callable[[dict[str, Any], Parts, dict[str, Any]], tuple[list[int], dict[str, int]]]
