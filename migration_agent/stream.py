"""One connection to the other agent: non-blocking both ways, frames in, bytes with descriptors out, pages both ways.

Messages go out in order; between two of a pump's frames those that wait go first, so that a heartbeat or a WITHDRAWN
does not wait for the end of a round.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable

from migration_agent.pages import Pump, Sink
from shared.errors import FlotillaError, MigrationError, ProtocolError
from shared.linux import close_fds, recv_fds, send_fds
from shared.reactor import Future, Reactor
from shared.wire import Decoder, Item, PageList

WRITE_BYTES = 1 << 18  # of one sendmsg
BURST = 64  # items per wake-up, so that a chatty peer does not starve the clock and the controller
PAGE_FRAMES = 8  # written per wake-up, for the same reason
MAX_QUEUE = 64 << 20


class Stream:
    """`on_item` gets each Hello, Frame and PageList; `on_end` once the reason why no more will come. Both from the
    reactor.

    `heard` is when the peer's last bytes came (time.monotonic). `sink` takes what a PageList announces.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        on_item: Callable[[Item], None],
        on_end: Callable[[FlotillaError], None],
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._on_item = on_item
        self._on_end = on_end
        self._decoder = Decoder()
        self._out: deque[tuple[memoryview, list[int], Future[None]]] = deque()
        self._queued = 0
        self._pump: Pump | None = None
        self._closed = False
        self._reading = True
        self._broken: MigrationError | None = None
        self.sink: Sink | None = None
        self.heard = time.monotonic()
        sock.setblocking(False)
        reactor.add_reader(sock.fileno(), self._read)

    @property
    def congested(self) -> bool:
        """A message waits for the peer to read. Pages may wait as well: a message goes before the next frame."""
        return bool(self._out)

    def send(self, data: bytes, fds: list[int] | None = None) -> Future[None]:
        """Queue bytes; the future is done when the kernel has all of them. The descriptors are closed after that."""
        sent: Future[None] = Future()
        if self._closed or self._queued + len(data) > MAX_QUEUE:
            close_fds(fds or [])
            sent.set_exception(MigrationError("the connection to the peer is closed or does not move"))
            return sent
        self._out.append((memoryview(data), fds or [], sent))
        self._queued += len(data)
        if len(self._out) == 1 and self._pump is None:
            self._write()
        return sent

    def pump(self, pump: Pump) -> Future[None]:
        """Send a round of pages; the future is done when the kernel has all of them."""
        done = pump.start()
        if self._closed:
            pump.fail(MigrationError("the connection to the peer is closed"))
        if not done.done():
            self._pump = pump
            self._write()
        return done

    def _write(self) -> None:
        """Everything that the kernel takes: a frame of pages that has begun, messages, the next frame."""
        budget = PAGE_FRAMES
        try:
            while True:
                if self._pump is not None and self._pump.mid_frame:
                    self._pump.write(self._sock.fileno())
                elif self._out:
                    self._write_message()
                elif self._pump is None:
                    break
                elif not budget:
                    self._reactor.add_writer(self._sock.fileno(), self._write)
                    return
                elif self._pump.next():
                    budget -= 1
                else:
                    self._pump = None
        except BlockingIOError:
            self._reactor.add_writer(self._sock.fileno(), self._write)
            return
        except OSError as error:
            broken = MigrationError(f"the connection to the peer broke: {error.strerror}")
            if self._reading and isinstance(error, ConnectionError):
                # What the peer said before it hung up (a reason, perhaps) may still be unread, and is to be known
                # before anything fails: the reader, which comes to the stream's end, fails what waits.
                self._broken = broken
            else:
                self._drop_output(broken)
        self._reactor.remove_writer(self._sock.fileno())

    def _write_message(self) -> None:
        data, fds, sent = self._out[0]
        count = send_fds(self._sock, data[:WRITE_BYTES].tobytes(), fds)
        close_fds(fds)  # they went with the first byte
        self._queued -= count
        if count < len(data):
            self._out[0] = (data[count:], [], sent)
        else:
            self._out.popleft()
            sent.set_result(None)

    def _read(self) -> None:
        try:
            for _ in range(BURST):
                if self._closed or not self._read_some():
                    return
        except BlockingIOError:
            return
        except ConnectionError as error:
            self._end(MigrationError(f"the connection to the peer broke: {error.strerror}"))
        except FlotillaError as error:
            self._end(error)
        except OSError as error:
            self._end(ProtocolError(str(error)))

    def _read_some(self) -> bool:
        """One system call's worth. False at the end."""
        if self.sink is not None and self.sink.left:
            if not self.sink.read(self._sock.fileno()):
                self._end(MigrationError("the peer closed the connection in the middle of a message"))
                return False
            self.heard = time.monotonic()
            return True
        data, fds = recv_fds(self._sock, self._decoder.wants)
        if not data:
            self._end(self._end_of_stream())
            return False
        item = self._decoder.feed(data, fds)
        if item is not None:
            self.heard = time.monotonic()
            self._on_item(item)
            if isinstance(item, PageList) and not self._closed:
                if self.sink is None:
                    raise ProtocolError("PAGES from the peer, and there is no RAM yet")
                self.sink.begin(item)
        return not self._closed and self._reading

    def _end_of_stream(self) -> FlotillaError:
        if self._decoder.idle:
            return MigrationError("the peer closed the connection")
        return MigrationError("the peer closed the connection in the middle of a message")

    def _end(self, error: FlotillaError) -> None:
        if not self._closed:
            self._reading = False
            self._reactor.remove_reader(self._sock.fileno())
            self._on_end(error)
            self._drop_broken()

    def _drop_broken(self) -> None:
        """Fail what could not be written, now that nothing more is read."""
        if self._broken is not None:
            self._drop_output(self._broken)

    def _drop_output(self, error: FlotillaError) -> None:
        out, self._out = self._out, deque()
        self._queued = 0
        for _, fds, sent in out:
            close_fds(fds)
            sent.set_exception(error)
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.fail(error)

    def stop_reading(self) -> None:
        """What the peer says from now on is somebody else's."""
        self._reading = False
        self._reactor.remove_reader(self._sock.fileno())
        self._drop_broken()

    def detach(self) -> tuple[socket.socket, bytes]:
        """The socket, which is the caller's from now on, and what was read of a frame that is not whole. Nothing may be
        under way to the peer."""
        assert not self._out and self._pump is None, "detach() with output"
        self.stop_reading()
        self._reactor.remove_writer(self._sock.fileno())
        self._closed = True
        return self._sock, self._decoder.residue()

    def close(self) -> None:
        """Idempotent. What the kernel has already still reaches the peer."""
        if self._closed:
            return
        self._closed = True
        self._reactor.remove_reader(self._sock.fileno())
        self._reactor.remove_writer(self._sock.fileno())
        self._drop_output(self._broken or MigrationError("the connection to the peer was closed"))
        self._decoder.close()
        self._sock.close()
