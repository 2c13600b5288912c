"""What the tests of one supervised worker share: its events, guest memory, a driver, and a disk for it to serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from controller.backends import Backend
from controller.fleet import Fleet, WorkerSpec
from controller.supervision import Supervision
from controller.vhost_frontend import Frontend
from shared.memory import GuestMemory
from shared.reactor import Reactor
from tests.controller.processes import Turned
from tests.virtqueue import Driver, queue_of

SECTOR = 512
VERSION_1, FLUSH = 1 << 32, 1 << 9


class Supervised(Turned):
    """One worker under supervision. `events`: (event, properties) in their order."""

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        super().__init__(reactor)
        self.fleet, self.folder = fleet, folder
        self.events: list[tuple[str, dict[str, Any]]] = []
        fleet.supervision = Supervision(lambda _, event, properties: self.events.append((event, properties or {})))
        self.memory = GuestMemory.create(1 << 20)
        self.driver = Driver(self.memory, 0x10000, 0, size=64)
        self.backend: Backend

    def serve_disk(self, content: bytes, features: int, **spec: Any) -> None:
        """Returns when the worker serves it and the guest's driver has its queue."""
        image = self.folder / "disk.raw"
        image.write_bytes(content)
        fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        spec = {"path": str(image), "num_queues": 1, "queue_size": 64, **spec}
        self.serve(WorkerSpec("blk", "_disk0", "blk_worker.__main__", "worker", spec), features, {"disk": fd})
        os.close(fd)

    def serve(self, made: WorkerSpec, features: int, fds: dict[str, int]) -> None:
        self.frontend = Frontend(self.reactor, self.memory, made.name)
        self.backend = Backend(self.reactor, self.fleet, made, {"vhost": self.frontend}, fds)
        self.run(self.backend.start())
        self.run(self.frontend.activate(features, (queue_of(self.driver),)))

    def close(self) -> None:
        self.run(self.backend.close())
        self.driver.close()
        self.memory.close()
