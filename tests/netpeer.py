"""The host's end of a network with the probe guest on it (`mode=net`, `mode=netload`): pings, echoes, datagrams."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time

from bench.flows import checksum
from guest.payload import Payload, decode, encode

ECHO, DISCARD = 7, 9
SO_RCVBUFFORCE = 33
ROOM = 32 << 20  # so that the host drops nothing of a burst
PATIENCE = 1.0  # for one answer; a datagram may be lost when a worker is killed


def ping(address: str, size: int = 56, seconds: float = 20.0) -> None:
    """An ICMP echo with an even number of bytes, again every second; AssertionError without an answer."""
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(PATIENCE)
        body, number, number_of_us = os.urandom(size), 0, os.getpid() & 0xFFFF
        while time.monotonic() < end:
            number += 1
            head = struct.pack(">BBHHH", 8, 0, 0, number_of_us, number)
            head = struct.pack(">BBHHH", 8, 0, checksum(head + body), number_of_us, number)
            try:
                sock.sendto(head + body, (address, 0))
                while True:
                    answer = sock.recv(65536)[20:]
                    if answer[:2] == b"\0\0" and answer[4:8] == head[4:8]:
                        assert answer[8:] == body and checksum(answer) == 0
                        return
            except TimeoutError:
                continue
            except OSError:  # there is no network yet
                select.select([], [], [], 0.02)
    raise AssertionError(f"{address} does not answer pings")


class Echo:
    """Datagrams to the guest's echo port, one at a time, each different and each verified."""

    def __init__(self, address: str, length: int = 1000, stream: int = 1) -> None:
        self._length = length
        self._stream = stream
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.settimeout(PATIENCE)
        self._sock.connect((address, ECHO))
        self.sent = self.answered = 0

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def once(self) -> bool:
        """Whether this one was answered, whole. A late answer to another one is passed over."""
        wanted = Payload(self._stream, self.sent)
        self.sent += 1
        try:
            self._sock.send(encode(wanted, self._length))
            while True:
                data = self._sock.recv(65536)
                assert len(data) == self._length
                if decode(data) == wanted:
                    self.answered += 1
                    return True
        except OSError:
            return False

    def until_answered(self, count: int, attempts: int = 30) -> None:
        """`count` answers, with at most so many lost."""
        lost = 0
        for _ in range(count):
            while not self.once():
                lost += 1
                assert lost < attempts, f"{lost} of {self.sent} datagrams were not answered"


class Sink:
    """Where `mode=netload` sends to: a UDP socket on a port; `echo` gives every datagram back."""

    def __init__(self, port: int) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.settimeout(20.0)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
        self._sock.bind(("", port))

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def take(self, *, echo: bool = False) -> tuple[Payload, int]:
        """The next datagram's payload, verified, and its length."""
        data, address = self._sock.recvfrom(65536)
        if echo:
            self._sock.sendto(data, address)
        return decode(data), len(data)


class Flow:
    """An Echo that never stops, beside the test; leaving it ends it and raises what went wrong in it."""

    def __init__(self, address: str, length: int = 1000) -> None:
        self._echo = Echo(address, length)
        self._wanted = threading.Condition()
        self._answered, self._stopping = 0, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)  # in the network namespace of whoever starts it

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
        self._echo.__exit__()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stopping:
                answered = self._echo.once()
                with self._wanted:
                    self._answered += answered
                    self._wanted.notify_all()
        except BaseException as error:
            self._error = error

    def goes_on(self, count: int = 20, seconds: float = 30.0) -> None:
        """`count` more datagrams are answered."""
        with self._wanted:
            target = self._answered + count
            assert self._wanted.wait_for(lambda: self._answered >= target, seconds), "the flow has stopped"
