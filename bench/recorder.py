"""What guests say on their serial ports, with the time at which it arrived."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.errors import BenchError
from guest.lines import Bad, Error, Event, Stream


@dataclass(frozen=True, slots=True)
class Heard:
    """One event of one guest; `at` is CLOCK_MONOTONIC in seconds, of the read that brought its last byte."""

    at: float
    source: str
    event: Event


class Recorder:
    """A thread that reads descriptors and does nothing else, so that what it measures is not disturbed by parsing.

    A context manager; leaving it ends the thread. The descriptors stay the caller's.
    """

    def __init__(self) -> None:
        self.events: list[Heard] = []
        self._chunks: list[tuple[float, str, bytes]] = []
        self._parsed = 0
        self._streams: dict[str, Stream] = {}
        self._news = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ, "")
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._wake_write, b"e")
        self._thread.join()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def add(self, fd: int, source: str) -> None:
        """Start to read `fd`. epoll takes a new descriptor while another thread waits."""
        self._streams[source] = Stream()
        self._selector.register(fd, selectors.EVENT_READ, source)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if not key.data:
                    return
                data = os.read(key.fd, 65536)
                at = time.monotonic()
                if not data:
                    self._selector.unregister(key.fd)
                with self._news:
                    self._chunks.append((at, key.data, data))
                    self._news.notify_all()

    def _parse(self) -> None:
        """Chunks to events, in the waiting thread. An empty chunk is the end of its source."""
        while self._parsed < len(self._chunks):
            at, source, data = self._chunks[self._parsed]
            self._parsed += 1
            self.events += [Heard(at, source, event) for event in self._streams[source].feed(data)]

    def ended(self, source: str) -> bool:
        return any(name == source and not data for _, name, data in self._chunks)

    def until(self, wanted: Callable[[Heard], bool], seconds: float, what: str, since: int = 0) -> int:
        """Index of the first event from `since` on that is wanted. Raises BenchError, also for a guest's complaint."""
        end = time.monotonic() + seconds
        position = since
        with self._news:
            while True:
                self._parse()
                while position < len(self.events):
                    heard = self.events[position]
                    if isinstance(heard.event, Bad | Error):
                        raise BenchError(f"the guest says: {heard.event.text}")
                    if wanted(heard):
                        return position
                    position += 1
                left = end - time.monotonic()
                if left <= 0 or (self._chunks and all(map(self.ended, self._streams))):
                    raise BenchError(f"no {what} {f'within {seconds:.0f} s' if left <= 0 else 'before its end'}")
                self._news.wait(left)

    def beat(self, source: str, after: float, seconds: float, since: int = 0) -> int:
        """Wait for a heartbeat of `source` that arrived later than `after`."""
        return self.until(
            lambda heard: heard.source == source and heard.at > after and type(heard.event).__name__ == "Beat",
            seconds, f"heartbeat of {source}", since,
        )  # fmt: skip
