"""The stream between two agents: a hello in each direction, then frames. All numbers little-endian.

    hello    8 bytes "FLOTILLA", u16 version                 the source speaks first
    frame    u16 type, u16 flags, u32 length, then `length` bytes of body

`flags` is the number of descriptors that come with the header's first byte (SCM_RIGHTS); its upper bits are zero. Cloud
Hypervisor's stream begins with the bytes 01 00, so that one look at the first byte tells the two protocols apart.

The decoder trusts nothing: it says how many bytes it can use next (`wants`), so that descriptors always belong to the
part that is being read, and it allocates a body only as that arrives and only after its length was checked. Of a PAGES
frame it reads the list (an item PageList); the pages themselves are its caller's to read, straight into RAM.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.errors import ProtocolError
from shared.handover import LIMITS, Message
from shared.linux import close_fds
from shared.pages import COUNTS, runs_size

MAGIC = b"FLOTILLA"
VERSION = 1
HELLO = struct.Struct("<8sH")
HEADER = struct.Struct("<HHI")
CHUNK = 1 << 20  # bytes asked for at once

# Who else may knock: the first bytes, and what to tell the user.
_STRANGERS = (
    (b"\x01\x00", "this is how Cloud Hypervisor's own migration begins, which can't be received yet"),
    (b"\x16\x03", "this is how TLS begins"),
    (b"GET ", "this is HTTP: is the URL that of an API socket?"),
    (b"PUT ", "this is HTTP: is the URL that of an API socket?"),
)


@dataclass(frozen=True, slots=True)
class Hello:
    version: int


@dataclass(frozen=True, slots=True)
class Frame:
    """`fds` belong to whoever takes the frame."""

    type: Message
    body: bytes = b""
    fds: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PageList:
    """Head of a PAGES frame whose body has `length` bytes; the pages follow in the stream."""

    counts: bytes
    runs: bytes
    length: int


Item = Hello | Frame | PageList


def encode_hello(version: int = VERSION) -> bytes:
    return HELLO.pack(MAGIC, version)


def encode(kind: Message, body: bytes = b"", fds: Sequence[int] = ()) -> bytes:
    """Header and body; the descriptors are the caller's to attach. Raises ProtocolError for what no peer would take."""
    _check(kind, len(fds), len(body))
    return HEADER.pack(kind, len(fds), len(body)) + body


def _check(kind: Message, fds: int, length: int) -> None:
    limit = LIMITS[kind]
    if length > limit.body:
        raise ProtocolError(f"{kind.name} of {length} bytes (limit {limit.body})")
    if fds > limit.fds:
        raise ProtocolError(f"{kind.name} with {fds} file descriptors (limit {limit.fds})")


def _foreign(first: bytes) -> ProtocolError:
    printable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in first)
    hint = next((text for start, text in _STRANGERS if first.startswith(start)), "")
    return ProtocolError(
        f"the peer does not speak Flotilla's migration protocol: its first bytes are {first.hex(' ')} ({printable!r})",
        hint,
    )


class Decoder:
    """Bytes in, one Hello and then Frames and PageLists out. Raises ProtocolError; after that it is of no use but
    close()."""

    def __init__(self) -> None:
        self._greeted = False
        self._header: tuple[Message, int, int] | None = None
        self._list_size = 0  # of a PAGES frame: the part of its body that is read here
        self._buffer = bytearray()
        self._fds: list[int] = []

    @classmethod
    def resumed(cls, residue: bytes) -> Decoder:
        """One that goes on behind the hello where another one has left off, with what that had of a frame."""
        made = cls()
        made._greeted = True
        for start in range(len(residue)):
            if made.feed(residue[start : start + 1]) is not None:
                raise ProtocolError("a whole message was left over")
        return made

    def residue(self) -> bytes:
        """What is here of a frame that has not come whole."""
        if self._header is None:
            return bytes(self._buffer)
        kind, fds, length = self._header
        return HEADER.pack(kind, fds, length) + bytes(self._buffer)

    @property
    def _target(self) -> int:
        if not self._greeted:
            return HELLO.size
        if self._header is None:
            return HEADER.size
        return self._list_size or self._header[2]

    @property
    def wants(self) -> int:
        """The most bytes that feed() takes next, at least 1."""
        return min(CHUNK, self._target - len(self._buffer))

    @property
    def idle(self) -> bool:
        """Between two frames: an end of the stream cuts nothing."""
        return self._greeted and self._header is None and not self._buffer

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> Item | None:
        """The item that `data` (at most `wants` bytes) completes. The descriptors become the decoder's."""
        self._fds += fds
        self._buffer += data
        if not self._greeted:
            return self._hello()
        if self._header is None:
            if len(self._buffer) < HEADER.size:
                return None
            self._header = self._parse_header()
            self._buffer.clear()
        elif fds:
            raise ProtocolError(f"{len(fds)} file descriptors in the middle of a message")
        kind, _, length = self._header
        if kind is Message.PAGES:
            return self._page_list(length)
        if len(self._buffer) < length:
            return None
        frame = Frame(kind, bytes(self._buffer), self._fds)
        self._header, self._buffer, self._fds = None, bytearray(), []
        return frame

    def _page_list(self, length: int) -> PageList | None:
        if not self._list_size:
            if length < COUNTS.size:
                raise ProtocolError(f"PAGES of {length} bytes")
            self._list_size = COUNTS.size
        if len(self._buffer) < self._list_size:
            return None
        counts = bytes(self._buffer[: COUNTS.size])
        self._list_size = COUNTS.size + runs_size(counts)
        if self._list_size > length:
            raise ProtocolError(f"PAGES of {length} bytes with a list of {self._list_size}")
        if len(self._buffer) < self._list_size:
            return None
        item = PageList(counts, bytes(self._buffer[COUNTS.size :]), length)
        self._header, self._buffer, self._list_size = None, bytearray(), 0
        return item

    def _hello(self) -> Hello | None:
        # Byte by byte: a stranger is told at its first wrong byte, not after a deadline.
        if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            raise _foreign(bytes(self._buffer))
        if self._fds:
            raise ProtocolError("file descriptors came with the hello")
        if len(self._buffer) < HELLO.size:
            return None
        version = HELLO.unpack(self._buffer)[1]
        self._greeted = True
        self._buffer.clear()
        return Hello(version)

    def _parse_header(self) -> tuple[Message, int, int]:
        number, count, length = HEADER.unpack(self._buffer)
        try:
            kind = Message(number)
        except ValueError:
            raise ProtocolError(f"message of unknown type {number}, {length} bytes") from None
        _check(kind, count, length)
        if count != len(self._fds):
            raise ProtocolError(f"{kind.name} announces {count} file descriptors and brings {len(self._fds)}")
        return kind, count, length

    def close(self) -> None:
        """Close descriptors that belong to no finished frame."""
        close_fds(self._fds)
