"""The vhost-user protocol: message numbers, payloads and the framed connection that both sides use.

Names and layouts are those of QEMU's docs/interop/vhost-user.rst; integers are in host byte order. A message is a
header {request u32, flags u32, size u32} and `size` bytes of payload on an AF_UNIX stream; file descriptors travel as
SCM_RIGHTS, at most eight per message. `shared/vhost_backend.py` is the device side, `controller/vhost_frontend.py`
the VMM side.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from enum import IntEnum, IntFlag
from struct import Struct

from shared.errors import ProtocolError
from shared.linux import close_fds, recv_fds, send_fds
from shared.reactor import Reactor
from shared.records import NamedTuple, Record, field
from shared.typed import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import socket

VHOST_F_LOG_ALL = 1 << 26
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
VIRTIO_F_VERSION_1 = 1 << 32

VERSION = 0x1
VERSION_MASK = 0x3
REPLY = 0x4
NEED_REPLY = 0x8

MAX_FDS = 8
MAX_REGIONS = 8  # of one SET_MEM_TABLE: one descriptor each
MAX_CONFIG_SIZE = 256
MAX_PAYLOAD = 4096  # far above any message that is known; what claims more is not vhost-user
MAX_QUEUE_SIZE = 32768
MAX_BACKLOG = 64 << 10
MAX_BURST = 64

VRING_INDEX_MASK = 0xFF  # of the u64 that goes with a kick, call or error descriptor
VRING_NOFD = 0x100
VRING_F_LOG = 0x1
LOG_PAGE_SIZE = 4096


class Request(IntEnum):
    """Front end to back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """Back end to front end, on the socket of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(IntFlag):
    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


_HEADER = Struct("=III")
_U64 = Struct("=Q")
_VRING_STATE = Struct("=II")
_VRING_ADDR = Struct("=IIQQQQ")
_MEMORY_HEAD = Struct("=II")
_REGION = Struct("=QQQQ")
_SINGLE_REGION = Struct("=QQQQQ")
_LOG = Struct("=QQ")
_CONFIG = Struct("=III")
_INFLIGHT = Struct("=QQHH4x")  # C pads the structure to 24 bytes and peers check that size
HEADER_SIZE = _HEADER.size


def _fixed(layout: Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolError(f"vhost-user {what}: {len(payload)} bytes of payload instead of {layout.size}")
    return layout.unpack(payload)


def pack_u64(value: int) -> bytes:
    return _U64.pack(value)


def unpack_u64(payload: bytes) -> int:
    return _fixed(_U64, payload, "integer")[0]


class VringState(NamedTuple):
    """Payload of SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE and SET_VRING_ENABLE."""

    queue: int
    num: int

    def pack(self) -> bytes:
        return _VRING_STATE.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(*_fixed(_VRING_STATE, payload, "vring state"))


class VringAddr(NamedTuple):
    """Payload of SET_VRING_ADDR: addresses of the front end's address space, `log` a guest physical one."""

    queue: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    def pack(self) -> bytes:
        return _VRING_ADDR.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(*_fixed(_VRING_ADDR, payload, "vring address"))


