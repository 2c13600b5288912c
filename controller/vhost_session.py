"""What a vhost-user front end remembers about one device, so that any back end can be told it anew."""

from __future__ import annotations

import os

from controller.vhost_link import Link
from shared import vhost_user as vu
from shared.linux import memfd
from shared.reactor import Future
from shared.records import Record, field
from shared.typed import Protocol
from shared.vhost_user import Message


class Queue(Protocol):
    """A virtqueue as the transport describes it; addresses are guest physical."""

    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def desc(self) -> int: ...
    @property
    def avail(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def kick_fd(self) -> int: ...
    @property
    def call_fd(self) -> int: ...


class Inflight(Record, frozen=False):
    """Which requests are popped and not completed. The file is written by the back end: it is never mapped here."""

    fd: int
    area: vu.InflightArea

    @classmethod
    def allocate(cls, num_queues: int, queue_size: int) -> Inflight:
        size = num_queues * vu.inflight_stride(queue_size)
        return cls(memfd("vhost-inflight", size), vu.InflightArea(size, 0, num_queues, queue_size))

    def close(self) -> None:
        os.close(self.fd)


class Session(Record, frozen=False):
    """What the back end is to do. `bases`: next avail index per queue while the rings are stopped."""

    features: int
    queues: tuple[Queue, ...]
    bases: dict[int, int]
    running: bool = True
    inflight: Inflight | None = None
    link: Link | None = None  # the connection that carries it out

    def close(self) -> None:
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None


class DirtyLog(Record, frozen=False):
    fd: int
    size: int


class Batch(Record, frozen=False):
    """Requests under way together."""

    futures: list[Future[Message]] = field(default_factory=list)

    def add(self, future: Future[Message]) -> None:
        self.futures.append(future)

    async def wait(self) -> list[Message]:
        return [await future for future in self.futures]
