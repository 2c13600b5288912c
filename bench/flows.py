"""What goes on between a host and a guest while the guest moves: pings, and a flow that must lose nothing.

The probe guest has no TCP. Its flow is UDP with numbers: one datagram at a time, sent again until its echo has come, as
a TCP sender would; a number that is not answered within FLOW_SECONDS is a lost connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from bench.errors import BenchError
from guest.payload import Payload, decode, encode

PING_SECONDS: Final = 0.005
AGAIN_SECONDS: Final = 0.03
FLOW_SECONDS: Final = 30.0
ECHO: Final = 7
ECHO_REPLY, ECHO_REQUEST = 0, 8
ICMP_BYTES: Final = 16  # the header, and the number that we put behind it
PING_BYTES: Final = 48
FLOW_BYTES: Final = 1000


def checksum(data: bytes) -> int:
    """Of an even number of bytes, as in every header of the Internet. Source: RFC 1071."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@dataclass(frozen=True, slots=True)
class Silence:
    """Of one kind of traffic. `gap_ms`: the longest time between two answers that followed each other."""

    sent: int
    answered: int
    gap_ms: float

    @property
    def lost(self) -> int:
        return self.sent - self.answered


class Traffic(ABC):
    """A thread that asks and listens until it is told to end. A context manager; the socket is of where it is made."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sent, self._since = 0, 0
        self._answers: dict[int, float] = {}  # when, by the number of what was sent
        self._stopping = False
        self._error: BaseException | None = None
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
        self._sock.close()

    def _run(self) -> None:
        try:
            self._talk()
        except BaseException as error:
            self._error = error
            with self._news:
                self._news.notify_all()

    @abstractmethod
    def _talk(self) -> None: ...

    def _answered(self, number: int) -> None:
        with self._news:
            self._answers.setdefault(number, time.monotonic())
            self._news.notify_all()

    def _ready(self, until: float) -> bool:
        return bool(select.select([self._sock], [], [], max(0.0, until - time.monotonic()))[0])

    def _received(self) -> bytes:
        """One datagram; nothing in place of an error that the network reports."""
        try:
            return self._sock.recv(65536)
        except OSError:
            return b""

    def goes_on(self, count: int, seconds: float) -> None:
        """`count` more answers come. Raises BenchError."""
        with self._news:
            target = len(self._answers) + count
            came = self._news.wait_for(lambda: self._error is not None or len(self._answers) >= target, seconds)
        if self._error is not None or not came:
            raise BenchError(f"{type(self).__name__}: {self._error or f'no answer within {seconds:.0f} s'}")

    def count_from_now(self) -> None:
        """What was sent before is forgotten: the guest may not have been there yet."""
        self._since = self._sent

    def gap_ms(self, begin: float, end: float) -> float | None:
        """The longest time between two answers, the first before `end` and the second after `begin` (CLOCK_MONOTONIC).
        None: fewer than two."""
        times = sorted(self._answers.copy().values())
        return max(((b - a) * 1e3 for a, b in pairwise(times) if b >= begin and a <= end), default=None)

    def silence(self) -> Silence:
        """Once it has ended."""
        times = sorted(at for number, at in self._answers.items() if number >= self._since)
        gap = max((b - a for a, b in pairwise(times)), default=0.0)
        return Silence(self._sent - self._since, len(times), gap * 1e3)


class Pings(Traffic):
    """ICMP echo requests, one every PING_SECONDS whatever comes back."""

    def __init__(self, address: str) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        sock.connect((address, 0))
        super().__init__(sock)
        self._body = os.urandom(PING_BYTES)
        self._identity = os.getpid() & 0xFFFF

    def _talk(self) -> None:
        due = time.monotonic()
        while not self._stopping:
            with contextlib.suppress(OSError):  # nobody answers ARP just now: it is lost
                self._sock.send(self._request(self._sent))
            self._sent += 1
            due += PING_SECONDS
            self._listen(due)
        self._listen(time.monotonic() + 1.0)

    def _listen(self, until: float) -> None:
        """Answers; at the end, no longer than there are some to come."""
        while (not self._stopping or self._sent - 1 not in self._answers) and self._ready(until):
            data = self._received()[20:]
            if len(data) < ICMP_BYTES:
                continue
            kind, _, _, identity, _ = struct.unpack_from(">BBHHH", data)
            if (kind, identity) == (ECHO_REPLY, self._identity) and data[16:] == self._body:
                self._answered(int.from_bytes(data[8:16], "big"))

    def _request(self, number: int) -> bytes:
        def packed(checksum: int) -> bytes:
            head = struct.pack(">BBHHHQ", ECHO_REQUEST, 0, checksum, self._identity, number & 0xFFFF, number)
            return head + self._body

        return packed(checksum(packed(0)))


class Flow(Traffic):
    """Numbered datagrams, each sent until the guest has given it back whole. `sent` counts those sent again, too."""

    def __init__(self, address: str) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((address, ECHO))
        super().__init__(sock)

    def _talk(self) -> None:
        number = 0
        while not self._stopping:
            self._until_answered(Payload(1, number))
            number += 1

    def _until_answered(self, wanted: Payload) -> None:
        data, end = encode(wanted, FLOW_BYTES), time.monotonic() + FLOW_SECONDS
        while (now := time.monotonic()) < end:
            try:
                self._sock.send(data)
            except OSError:  # as in Pings
                select.select([], [], [], AGAIN_SECONDS)
                continue
            self._sent += 1
            while self._ready(now + AGAIN_SECONDS):
                if (received := self._received()) and decode(received) == wanted:
                    self._answered(self._sent - 1)
                    return
        raise BenchError(f"connection lost: number {wanted.number} was not answered within {FLOW_SECONDS:.0f} s")
