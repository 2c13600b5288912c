"""The network card in this very process, with drivers on its queues: no vhost-user in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from net_worker.backend import NetBackend
from shared import virtio_net
from shared.reactor import Reactor
from shared.vhost_backend import Mapping, Ring
from tests.net_worker.driver import SLOT_BYTES, CtrlDriver, RxDriver, TxDriver
from tests.network import Network
from tests.ring_driver import GPA, Memory, memory_for

SPEC: dict[str, Any] = {
    "mac": "52:54:00:12:34:56", "mtu": 1500, "queue_pairs": 1, "queue_size": 16,
    "offload_tso": True, "offload_ufo": True, "offload_csum": True,
}  # fmt: skip
# What a guest of a VM of ours negotiates, without the two that the drivers here have an argument for.
PLAIN = virtio_net.features(SPEC) & ~virtio_net.F_EVENT_IDX


class Rig:
    """`rx[n]`, `tx[n]` and `ctrl` are the drivers. `features` are what the driver acknowledges."""

    def __init__(
        self,
        network: Network,
        *,
        pairs: int = 1,
        size: int = 16,
        event_idx: bool = True,
        indirect: bool = False,
        features: int = PLAIN,
        region: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.reactor = Reactor()
        self.network = network
        self.backend = NetBackend(self.reactor, SPEC | {"queue_pairs": pairs}, network.fds_for_a_worker())
        queues = 2 * pairs + 1
        self.memory = memory or memory_for(queues, size, slot_bytes=SLOT_BYTES)
        self.features = features | (virtio_net.F_EVENT_IDX if event_idx else 0)
        self.features |= virtio_net.F_INDIRECT_DESC if indirect else 0
        modern = features & (virtio_net.F_VERSION_1 | virtio_net.F_MRG_RXBUF)
        mergeable, header = bool(features & virtio_net.F_MRG_RXBUF), 12 if modern else 10
        common: dict[str, Any] = {"event_idx": event_idx, "indirect": indirect, "slot_bytes": SLOT_BYTES}
        self.rx = [
            RxDriver(self.memory, size, 2 * n, header=header, mergeable=mergeable, **common) for n in range(pairs)
        ]
        self.tx = [TxDriver(self.memory, size, 2 * n + 1, header=header, **common) for n in range(pairs)]
        self.ctrl = CtrlDriver(self.memory, size, queues - 1, **common)
        self.drivers = sorted([*self.rx, *self.tx, self.ctrl], key=lambda driver: driver.index)
        self.backend.set_features(self.features)
        self.backend.set_memory((Mapping(GPA, self.memory.size, GPA, self.memory.address),))
        self.region = Memory(4096) if region else None
        self.started: set[int] = set()  # whose threads exist

    def ring(self, index: int, base: int = 0) -> Ring:
        driver = self.drivers[index]
        host = self.memory.address - GPA
        return Ring(
            index=index, size=driver.size, desc=host + driver.desc, avail=host + driver.avail,
            used=host + driver.used, base=base, kick_fd=driver.kick_fd, call_fd=driver.call_fd, log_used=True,
            used_gpa=driver.used, inflight=self.region.address if self.region and index == 0 else 0,
            inflight_desc_num=driver.size if self.region and index == 0 else 0,
        )  # fmt: skip

    def start(self, *queues: int) -> Rig:
        for index in queues or range(len(self.drivers)):
            self.backend.start_queue(self.ring(index))
            if index < len(self.drivers) - 1:
                self.started.add(index)
        return self

    def command(self, kind: int, command: int, data: bytes = b"") -> int:
        """The ack byte."""
        ack = self.ctrl.put(kind, command, data)
        self.ctrl.kick()
        self.until(lambda: self.memory.read(ack, 1) != b"\xee")
        return self.memory.read(ack, 1)[0]

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Turn the reactor until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            self.reactor.call_soon(lambda: None)
            self.reactor._round()

    def settled(self) -> None:
        """Until every thread has taken a turn that began after this call."""
        for _ in range(2):
            before = {n: self.backend.counters(n).epoch for n in self.started}
            self.backend._native.net_nudge(self.backend._device)
            self.until(lambda seen=before: self._turned(seen))  # type: ignore[misc]

    def _turned(self, since: dict[int, int]) -> bool:
        return all(self.backend.counters(n).epoch > turn for n, turn in since.items())

    def close(self) -> None:
        self.backend.close()
        self.reactor.close()
        for driver in self.drivers:
            driver.close()
        self.memory.close()
        if self.region:
            self.region.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
