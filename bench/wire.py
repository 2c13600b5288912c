"""The host's end of a network bench: a TAP in a namespace of the bench's own, its counters, and a flood to the guest.

The flood is a closed loop: it never has more frames on their way than the TAP's queue holds, so none is dropped and the
guest's VMM alone sets the pace. UDP_SEGMENT makes one system call of many datagrams.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.errors import BenchError
from shared.linux import check, libc

NAME: Final = "bench0"
HOST, GUEST = "192.168.249.1", "192.168.249.2"
GUEST_MAC: Final = "52:54:00:00:00:01"
DISCARD: Final = 9
HEADERS: Final = 42  # Ethernet, IPv4 and UDP
CLONE_NEWNET: Final = 0x4000_0000
SOL_UDP, UDP_SEGMENT = 17, 103
SEGMENTS: Final = 64
LONGEST: Final = 65507  # of a datagram
ON_THEIR_WAY: Final = 500  # frames; the TAP's queue holds twice as many
PAUSE_SECONDS: Final = 0.00005


@contextmanager
def namespace() -> Iterator[None]:
    """This thread, and what it starts meanwhile, has a network of its own. Raises BenchError without the privilege."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            check(libc.unshare(CLONE_NEWNET), "a network namespace")
        except OSError as error:
            raise BenchError(f"{error.strerror}: bench net needs root for its network namespace") from error
        try:
            yield
        finally:
            check(libc.setns(before, CLONE_NEWNET), "the network namespace before")
    finally:
        os.close(before)


@dataclass(frozen=True, slots=True)
class Counters:
    """Of the TAP, in frames and bytes: what came from the guest, what its VMM took for it, what it could not take."""

    at: float
    from_guest: int
    from_guest_bytes: int
    to_guest: int
    to_guest_bytes: int
    dropped: int


class Wire:
    """The interface, with as many queues as there are streams. A context manager, inside namespace()."""

    def __init__(self, streams: int) -> None:
        several = ["multi_queue"] if streams > 1 else []
        ip("link", "set", "lo", "up")
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        ip("tuntap", "add", NAME, "mode", "tap", "vnet_hdr", *several)
        ip("address", "add", f"{HOST}/24", "dev", NAME)
        ip("neigh", "replace", GUEST, "lladdr", GUEST_MAC, "dev", NAME)
        ip("link", "set", NAME, "up", "txqueuelen", str(2 * ON_THEIR_WAY))
        self._file = os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC)
        # Without somebody at that port each datagram would be answered with an error. Nobody reads it: what the guest
        # sends is counted where it enters the host, and thrown away at a full socket.
        self._sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sink.bind(("", DISCARD))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.close()
        os.close(self._file)
        ip("link", "delete", NAME)

    def counters(self) -> Counters:
        text = os.pread(self._file, 4096, 0).decode()
        at = time.monotonic()
        values = [int(word) for word in text.partition(f"{NAME}:")[2].split("\n")[0].split()]
        return Counters(at, values[1], values[0], values[9], values[8], values[11])


class Flood:
    """Datagrams to the guest in frames of `size` bytes, by one socket per stream. A context manager."""

    def __init__(self, wire: Wire, size: int, streams: int) -> None:
        self._wire = wire
        payload = size - HEADERS
        self._segments = min(SEGMENTS, LONGEST // payload)
        self._data = bytes(payload * self._segments)
        self._sockets = ExitStack()
        self._streams = [self._open(payload) for _ in range(streams)]
        self._before = wire.counters()
        self.sent = 0
        self.looks = self.empty = 0  # how often the queue was looked at, and found empty: the VMM waited for us

    def _open(self, payload: int) -> socket.socket:
        sock = self._sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.setsockopt(SOL_UDP, UDP_SEGMENT, payload)
        sock.connect((GUEST, DISCARD))
        return sock

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets.close()

    def waiting(self, now: Counters) -> int:
        """Frames in the TAP's queue."""
        return self.sent - (now.to_guest - self._before.to_guest) - self.dropped(now)

    def dropped(self, now: Counters) -> int:
        return now.dropped - self._before.dropped

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        turn = 0
        while (now := self._wire.counters()).at < end:
            waiting = self.waiting(now)
            self.looks += 1
            self.empty += waiting <= 0
            room = (ON_THEIR_WAY - waiting) // self._segments
            if room <= 0:
                time.sleep(PAUSE_SECONDS)
            for _ in range(room):
                self._streams[turn % len(self._streams)].send(self._data)
                self.sent += self._segments
                turn += 1

    def drain(self, seconds: float) -> None:
        """Until the guest's VMM has taken all. Raises BenchError."""
        end = time.monotonic() + seconds
        while (left := self.waiting(now := self._wire.counters())) > 0:
            if now.at > end:
                raise BenchError(f"{left} of {self.sent} frames are still in the TAP's queue after {seconds:.0f} s")
            time.sleep(0.001)


def ip(*words: str) -> None:
    """iproute2. Raises BenchError."""
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError("ip is not in PATH; bash deploy/setup.sh installs iproute2") from None
    if done.returncode:
        raise BenchError(f"ip {' '.join(words)}: {done.stderr.strip()}")
