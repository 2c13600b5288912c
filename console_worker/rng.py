"""virtio-rng: one queue of buffers to fill. Source: virtio 1.2, section 5.4."""

from __future__ import annotations

import os

from console_worker.device import RingDevice
from shared.errors import HostError
from shared.reactor import Reactor
from shared.vhost_user import VIRTIO_F_VERSION_1
from shared.vring import SplitRing

REQUEST_LIMIT = 64 << 10  # of one buffer; the driver sees how much it got


class Rng(RingDevice):
    num_queues = 1
    features = VIRTIO_F_VERSION_1

    def __init__(self, reactor: Reactor, name: str, source: int) -> None:
        """`source`: a descriptor to read from, non-blocking."""
        super().__init__(reactor, name)
        self._source = source
        self._waiting = False
        self.bytes = 0

    def serve(self, index: int, ring: SplitRing) -> int:
        done = 0
        while done < ring.size and (chain := ring.pop()) is not None:
            try:
                data = os.read(self._source, min(chain.capacity, REQUEST_LIMIT))
            except BlockingIOError:
                self._wait()
                break
            ring.push(chain, ring.write(chain, data))
            self.bytes += len(data)
            done += 1
        return done

    def stop_queue(self, index: int) -> int:
        self._stop_waiting()
        return super().stop_queue(index)

    def _wait(self) -> None:
        """A source that has run dry, /dev/hwrng say: the buffer stays with the driver until there is more."""
        if not self._waiting:
            self._waiting = True
            self.reactor.add_reader(self._source, self._more)

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self.reactor.remove_reader(self._source)

    def _more(self) -> None:
        self._stop_waiting()
        self.process(0)


def open_source(path: str) -> int:
    """Raises HostError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"--rng src={path}: {error.strerror}") from error