class MemoryRegion(NamedTuple):
    """`size` bytes at guest address `gpa` are, in the front end, at `uva`, and in the file from `mmap_offset` on."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int

    def pack_single(self) -> bytes:
        """Payload of ADD_MEM_REG and REM_MEM_REG."""
        return _SINGLE_REGION.pack(0, *self)

    @classmethod
    def unpack_single(cls, payload: bytes) -> Self:
        return cls(*_fixed(_SINGLE_REGION, payload, "memory region")[1:])


def pack_regions(regions: list[MemoryRegion]) -> bytes:
    return _MEMORY_HEAD.pack(len(regions), 0) + b"".join(_REGION.pack(*r) for r in regions)


def unpack_regions(payload: bytes) -> list[MemoryRegion]:
    """Payload of SET_MEM_TABLE. Raises ProtocolError when count and length disagree."""
    if len(payload) < _MEMORY_HEAD.size:
        raise ProtocolError("vhost-user SET_MEM_TABLE: payload without a region count")
    count, _ = _MEMORY_HEAD.unpack_from(payload)
    body = payload[_MEMORY_HEAD.size :]
    if count > MAX_REGIONS or len(body) != count * _REGION.size:
        raise ProtocolError(f"vhost-user SET_MEM_TABLE: {count} regions in {len(body)} bytes")
    return [MemoryRegion(*fields) for fields in _REGION.iter_unpack(body)]


class LogArea(NamedTuple):
    """Payload of SET_LOG_BASE: where the dirty bitmap lies in the passed file."""

    size: int
    offset: int

    def pack(self) -> bytes:
        return _LOG.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(*_fixed(_LOG, payload, "log area"))


class ConfigSpan(NamedTuple):
    """Payload of GET_CONFIG and SET_CONFIG: a span of the device's configuration space and its bytes."""

    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) < _CONFIG.size:
            raise ProtocolError("vhost-user configuration: payload without a header")
        offset, size, flags = _CONFIG.unpack_from(payload)
        data = payload[_CONFIG.size :]
        if size != len(data) or offset + size > MAX_CONFIG_SIZE:
            raise ProtocolError(f"vhost-user configuration: {size} bytes at {offset}, payload has {len(data)}")
        return cls(offset, flags, data)


class InflightArea(NamedTuple):
    """Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def pack(self) -> bytes:
        return _INFLIGHT.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        # Front ends that pack the structure send 20 bytes.
        return cls(*_fixed(_INFLIGHT, payload if len(payload) != 20 else payload + bytes(4), "inflight area"))


INFLIGHT_HEADER_SIZE = 16  # features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16
INFLIGHT_ENTRY_SIZE = 16  # inflight u8, 5 pad, next u16, counter u64
INFLIGHT_ALIGNMENT = 64


def inflight_stride(queue_size: int) -> int:
    """Bytes of one split ring's part of an inflight region; the parts follow each other."""
    size = INFLIGHT_HEADER_SIZE + INFLIGHT_ENTRY_SIZE * queue_size
    return (size + INFLIGHT_ALIGNMENT - 1) & -INFLIGHT_ALIGNMENT


class Message(Record, frozen=False):
    """One message. Received descriptors belong to whoever holds the message, until taken or closed."""

    request: int
    payload: bytes = b""
    flags: int = VERSION
    fds: list[int] = field(default_factory=list)

    @property
    def needs_reply(self) -> bool:
        return bool(self.flags & NEED_REPLY)

    def take_fd(self) -> int:
        """The next descriptor; it is the caller's from now on. Raises ProtocolError when none is left."""
        if not self.fds:
            raise ProtocolError(f"vhost-user {name(self.request)}: a file descriptor is missing")
        return self.fds.pop(0)

    def close_fds(self) -> None:
        close_fds(self.fds)

    def pack(self) -> bytes:
        return _HEADER.pack(self.request, self.flags, len(self.payload)) + self.payload


