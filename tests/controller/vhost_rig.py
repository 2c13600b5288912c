"""A front end with guest memory, drivers and as many back ends as a test wants."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable

from controller.pci.virtio import Virtqueue
from controller.vhost_frontend import Frontend
from shared.memory import GuestMemory
from shared.reactor import Future, Reactor
from shared.vhost_backend import Server
from tests.echo_backend import FEATURES, Echo
from tests.virtqueue import Driver, queue_of

RAM = 4 << 20


class Rig:
    """A front end, guest memory and as many back ends, one after the other, as a test wants."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.memory = GuestMemory.create(RAM)
        self.frontend = Frontend(self.reactor, self.memory, "_disk0")
        self.lost: list[Exception | None] = []
        self.frontend.on_lost = self.lost.append
        self.drivers = [Driver(self.memory, 0x10000 + 0x10000 * n, n) for n in range(2)]
        self.servers: list[Server] = []
        self.echo = Echo(self.reactor)

    def queues(self) -> tuple[Virtqueue, ...]:
        return tuple(queue_of(driver) for driver in self.drivers)

    def back_end(self, echo: Echo | None = None) -> socket.socket:
        """A new back end; the front end's end of its socket."""
        self.echo = echo or Echo(self.reactor)
        ours, theirs = socket.socketpair()
        self.servers.append(Server(self.reactor, theirs, self.echo))
        return ours

    def run(self, *awaitables: Awaitable[object]) -> list[object]:
        return [self.reactor.run_until(awaitable, 10.0) for awaitable in awaitables]

    def up(self) -> None:
        self.run(self.frontend.connect(self.back_end()), self.frontend.activate(FEATURES, self.queues()))

    def kill(self) -> None:
        """The back end dies without a word."""
        self.servers.pop().close()

    def until(self, condition: Callable[[], bool]) -> None:
        done: Future[None] = Future()

        def check() -> None:
            if condition():
                done.set_result(None)
            else:
                self.reactor.call_later(0.001, check)

        check()
        self.reactor.run_until(done, 10.0)

    def echo_once(self, text: bytes, queue: int = 0) -> bytes:
        d = self.drivers[queue]
        _, (target,) = d.add([text], [len(text)])
        d.kick()
        self.until(lambda: d.used_index != d.used_idx())
        ((_, written),) = d.completed()
        return self.memory.read(target, written)

    def close(self) -> None:
        self.frontend.close()
        for server in self.servers:
            server.close()
        for d in self.drivers:
            d.close()
        self.memory.close()
        self.reactor.close()


def pages(log: int) -> set[int]:
    bits = int.from_bytes(os.pread(log, RAM // 4096 // 8, 0), "little")
    return {n for n in range(RAM // 4096) if bits >> n & 1}
