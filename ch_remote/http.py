"""A minimal HTTP/1.1 client over a unix socket: one request per connection, no timeout, interruptible.

The server may answer with Content-Length, chunked, or by closing; it may keep the connection alive. Sizes are bounded,
since the peer is whoever listens on a path that somebody typed.
"""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import NamedTuple

from shared.errors import FlotillaError, HostError, ProtocolError

MAX_HEAD = 64 << 10
MAX_BODY = 64 << 20
_CHUNK = 64 << 10


class Response(NamedTuple):
    status: int
    body: bytes


class ServerGone(FlotillaError):
    """The connection ended before the answer was complete."""


class Interrupts:
    """While open, SIGINT does not raise but makes `fileno` readable, so that no byte of an answer gets lost.

    A SIGINT that is ignored stays so: shells start background jobs of scripts that way.
    """

    def __enter__(self) -> Interrupts:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._handler = signal.getsignal(signal.SIGINT)
        if self._handler is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._note)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_fd)
        signal.signal(signal.SIGINT, self._handler)
        self._reader.close()
        self._writer.close()

    @staticmethod
    def _note(number: int, frame: FrameType | None) -> None:
        """A handler must exist for the wakeup fd to be written."""

    def fileno(self) -> int:
        return self._reader.fileno()

    def take(self) -> bool:
        """Was there a SIGINT since the last call? Other signals wake us too and don't count."""
        try:
            return signal.SIGINT in self._reader.recv(4096)
        except BlockingIOError:
            return False


class Connection:
    """A connection to the API socket at `path`. Raises HostError when nobody can be reached there.

    `tick`: seconds, and what to call that often while an answer is waited for.
    """

    def __init__(
        self, path: str, interrupts: Interrupts | None = None, on_interrupt: Callable[[], None] | None = None
    ) -> None:
        self._interrupts = interrupts
        self.tick: tuple[float, Callable[[], None]] | None = None
        self._on_interrupt = on_interrupt
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            # The second kind is CPython's own check of the path's length: it has no strerror.
            hint = "is a VMM running with this --api-socket?" if error.strerror else ""
            raise HostError(f"{path}: {error.strerror or error}", hint) from error

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def request(self, method: str, target: str, body: bytes | None = None, fds: Sequence[int] = ()) -> Response:
        """Send one request, descriptors with it, and wait for its answer, for ever if need be.

        Raises ServerGone when the server ends first, ProtocolError when its answer is not HTTP.
        """
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            data = head.encode("ascii") + b"\r\n" + (body or b"")
            sent = socket.send_fds(self._socket, [data], fds) if fds else 0
            self._socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            pass  # a server that refuses a body answers before it has read all of it: the answer still counts
        return self._response()

    def _response(self) -> Response:
        while True:
            status, headers = self._head()
            if status >= 200:
                return Response(status, self._body(status, headers))

    def _head(self) -> tuple[int, dict[str, str]]:
        text = self._until(b"\r\n\r\n", MAX_HEAD).decode("latin-1")
        line, *fields = text.split("\r\n")
        version, _, rest = line.partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit() and len(code) == 3):
            raise ProtocolError(f"The answer is not HTTP: {line[:80]!r}", "is this the API socket of a VMM?")
        headers = {}
        for field in fields:
            name, _, value = field.partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(code), headers

    def _body(self, status: int, headers: dict[str, str]) -> bytes:
        if status in (204, 304):
            return b""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._chunked()
        if "content-length" in headers:
            return self._exactly(_size(headers["content-length"], 10))
        while self._fill():
            _bounded(len(self._buffer))
        return bytes(self._buffer)

    def _chunked(self) -> bytes:
        body = bytearray()
        while True:
            size = _size(self._until(b"\r\n", MAX_HEAD).decode("latin-1").partition(";")[0], 16)
            if size == 0:
                while self._until(b"\r\n", MAX_HEAD):
                    pass  # trailers
                return bytes(body)
            _bounded(len(body) + size)
            body += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise ProtocolError("The answer is not HTTP: a chunk does not end where it says")

    def _until(self, end: bytes, limit: int) -> bytes:
        """Everything up to `end`, which is consumed too."""
        while (position := self._buffer.find(end)) < 0:
            if len(self._buffer) > limit:
                raise ProtocolError(f"The answer is not HTTP: a head of more than {limit} bytes")
            self._fill_or_fail()
        found = bytes(self._buffer[:position])
        del self._buffer[: position + len(end)]
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill_or_fail()
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def _fill_or_fail(self) -> None:
        if not self._fill():
            raise ServerGone(
                "The server closed the connection before it answered",
                "the VMM ended or was killed; its log says why",
            )

    def _fill(self) -> bool:
        """Wait for more bytes; False at the end of the stream. Calls on_interrupt for each SIGINT meanwhile."""
        self._wait()
        try:
            data = self._socket.recv(_CHUNK)
        except ConnectionResetError:
            return False
        self._buffer += data
        return bool(data)

    def _wait(self) -> None:
        if self._interrupts is None:
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._interrupts, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(None if self.tick is None else self.tick[0] * 1000)]
            if not ready and self.tick is not None:
                self.tick[1]()
            if self._interrupts.fileno() in ready and self._interrupts.take() and self._on_interrupt:
                self._on_interrupt()
            if self._socket.fileno() in ready:
                return


def _size(text: str, base: int) -> int:
    digits = "0123456789abcdef"[:base]
    text = text.strip().lower()
    if not 0 < len(text) <= 16 or any(character not in digits for character in text):
        raise ProtocolError(f"The answer is not HTTP: {text[:40]!r} is no length")
    size = int(text, base)
    _bounded(size)
    return size


def _bounded(size: int) -> None:
    if size > MAX_BODY:
        raise ProtocolError(f"The answer has {size} bytes or more", f"the limit is {MAX_BODY}")
