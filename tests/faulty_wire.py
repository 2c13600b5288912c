"""Two hosts whose wire loses, delays, reorders and limits frames, and may be pulled: for kernels without netem.

The ends of the wire are TAPs; a thread of the test carries the frames between them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import random
import select
import threading
import time
from dataclasses import dataclass

from bench.hosts import Hosts
from bench.wire import ip
from net_worker.tap import open_tap

QUEUE_SECONDS = 0.2  # what a limited wire holds; the rest is dropped
FRAME = 2000


@dataclass(frozen=True, slots=True)
class Faults:
    """Seconds, bytes a second. The cable is pulled for so long once so many bytes have passed to the destination."""

    loss: float = 0.0
    delay: float = 0.0
    jitter: float = 0.0
    rate: float = math.inf
    pulled_after: float = math.inf
    pulled_for: float = 0.0

    @classmethod
    def at_random(cls, choice: random.Random) -> Faults:
        delay = choice.choice([0.0, choice.uniform(0, 0.02)])
        pulled_for = choice.choice([0.0, choice.uniform(0.1, 3), choice.uniform(0.1, 3), math.inf])
        return cls(
            loss=choice.choice([0.0, choice.uniform(0, 0.03)]),
            delay=delay,
            jitter=choice.choice([0.0, delay / 2]),
            rate=choice.choice([math.inf, choice.uniform(1e6, 20e6)]),
            # The guest has about 5 MB to be moved: from the hello to a little after the end.
            pulled_after=choice.uniform(0, 6e6) if pulled_for else math.inf,
            pulled_for=pulled_for,
        )


class Carrier(threading.Thread):
    """`ends` are TAPs, the source's first; they stay the caller's. Perfect until begin()."""

    def __init__(self, ends: tuple[int, int], faults: Faults, seed: int) -> None:
        super().__init__(name="carrier", daemon=True)
        self._ends, self._wanted, self._choice = ends, faults, random.Random(seed)
        self._faults = Faults()
        self._later: list[tuple[float, int, int, bytes]] = []  # due, order, to whom, frame
        self._order = itertools.count()
        self._free = dict.fromkeys(ends, 0.0)  # when the wire to it has sent what it holds
        self._pulled_until = 0.0
        self._passed = self.lost = self.carried = self.pulls = 0
        self._stop_read, self._stop_write = os.pipe()

    def begin(self) -> None:
        self._passed, self._faults = 0, self._wanted

    def stop(self) -> None:
        os.write(self._stop_write, b"s")
        self.join()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def run(self) -> None:
        one, two = self._ends
        other = {one: two, two: one}
        while True:
            wait = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
            ready, _, _ = select.select([one, two, self._stop_read], [], [], wait)
            if self._stop_read in ready:
                return
            now = time.monotonic()
            for end in ready:
                self._take(now, os.read(end, FRAME), other[end])
            while self._later and self._later[0][0] <= now:
                _, _, to, frame = heapq.heappop(self._later)
                self._give(to, frame)

    def _take(self, now: float, frame: bytes, to: int) -> None:
        faults = self._faults
        if to == self._ends[1]:
            self._passed += len(frame)
            if self._passed > faults.pulled_after and not self.pulls:
                self.pulls, self._pulled_until = 1, now + faults.pulled_for
        self._free[to] = max(self._free[to], now)
        full = self._free[to] - now > QUEUE_SECONDS
        if now < self._pulled_until or full or self._choice.random() < faults.loss:
            self.lost += 1
            return
        self.carried += 1
        self._free[to] += len(frame) / faults.rate
        due = self._free[to] + faults.delay + self._choice.uniform(0, faults.jitter)
        if due <= now:
            self._give(to, frame)
        else:
            heapq.heappush(self._later, (due, next(self._order), to, frame))

    def _give(self, to: int, frame: bytes) -> None:
        try:
            os.write(to, frame)
        except OSError:  # its queue is full, or it is down
            self.lost += 1


class FaultyHosts(Hosts):
    """The wire is faultless until begin()."""

    def __init__(self, faults: Faults, seed: int) -> None:
        self._choices = (faults, seed)
        self._carrier: Carrier | None = None
        self._ends: list[int] = []
        super().__init__()

    def _wire(self) -> None:
        for host in self.names:
            with self.inside(host):
                self._ends += open_tap("wire", 1)
                ip("link", "set", "wire", "up")
        one, two = self._ends
        self._carrier = Carrier((one, two), *self._choices)
        self._carrier.start()

    def begin(self) -> None:
        assert self._carrier
        self._carrier.begin()

    @property
    def lost(self) -> int:
        """Frames."""
        assert self._carrier
        return self._carrier.lost

    def said(self) -> str:
        assert self._carrier
        return f"{self._carrier.carried} frames carried, {self._carrier.lost} lost, {self._carrier.pulls} pulls"

    def close(self) -> None:
        if self._carrier:
            self._carrier.stop()
        for end in self._ends:
            os.close(end)
        self._ends = []
        super().close()
