"""A vhost-user device for tests: it answers each request with the reverse of what the driver wrote."""

from __future__ import annotations

import os
from collections.abc import Callable

from shared.reactor import Reactor, drain_eventfd
from shared.vhost_backend import Mapping, Ring
from shared.vring import DirtyLog, MemoryMap, SplitRing

FEATURES = 1 << 32 | 1 << 0
CONFIG = bytes(range(16))


class Echo:
    """A `Backend`. `lazy` leaves requests in the ring until `work()`, as if the device were slow."""

    num_queues = 2
    features = FEATURES
    protocol_features = 0

    def __init__(self, reactor: Reactor, *, lazy: bool = False) -> None:
        self.reactor = reactor
        self.lazy = lazy
        self.rings: dict[int, SplitRing] = {}
        self.started: dict[int, Ring] = {}
        self.starts = 0
        self.memory = MemoryMap()
        self.mappings: tuple[Mapping, ...] = ()
        self.log: DirtyLog | None = None
        self.acked = 0
        self.config = bytearray(CONFIG)
        self.on_work: Callable[[int], None] = lambda _index: None

    def set_features(self, features: int) -> None:
        self.acked = features

    def set_memory(self, mappings: tuple[Mapping, ...]) -> None:
        self.mappings = mappings
        self.memory = MemoryMap(mappings)
        for ring in self.rings.values():
            ring.memory = self.memory

    def set_log(self, address: int, size: int) -> None:
        self.log = DirtyLog(address, size) if size else None
        for ring in self.rings.values():
            ring.log = self.log

    def start_queue(self, ring: Ring) -> None:
        self.starts += 1
        self.started[ring.index] = ring
        self.rings[ring.index] = SplitRing(ring, self.memory, self.log)
        try:
            self.reactor.add_reader(ring.kick_fd, lambda: self._kicked(ring))
            self._kicked(ring)
        except BaseException:
            self.stop_queue(ring.index)
            raise

    def stop_queue(self, index: int) -> int:
        self.reactor.remove_reader(self.started.pop(index).kick_fd)
        return self.rings.pop(index).next_avail

    def _kicked(self, ring: Ring) -> None:
        drain_eventfd(ring.kick_fd)
        if not self.lazy:
            self.work(ring.index)

    def work(self, index: int) -> None:
        ring = self.rings[index]
        while (chain := ring.pop()) is not None:
            ring.push(chain, ring.write(chain, ring.read(chain, 1 << 20)[::-1]))
            ring.notify()
        self.on_work(index)

    def get_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size])

    def set_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.config):
            raise OSError("beyond the configuration space")
        self.config[offset : offset + len(data)] = data


def drained(fd: int) -> int:
    """An eventfd's count, which is 0 afterwards."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
