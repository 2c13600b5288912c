"""Guest RAM through the stream: a Pump at the source, a Sink at the destination. Neither looks into a page.

A pump owns a read-only mapping of RAM and the bitmap of what is to be sent. The bitmap is the controller's, too: it
sets bits between two rounds, the pump clears what it takes. A frame that has begun is always finished, so a pump that
is halted leaves the bits of what it did not send.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from shared.errors import FlotillaError
from shared.handover import Message
from shared.pages import PAGE_SIZE, Bitmap, Frame, Regions
from shared.reactor import Future
from shared.wire import HEADER, PageList


@dataclass(slots=True)
class Moved:
    """What has been moved. `bytes` counts the stream's, heads included."""

    pages: int = 0
    zeros: int = 0
    bytes: int = 0

    def wire(self) -> dict[str, int]:
        return {"pages": self.pages, "zeros": self.zeros, "bytes": self.bytes}


class Pump:
    """One round after the other; `moved` is of the present or last one."""

    def __init__(self, regions: Regions, bitmap: Bitmap) -> None:
        self._regions = regions
        self._bitmap = bitmap
        self._frame = Frame(regions)
        self._halted: FlotillaError | None = None
        self._more = False
        self.done: Future[None] = Future()
        self.moved = Moved()
        self.began = 0.0

    @property
    def mid_frame(self) -> bool:
        return self._frame.left > 0

    def start(self) -> Future[None]:
        """Begin a round; done when the kernel has its last page."""
        self._frame.rewind()
        self._more = True
        self.moved = Moved()
        self.began = time.monotonic()
        self.done = Future()
        if self._halted is not None:
            self.done.set_exception(self._halted)
        return self.done

    def halt(self, error: FlotillaError) -> None:
        """End the round, and every later one, after the frame that is under way."""
        self._halted = self._halted or error
        if not self.mid_frame:
            self.done.set_exception(error)

    def next(self) -> bool:
        """Make the next frame. False when the round is over."""
        while self._halted is None and self._more:
            self._more = self._frame.collect(self._bitmap)
            self.moved.pages += self._frame.pages
            self.moved.zeros += self._frame.zeros
            if self._frame.pages or self._frame.zeros:
                self._frame.seal(HEADER, Message.PAGES, 0)
                return True
        if self._halted is not None:
            self.done.set_exception(self._halted)
        else:
            self.done.set_result(None)
        return False

    def write(self, fd: int) -> None:
        """Let the kernel take what it will of the frame. Raises BlockingIOError, OSError."""
        self.moved.bytes += self._frame.write(fd)

    def fail(self, error: FlotillaError) -> None:
        """The stream is gone."""
        self._halted = error
        self.done.set_exception(error)

    def close(self) -> None:
        self._regions.close()
        self._bitmap.close()


class Sink:
    """Takes PAGES frames apart, into RAM."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._frame = Frame(regions)
        self.moved = Moved()

    @property
    def left(self) -> int:
        """Bytes of the present frame that are to be read by read()."""
        return self._frame.left

    def begin(self, item: PageList) -> None:
        """Raises ProtocolError for a list that is not of this guest's RAM, before anything is written."""
        self._frame.parse(item.counts, item.runs, item.length)
        self._frame.clear_zeros()
        self.moved.pages += self._frame.pages
        self.moved.zeros += self._frame.zeros
        self.moved.bytes += HEADER.size + item.length - self._frame.pages * PAGE_SIZE

    def read(self, fd: int) -> int:
        """Bytes read, 0 at the end of the stream. Raises BlockingIOError, OSError."""
        count = self._frame.read(fd)
        self.moved.bytes += count
        return count

    def close(self) -> None:
        self._regions.close()
