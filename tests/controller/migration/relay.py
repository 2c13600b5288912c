"""A relay between the two ends of a stream, as socat is, that cuts it at a message: a process of its own."""

from __future__ import annotations

import os
import select
import signal
import socket
from dataclasses import dataclass

from shared.handover import Message
from shared.linux import die_with_parent
from shared.wire import HEADER, HELLO

BUFFER = 1 << 16


@dataclass(frozen=True, slots=True)
class Cut:
    """At the first message of a type: `keep` of its bytes still pass (-1: all), then both connections are closed.

    `hold` stops forwarding instead and closes nothing. `number` 2 is the second one, and so on.
    """

    message: Message
    keep: int = 0
    hold: bool = False
    number: int = 1


class Watcher:
    """Finds the messages in one direction's bytes."""

    def __init__(self, cut: Cut | None) -> None:
        self._cut = cut
        self._seen = 0
        self._skip = HELLO.size  # bytes of a body (or the hello) to come
        self._head = b""
        self._keep = -1

    def pass_on(self, data: bytes) -> tuple[bytes, bool]:
        """What may pass of `data`, and whether the stream is to be cut behind it."""
        if self._cut is None:
            return data, False
        out, rest = [], data
        while rest and self._keep != 0:
            if self._keep > 0:
                piece, rest = rest[: self._keep], rest[self._keep :]
                self._keep -= len(piece)
            elif self._skip:
                piece, rest = rest[: self._skip], rest[self._skip :]
                self._skip -= len(piece)
            else:
                wanted = HEADER.size - len(self._head)
                self._head, rest = self._head + rest[:wanted], rest[wanted:]
                piece = self._header() if len(self._head) == HEADER.size else b""
            out.append(piece)
        return b"".join(out), self._keep == 0

    def _header(self) -> bytes:
        """What may pass of a header that is whole."""
        assert self._cut is not None
        head, self._head = self._head, b""
        kind, _, self._skip = HEADER.unpack(head)
        self._seen += kind == self._cut.message
        if kind != self._cut.message or self._seen != self._cut.number:
            return head
        whole = HEADER.size + self._skip
        keep = whole if self._cut.keep < 0 else min(self._cut.keep, whole)
        self._keep = max(0, keep - HEADER.size)
        return head[:keep]


class Relay:
    """Listens at one path and connects to another. `pid` can be killed; close() ends it."""

    def __init__(self, here: str, there: str, cut: Cut | None = None) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(here)
        self._listener.listen(1)
        self._path = here
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                die_with_parent(parent)
                _run(self._listener, there, cut)
            finally:
                os._exit(0)
        self._listener.close()

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.unlink(self._path)


def _run(listener: socket.socket, there: str, cut: Cut | None) -> None:
    source, _ = listener.accept()
    destination = socket.socket(socket.AF_UNIX)
    destination.connect(there)
    ways = {source: (destination, Watcher(cut)), destination: (source, Watcher(cut))}
    while True:
        ready, _, _ = select.select(list(ways), [], [])
        for sock in ready:
            target, watcher = ways[sock]
            data = sock.recv(BUFFER)
            allowed, over = watcher.pass_on(data)
            target.sendall(allowed)
            if over and cut is not None and cut.hold:
                signal.pause()
            if over or not data:
                return  # the process ends, and both connections with it
