"""A virtio-net driver, for tests of the network worker; it checks that every head comes back once, in order."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tests.ring_driver import WRITE, RingDriver

SLOT_BYTES = 80 << 10  # room for the longest packet
DATA_AT = 4096
HEADER_BYTES = 12


class Packet(NamedTuple):
    header: bytes
    frame: bytes
    buffers: int  # chains that it took


@dataclass(slots=True)
class RxDriver(RingDriver):
    """Buffers for packets to the guest. `buffers` of a post are sizes of the descriptors of one chain."""

    header: int = HEADER_BYTES
    mergeable: bool = False
    posted: deque[tuple[int, int]] = field(default_factory=deque)  # (head, bytes), oldest first
    free: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.free.extend(range(0, self.size, 1 if self.indirect else 4))

    def post(self, *buffers: int, times: int = 1) -> None:
        for _ in range(times):
            head = self.free.popleft()
            at, chain = self.slot(head) + DATA_AT, []
            for size in buffers:
                chain.append((at, size, WRITE))
                at += size
            self.chain(head, chain)
            self.posted.append((head, sum(buffers)))
            self.offer(head)

    def post_all(self, *buffers: int) -> None:
        self.post(*buffers, times=len(self.free))

    def packets(self) -> list[Packet]:
        """What has come since the last call. Its chains are free again."""
        done = []
        used = deque(self.completed())
        while used:
            parts = [self._take(*used.popleft())]
            header = parts[0][: self.header]
            count = struct.unpack_from("<H", header, 10)[0] if self.header == HEADER_BYTES else 1
            assert 1 <= count <= (len(used) + 1 if self.mergeable else 1), f"num_buffers {count}"
            parts += [self._take(*used.popleft()) for _ in range(count - 1)]
            done.append(Packet(header, b"".join(parts)[self.header :], count))
        return done

    def _take(self, head: int, written: int) -> bytes:
        assert self.posted, f"head {head} returned, none was posted"
        expected, size = self.posted.popleft()
        assert head == expected, f"head {head} returned before {expected}"
        assert 0 < written <= size
        self.free.append(head)
        return self.memory.read(self.slot(head) + DATA_AT, written)

    def wait(self, count: int = 1, seconds: float = 20.0) -> list[Packet]:
        """At least `count` packets, by interrupts alone."""
        done: list[Packet] = []

        def enough() -> bool:
            if len(done) < count:
                done.extend(self.packets())
            return len(done) >= count

        self.wait_for(enough, f"{count} packets", seconds)
        return done


@dataclass(slots=True)
class TxDriver(RingDriver):
    """Packets from the guest."""

    header: int = HEADER_BYTES
    pending: deque[int] = field(default_factory=deque)
    free: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.free.extend(range(0, self.size, 1 if self.indirect else 4))

    def put(self, frame: bytes, header: bytes = b"", cuts: Sequence[int] = ()) -> int:
        """Offer one packet, cut at the given offsets of header and frame together (indirect, if more than three)."""
        head = self.free.popleft()
        data = header.ljust(self.header, b"\0") + frame
        at = self.slot(head) + DATA_AT
        self.memory.write(at, data)
        edges = [0, *cuts, len(data)]
        self.chain(head, [(at + a, b - a, 0) for a, b in pairwise(edges)])
        self.pending.append(head)
        self.offer(head)
        return head

    def reap(self) -> int:
        """How many have been sent since the last call."""
        done = self.completed()
        for head, written in done:
            assert self.pending and head == self.pending.popleft(), f"head {head} returned out of order"
            assert written == 0
            self.free.append(head)
        return len(done)

    def send(self, *frames: bytes, header: bytes = b"") -> None:
        """From offer to completion."""
        for frame in frames:
            self.put(frame, header)
        self.kick()
        self.drain()

    def drain(self, seconds: float = 20.0) -> None:
        def empty() -> bool:
            self.reap()
            return not self.pending

        self.wait_for(empty, f"{len(self.pending)} packets sent", seconds)


@dataclass(slots=True)
class CtrlDriver(RingDriver):
    """Commands: `put` returns the address of the ack byte."""

    next_head: int = 0

    def put(self, kind: int, command: int, data: bytes = b"") -> int:
        head = self.next_head
        self.next_head = (head + 4) % self.size
        at = self.slot(head) + DATA_AT
        self.memory.write(at, bytes((kind, command)) + data)
        ack = at + 2048
        self.memory.write(ack, b"\xee")
        buffers = [(at, 2, 0), *([(at + 2, len(data), 0)] if data else []), (ack, 1, WRITE)]
        self.chain(head, buffers)
        self.offer(head)
        return ack
