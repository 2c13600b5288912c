"""Which fault makes sense for which kind of process: what `vmm.fault-inject` takes and `flotilla chaos` draws from."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    KILL = "kill"
    STOP = "stop"
    HANG = "hang"
    SLOW = "slow"
    ERROR = "error"
    CORRUPT = "corrupt-protocol"
    DROP = "drop-notification"
    DUPLICATE = "duplicate-notification"
    OUT_OF_MEMORY = "out-of-memory"


class Process(StrEnum):
    """Kinds of processes, as `vmm.fleet` calls them."""

    VCPU = "vcpu"
    BLK = "blk"
    NET = "net"
    CONSOLE = "console"
    API = "api"
    ZYGOTE = "zygote"
    JANITOR = "janitor"
    METRICS = "metrics"
    MIGRATION = "migration_agent"


ALL: Final = frozenset(Process)
DEVICES: Final = frozenset({Process.BLK, Process.NET, Process.CONSOLE})
RINGS: Final = frozenset({Process.BLK, Process.NET})

VICTIMS: Final[dict[Kind, frozenset[Process]]] = {
    Kind.KILL: ALL,
    Kind.STOP: ALL,
    Kind.HANG: DEVICES,
    Kind.SLOW: DEVICES,
    Kind.ERROR: frozenset({Process.BLK}),
    Kind.CORRUPT: DEVICES,
    Kind.DROP: RINGS,
    Kind.DUPLICATE: RINGS,
    Kind.OUT_OF_MEMORY: DEVICES,
}