def name(request: int) -> str:
    """The request's name for messages to people."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


class _Assembler:
    """Cuts messages out of the stream.

    It never asks the kernel for more than the rest of one message: descriptors come with the bytes they were sent
    with, so a longer read could not tell whose they are.
    """

    __slots__ = ("_buffer", "_fds", "_header")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._header: tuple[int, int, int] | None = None

    def read(self, sock: socket.socket) -> Message | None:
        """The next message, or None when the rest of it has not arrived. Raises EOFError and ProtocolError."""
        while True:
            wanted = (HEADER_SIZE if self._header is None else self._header[2]) - len(self._buffer)
            if wanted and not self._fill(sock, wanted):
                return None
            if len(self._buffer) < (HEADER_SIZE if self._header is None else self._header[2]):
                continue
            if self._header is None:
                self._header = self._parse()
                self._buffer.clear()
                continue
            request, flags, _ = self._header
            message = Message(request, bytes(self._buffer), flags, self._fds)
            self._buffer.clear()
            self._header, self._fds = None, []
            return message

    def _fill(self, sock: socket.socket, wanted: int) -> bool:
        try:
            data, fds = recv_fds(sock, wanted, MAX_FDS)
        except BlockingIOError:
            return False
        self._fds += fds
        if not data:
            raise EOFError
        if len(self._fds) > MAX_FDS:
            raise ProtocolError(f"vhost-user: more than {MAX_FDS} file descriptors in one message")
        self._buffer += data
        return True

    def _parse(self) -> tuple[int, int, int]:
        request, flags, size = _HEADER.unpack(self._buffer)
        if flags & VERSION_MASK != VERSION:
            raise ProtocolError(f"vhost-user: message version {flags & VERSION_MASK}, only {VERSION} is known")
        if size > MAX_PAYLOAD:
            raise ProtocolError(f"vhost-user {name(request)}: payload of {size} bytes, limit {MAX_PAYLOAD}")
        return request, flags, size

    def close(self) -> None:
        close_fds(self._fds)


class Connection:
    """One vhost-user socket on a reactor.

    `on_message` gets every message, and with it its descriptors. `on_close` is called once, with None when the peer
    closed or with the error that ended the connection; never after `close()`.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        on_message: Callable[[Message], None],
        on_close: Callable[[Exception | None], None],
    ) -> None:
        sock.setblocking(False)
        self._reactor = reactor
        self._sock = sock
        self._fd = sock.fileno()
        self._on_message = on_message
        self._on_close = on_close
        self._assembler = _Assembler()
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._backlog_size = 0
        self.closed = False
        reactor.add_reader(self._fd, self._readable)

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send, or keep what the socket does not take yet. `fds` stay the caller's. A dead peer shows in on_close."""
        if self.closed:
            return
        data = message.pack()
        if not self._backlog:
            rest = self._transmit(data, fds)
            if not rest:
                return
            data, fds = rest
        self._backlog.append((data, [os.dup(fd) for fd in fds]))
        self._backlog_size += len(data)
        self._reactor.add_writer(self._fd, self._flush)
        if self._backlog_size > MAX_BACKLOG:
            self._fail(ProtocolError("vhost-user: the peer does not read its messages"))

    def _transmit(self, data: bytes, fds: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]] | None:
        """Send what fits; what is left, None if nothing. Descriptors go with the first byte."""
        while data:
            try:
                sent = send_fds(self._sock, data, fds)
            except BlockingIOError:
                return data, fds
            except OSError as error:
                self._fail(None if isinstance(error, ConnectionError) else error)
                return None
            data, fds = data[sent:], ()
        return None

    def _flush(self) -> None:
        while self._backlog:
            data, fds = self._backlog[0]
            rest = self._transmit(data, tuple(fds))
            if not self._backlog:  # the connection failed and is closed
                return
            left, unsent = rest or (b"", ())
            self._backlog_size -= len(data) - len(left)
            if not unsent:
                close_fds(fds)
            if left:
                self._backlog[0] = (left, fds)
                return
            self._backlog.popleft()
        self._reactor.remove_writer(self._fd)

    def _readable(self) -> None:
        for _ in range(MAX_BURST):  # the rest keeps: the reactor is level-triggered, and others have to run too
            if self.closed:
                return
            try:
                message = self._assembler.read(self._sock)
            except (EOFError, ConnectionError):
                self._fail(None)
                return
            except (ProtocolError, OSError) as error:
                self._fail(error)
                return
            if message is None:
                return
            self._on_message(message)

    def _fail(self, error: Exception | None) -> None:
        if not self.closed:
            self.close()
            self._on_close(error)

    def close(self) -> None:
        """Close the socket and every descriptor that waits in it. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._reactor.remove_reader(self._fd)
        self._reactor.remove_writer(self._fd)
        self._assembler.close()
        for _, fds in self._backlog:
            close_fds(fds)
        self._backlog.clear()
        self._sock.close()
