"""The block device in this very process, with drivers on its queues: no vhost-user in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blk_worker.backend import BlockBackend
from blk_worker.disk import open_disk
from shared.reactor import Reactor
from shared.vhost_backend import Mapping, Ring
from shared.virtio_blk import Feature
from tests.blk_worker.driver import GPA, Driver, Memory, memory_for


class Rig:
    """`drive[n]` is the driver of queue n. Queues are started by `start`."""

    def __init__(
        self,
        path: Path,
        *,
        queues: int = 1,
        size: int = 16,
        event_idx: bool = True,
        indirect: bool = False,
        inflight: bool = False,
        io_threads: int = 4,
        memory: Memory | None = None,
        trial: bool = False,
        **disk: Any,
    ) -> None:
        self.reactor = Reactor()
        sparse = disk.pop("sparse", True)
        self.backend = BlockBackend(
            self.reactor, open_disk(str(path), **disk), num_queues=queues, queue_size=size, sparse=sparse,
            io_threads=io_threads, trial=trial,
        )  # fmt: skip
        self.memory = memory or memory_for(queues, size)
        self.drive = [Driver(self.memory, size, n, event_idx, indirect) for n in range(queues)]
        self.size = size
        self.features = self.backend.features
        if not event_idx:
            self.features &= ~Feature.RING_EVENT_IDX
        if not indirect:
            self.features &= ~Feature.RING_INDIRECT_DESC
        self.backend.set_features(self.features)
        self.backend.set_memory((Mapping(GPA, self.memory.size, GPA, self.memory.address),))
        self.inflight = Memory(4096 * ((queues * self.stride() + 4095) // 4096)) if inflight else None

    def stride(self) -> int:
        return (16 + 16 * self.size + 63) & -64

    def ring(self, index: int, base: int) -> Ring:
        driver = self.drive[index]
        host = self.memory.address - GPA
        return Ring(
            index=index, size=self.size, desc=host + driver.desc, avail=host + driver.avail, used=host + driver.used,
            base=base, kick_fd=driver.kick_fd, call_fd=driver.call_fd, log_used=True, used_gpa=driver.used,
            inflight=self.inflight.address + index * self.stride() if self.inflight else 0,
            inflight_desc_num=self.size if self.inflight else 0,
        )  # fmt: skip

    def start(self, base: int = 0) -> Rig:
        for index in range(len(self.drive)):
            self.backend.start_queue(self.ring(index, base))
        return self

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Turn the reactor until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            self.reactor.call_soon(lambda: None)
            self.reactor._round()

    def close(self) -> None:
        self.backend.close()
        self.reactor.close()
        for driver in self.drive:
            driver.close()
        self.memory.close()
        if self.inflight:
            self.inflight.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        # A test that failed with requests hung would wait here for ever, and never say what failed.
        self.backend.fault("clear", 0)
        self.close()


def image(path: Path, sectors: int = 2048) -> Path:
    """A file in which every sector says its own number."""
    path.write_bytes(b"".join(sector_bytes(n) for n in range(sectors)))
    return path


def sector_bytes(number: int, stamp: int = 0) -> bytes:
    return (number.to_bytes(8, "little") + stamp.to_bytes(8, "little")) * 32
