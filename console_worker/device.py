"""What the console and the rng have in common: Python rings, served when they are kicked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

from shared import log
from shared.errors import GuestError, ProtocolError
from shared.reactor import Reactor, drain_eventfd
from shared.rehearsal import stand_still
from shared.vhost_backend import Mapping, Ring, Server
from shared.vring import DirtyLog, MemoryMap, SplitRing


class RingDevice(ABC):
    """A vhost-user `Backend` whose requests are finished within the call that finds them: nothing is ever in flight.

    A chain that breaks the rules costs its queue, until the driver resets the device; it is counted and logged.
    """

    num_queues: int
    features: int
    protocol_features = 0

    def __init__(self, reactor: Reactor, name: str) -> None:
        self.reactor = reactor
        self.name = name
        self.server: Server | None = None
        self.rings: dict[int, SplitRing] = {}
        self.negotiated = 0
        self.requests = 0
        self.errors = 0
        self.delay_ms = 0  # a rehearsed fault
        self._kicks: dict[int, int] = {}
        self._memory = MemoryMap()
        self._log: DirtyLog | None = None
        self._broken: set[int] = set()

    @abstractmethod
    def serve(self, index: int, ring: SplitRing) -> int:
        """Finish what is available, at most a ring's worth; the number of chains. Raises GuestError."""

    def set_features(self, features: int) -> None:
        self.negotiated = features

    def set_memory(self, mappings: tuple[Mapping, ...]) -> None:
        self._memory = MemoryMap(mappings)
        for ring in self.rings.values():
            ring.memory = self._memory

    def set_log(self, address: int, size: int) -> None:
        self._log = DirtyLog(address, size) if size else None
        for ring in self.rings.values():
            ring.log = self._log

    def start_queue(self, ring: Ring) -> None:
        self.reactor.add_reader(ring.kick_fd, partial(self._kicked, ring.index))
        self.rings[ring.index] = SplitRing(ring, self._memory, self._log)
        self._kicks[ring.index] = ring.kick_fd
        self._broken.discard(ring.index)
        self.process(ring.index)

    def stop_queue(self, index: int) -> int:
        kick_fd = self._kicks.pop(index, -1)
        if kick_fd >= 0:
            self.reactor.remove_reader(kick_fd)
        return self.rings.pop(index).next_avail

    def get_config(self, offset: int, size: int) -> bytes:
        return b""

    def set_config(self, offset: int, data: bytes) -> None:
        raise ProtocolError(f"{self.name}: nothing of its configuration is the driver's to write")

    def _kicked(self, index: int) -> None:
        if index in self._kicks:
            drain_eventfd(self._kicks[index])
            self.process(index)

    def process(self, index: int) -> None:
        """Serve a queue if it runs. Harmless at any time."""
        ring = self.rings.get(index)
        if ring is None or index in self._broken:
            return
        if self.delay_ms:
            stand_still(self.delay_ms)
        try:
            done = self.serve(index, ring)
        except GuestError as error:
            self._fail(index, error)
            return
        self.requests += done
        if done:
            ring.notify()
        if done >= ring.size:
            # A guest that refills as fast as we serve must not keep the other devices from running.
            self.reactor.call_soon(partial(self.process, index))

    def _fail(self, index: int, error: GuestError) -> None:
        self.errors += 1
        self._broken.add(index)
        self.reactor.remove_reader(self._kicks.pop(index))  # the driver may go on kicking
        if self.errors & self.errors - 1 == 0:  # the driver may reset and break it again, as often as it likes
            what = "the queue is dead until the driver resets the device"
            log.error(f"{self.name}: {error}; {what} ({self.errors} such errors in all)")
        if self.server is not None:
            self.server.queue_failed(index)
