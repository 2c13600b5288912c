"""The back end side of vhost-user: a server that turns a front end's messages into calls on a device.

One `Server` serves one connected front end. It owns the memory mappings, the dirty log's and the inflight region's,
the rings' parameters and eventfds; the device (`Backend`) only ever sees host addresses that have been range-checked.

    stopped ──SET_VRING_KICK──▶ started          started, enabled and not suspended: the device runs the ring
       ▲                           │             SET_VRING_ENABLE and suspend()/resume() are orthogonal to both
       └──────GET_VRING_BASE───────┘

A message that can't be carried out is answered with a non-zero REPLY_ACK if the front end asked for one; otherwise the
connection is closed, which is the only way that the protocol leaves to report it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shared import vhost_user as vu
from shared.errors import FlotillaError, ProtocolError
from shared.linux import memfd
from shared.reactor import Reactor
from shared.vhost_device import Backend, Ring
from shared.vhost_memory import MAX_MEM_SLOTS, Area, Mapping, MemoryTable
from shared.vhost_user import Connection, Message, ProtocolFeature, Request, VringAddr, VringState

__all__ = ("SERVER_FEATURES", "Backend", "Mapping", "Ring", "Server")

MAX_INFLIGHT_SIZE = 64 << 20
MAX_LOG_SIZE = 1 << 30  # bitmap bytes: 32 TiB of guest address space

SERVER_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
_TRANSPORT_FEATURES: Final = vu.VHOST_F_LOG_ALL | vu.VHOST_USER_F_PROTOCOL_FEATURES


@dataclass(slots=True)
class _Queue:
    index: int
    call_fd: int  # one number for life: a new eventfd is put under it by dup2, so that a running device sees it
    size: int = 0
    addr: VringAddr | None = None
    base: int = 0
    kick_fd: int = -1
    err_fd: int = -1
    enabled: bool = False
    ring: Ring | None = None  # set while the device runs it


@dataclass(slots=True)
class _Inflight:
    area: Area = field(default_factory=Area)
    num_queues: int = 0
    queue_size: int = 0


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Server:
    """Serves `backend` to the front end at the other end of `sock`. `on_disconnect` gets None or the error."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        backend: Backend,
        on_disconnect: Callable[[Exception | None], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._backend = backend
        self._on_disconnect = on_disconnect
        self._features = 0
        self._protocol_features = ProtocolFeature(0)
        self._status = 0
        self._suspended = False
        self._queues = [_Queue(index, _eventfd()) for index in range(backend.num_queues)]
        self._memory = MemoryTable(backend.set_memory)
        self._log = Area()
        self._inflight = _Inflight()
        self._events: Connection | None = None
        self._connection = Connection(reactor, sock, self._on_message, self._closed)

    @property
    def connected(self) -> bool:
        return not self._connection.closed

    def suspend(self) -> dict[int, int]:
        """Stop every ring and start none until resume(); messages are still answered.

        Returns {queue index: next avail index} of the rings that the front end has started.
        """
        self._suspended = True
        self._update_all()
        return {q.index: q.base for q in self._queues if q.kick_fd >= 0}

    def resume(self) -> None:
        """Run the rings again that suspend() stopped."""
        self._suspended = False
        self._update_all()

    def config_changed(self) -> None:
        """Tell the front end, if it listens, that the configuration space reads differently now."""
        if self._events is not None:
            self._events.send(Message(vu.BackendRequest.CONFIG_CHANGE_MSG))

    def queue_failed(self, index: int) -> None:
        """Signal the ring's error eventfd: the guest broke this ring and it is not served any more."""
        if self._queues[index].err_fd >= 0:
            os.eventfd_write(self._queues[index].err_fd, 1)

    def close(self) -> None:
        """Stop all rings, unmap everything and close the connection. Idempotent."""
        self._connection.close()
        self._release()

    # Dispatch ---------------------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        wants_ack = message.needs_reply and ProtocolFeature.REPLY_ACK in self._protocol_features
        try:
            handler = _HANDLERS.get(message.request)
            if handler is None:
                raise ProtocolError(f"vhost-user: {vu.name(message.request)} is not supported")
            answer = handler(self, message)
        except (FlotillaError, OSError) as error:
            if wants_ack or message.request == Request.SET_LOG_BASE:
                self._reply(message, vu.pack_u64(1))
            else:
                self._connection.close()
                self._closed(error)
        else:
            if isinstance(answer, Message):
                self._reply(message, answer.payload, tuple(answer.fds))
                answer.close_fds()
            elif answer is not None:
                self._reply(message, answer)
            elif wants_ack:
                self._reply(message, vu.pack_u64(0))
        finally:
            message.close_fds()

    def _reply(self, message: Message, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        self._connection.send(Message(message.request, payload, vu.VERSION | vu.REPLY), fds)

    def _closed(self, error: Exception | None) -> None:
        self._release()
        if self._on_disconnect is not None:
            self._on_disconnect(error)

    def _release(self) -> None:
        for queue in self._queues:
            self._halt(queue)
            for fd in (queue.kick_fd, queue.err_fd, queue.call_fd):
                if fd >= 0:
                    os.close(fd)
        self._queues = []
        self._switch_log(Area())
        self._memory.clear()
        self._inflight.area.unmap()
        if self._events is not None:
            self._events.close()
            self._events = None

    # Features ---------------------------------------------------------------------------------------------------

    def _get_features(self, _: Message) -> bytes:
        return vu.pack_u64(self._backend.features | _TRANSPORT_FEATURES)

    def _set_features(self, message: Message) -> None:
        features = vu.unpack_u64(message.payload)
        unknown = features & ~(self._backend.features | _TRANSPORT_FEATURES)
        if unknown:
            raise ProtocolError(f"vhost-user SET_FEATURES: {unknown:#x} was not offered")
        before, self._features = self._features, features
        if (before ^ features) & ~_TRANSPORT_FEATURES:
            self._backend.set_features(features & ~_TRANSPORT_FEATURES)
        self._apply_log()
        if not features & vu.VHOST_USER_F_PROTOCOL_FEATURES:
            for queue in self._queues:
                queue.enabled = True  # such a front end knows no SET_VRING_ENABLE
        self._update_all()

    def _get_protocol_features(self, _: Message) -> bytes:
        return vu.pack_u64(SERVER_FEATURES | self._backend.protocol_features)

    def _set_protocol_features(self, message: Message) -> None:
        features = vu.unpack_u64(message.payload)
        unknown = features & ~(SERVER_FEATURES | self._backend.protocol_features)
        if unknown:
            raise ProtocolError(f"vhost-user SET_PROTOCOL_FEATURES: {unknown:#x} was not offered")
        self._protocol_features = ProtocolFeature(features)

    def _set_owner(self, _: Message) -> None:
        """The session belongs to this front end; a unix stream has no other."""

    def _reset_device(self, _: Message) -> None:
        for queue in self._queues:
            self._stop(queue)
            queue.enabled = False
        self._status = 0

    def _get_queue_num(self, _: Message) -> bytes:
        return vu.pack_u64(self._backend.num_queues)

    def _get_status(self, _: Message) -> bytes:
        return vu.pack_u64(self._status)

    def _set_status(self, message: Message) -> None:
        self._status = vu.unpack_u64(message.payload) & 0xFF
        if not self._status:
            self._reset_device(message)

    # Memory -----------------------------------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        regions = vu.unpack_regions(message.payload)
        self._move_memory(lambda: self._memory.replace(regions, message.fds))

    def _move_memory(self, change: Callable[[], None]) -> None:
        """Rings are stopped for it: their addresses change. Those that the new memory has not got stay stopped."""
        for queue in self._queues:
            self._halt(queue)
        try:
            change()
        finally:
            self._update_all()

    def _get_max_mem_slots(self, _: Message) -> bytes:
        return vu.pack_u64(MAX_MEM_SLOTS)

    def _add_mem_reg(self, message: Message) -> None:
        region = vu.MemoryRegion.unpack_single(message.payload)
        fd = message.take_fd()
        try:
            self._memory.add(region, fd)  # nothing goes away, so the rings may run on
        finally:
            os.close(fd)
        self._update_all()

    def _rem_mem_reg(self, message: Message) -> None:
        region = vu.MemoryRegion.unpack_single(message.payload)
        self._move_memory(lambda: self._memory.remove(region))

    # Dirty log --------------------------------------------------------------------------------------------------

    def _set_log_base(self, message: Message) -> bytes:
        wanted = vu.LogArea.unpack(message.payload)
        if wanted.size > MAX_LOG_SIZE:
            raise ProtocolError(f"vhost-user SET_LOG_BASE: bitmap of {wanted.size} bytes")
        fd = message.take_fd()
        try:
            self._switch_log(Area.map(fd, wanted.size, wanted.offset, "SET_LOG_BASE"))
        finally:
            os.close(fd)
        return vu.pack_u64(0)

    def _switch_log(self, area: Area) -> None:
        old, self._log = self._log, area
        self._apply_log()
        old.unmap()

    def _apply_log(self) -> None:
        if self._features & vu.VHOST_F_LOG_ALL:
            self._backend.set_log(self._log.address, self._log.size)
        else:
            self._backend.set_log(0, 0)

    def _set_log_fd(self, message: Message) -> None:
        """An eventfd that may be signalled for logged writes; nobody polls a bitmap by it, so it is let go."""

    # Rings ------------------------------------------------------------------------------------------------------

    def _queue(self, index: int) -> _Queue:
        if index >= len(self._queues):
            raise ProtocolError(f"vhost-user: queue {index} of a device with {len(self._queues)}")
        return self._queues[index]

    def _set_vring_num(self, message: Message) -> None:
        state = VringState.unpack(message.payload)
        queue = self._queue(state.queue)
        if not 0 < state.num <= vu.MAX_QUEUE_SIZE or state.num & (state.num - 1):
            raise ProtocolError(f"vhost-user SET_VRING_NUM: {state.num} is no size of a split ring")
        queue.size = state.num

    def _set_vring_addr(self, message: Message) -> None:
        addr = VringAddr.unpack(message.payload)
        queue = self._queue(addr.queue)
        queue.addr = addr
        if queue.ring is not None:
            # Sent to a running ring to switch logging. Only what really changes is worth a stop.
            wanted = self._build(queue, queue.ring.base)
            if wanted != queue.ring:
                self._halt(queue)
                self._update(queue)

    def _set_vring_base(self, message: Message) -> None:
        state = VringState.unpack(message.payload)
        if state.num > 0xFFFF:
            raise ProtocolError(f"vhost-user SET_VRING_BASE: {state.num} is no index of a split ring")
        self._queue(state.queue).base = state.num

    def _get_vring_base(self, message: Message) -> bytes:
        queue = self._queue(VringState.unpack(message.payload).queue)
        self._stop(queue)
        return VringState(queue.index, queue.base).pack()

    def _set_vring_enable(self, message: Message) -> None:
        state = VringState.unpack(message.payload)
        queue = self._queue(state.queue)
        queue.enabled = bool(state.num)
        self._update(queue)

    def _take_eventfd(self, message: Message) -> tuple[_Queue, int]:
        """The queue and the descriptor of a kick, call or error message; -1 when the front end sends none."""
        value = vu.unpack_u64(message.payload)
        queue = self._queue(value & vu.VRING_INDEX_MASK)
        return queue, -1 if value & vu.VRING_NOFD else message.take_fd()

    def _set_vring_kick(self, message: Message) -> None:
        queue, fd = self._take_eventfd(message)
        if fd < 0:
            raise ProtocolError(f"vhost-user SET_VRING_KICK: queue {queue.index} can't be polled, an eventfd is needed")
        # The eventfd's description is shared with the front end, which never blocks on it either.
        os.set_blocking(fd, False)
        self._halt(queue)
        if queue.kick_fd >= 0:
            os.close(queue.kick_fd)
        queue.kick_fd = fd
        self._update(queue)

    def _set_vring_call(self, message: Message) -> None:
        queue, fd = self._take_eventfd(message)
        self._replace_call(queue, fd)

    def _replace_call(self, queue: _Queue, fd: int) -> None:
        fd = _eventfd() if fd < 0 else fd
        try:
            os.dup2(fd, queue.call_fd, inheritable=False)
        finally:
            os.close(fd)

    def _set_vring_err(self, message: Message) -> None:
        queue, fd = self._take_eventfd(message)
        if queue.err_fd >= 0:
            os.close(queue.err_fd)
        queue.err_fd = fd

    def _build(self, queue: _Queue, base: int) -> Ring:
        """The ring as the device is to see it. Raises ProtocolError when addresses or inflight region don't fit."""
        addr, size = queue.addr, queue.size
        if addr is None or not size:
            raise ProtocolError(f"vhost-user: queue {queue.index} is started without size and addresses")
        desc, _ = self._memory.translate(addr.desc, 16 * size, 16, f"descriptor table of queue {queue.index}")
        avail, _ = self._memory.translate(addr.avail, 6 + 2 * size, 2, f"avail ring of queue {queue.index}")
        used, used_gpa = self._memory.translate(addr.used, 6 + 8 * size, 4, f"used ring of queue {queue.index}")
        if addr.flags & vu.VRING_F_LOG:
            used_gpa = addr.log
        inflight = 0
        if queue.index < self._inflight.num_queues:
            if size > self._inflight.queue_size:
                raise ProtocolError(f"vhost-user: queue {queue.index} has {size} entries, its inflight region "
                                    f"{self._inflight.queue_size}")  # fmt: skip
            inflight = self._inflight.area.address + queue.index * vu.inflight_stride(self._inflight.queue_size)
        # The used ring is logged whenever there is a log: too much is harmless, and switching the log then needs no
        # stop of a ring whose addresses stay the same.
        return Ring(
            index=queue.index, size=size, desc=desc, avail=avail, used=used, base=base, kick_fd=queue.kick_fd,
            call_fd=queue.call_fd, log_used=True, used_gpa=used_gpa, inflight=inflight,
            inflight_desc_num=self._inflight.queue_size if inflight else 0,
        )  # fmt: skip

    def _update(self, queue: _Queue) -> None:
        """Let the device run or stop the ring as its state demands."""
        wanted = queue.kick_fd >= 0 and queue.enabled and not self._suspended
        if wanted and queue.ring is None:
            ring = self._build(queue, queue.base)
            self._backend.start_queue(ring)
            queue.ring = ring
        elif not wanted:
            self._halt(queue)

    def _update_all(self) -> None:
        """For changes that concern all rings: one that can't run is reported by its error eventfd, the others run."""
        for queue in self._queues:
            try:
                self._update(queue)
            except ProtocolError:
                self.queue_failed(queue.index)

    def _halt(self, queue: _Queue) -> None:
        if queue.ring is not None:
            queue.base = self._backend.stop_queue(queue.index)
            queue.ring = None

    def _stop(self, queue: _Queue) -> None:
        """The ring's state becomes stopped: nothing is read from its kick nor written to its call any more."""
        self._halt(queue)
        if queue.kick_fd >= 0:
            os.close(queue.kick_fd)
            queue.kick_fd = -1
        self._replace_call(queue, -1)

    # Configuration space, inflight region, back-end channel -----------------------------------------------------

    def _get_config(self, message: Message) -> bytes:
        span = vu.ConfigSpan.unpack(message.payload)
        try:
            data = self._backend.get_config(span.offset, len(span.data))
        except (FlotillaError, OSError):
            return b""  # an empty payload is how the protocol reports it
        return span._replace(data=data[: len(span.data)].ljust(len(span.data), b"\0")).pack()

    def _set_config(self, message: Message) -> None:
        span = vu.ConfigSpan.unpack(message.payload)
        self._backend.set_config(span.offset, span.data)

    def _get_inflight_fd(self, message: Message) -> Message:
        wanted = vu.InflightArea.unpack(message.payload)
        if not 0 < wanted.num_queues <= len(self._queues) or not 0 < wanted.queue_size <= vu.MAX_QUEUE_SIZE:
            raise ProtocolError(f"vhost-user GET_INFLIGHT_FD: {wanted.num_queues} queues of {wanted.queue_size}")
        size = wanted.num_queues * vu.inflight_stride(wanted.queue_size)
        answer = vu.InflightArea(size, 0, wanted.num_queues, wanted.queue_size)
        return Message(message.request, answer.pack(), fds=[memfd("vhost-inflight", size)])

    def _set_inflight_fd(self, message: Message) -> None:
        wanted = vu.InflightArea.unpack(message.payload)
        if any(q.ring is not None for q in self._queues):
            raise ProtocolError("vhost-user SET_INFLIGHT_FD: rings are running")
        needed = wanted.num_queues * vu.inflight_stride(wanted.queue_size)
        if not needed <= wanted.mmap_size <= MAX_INFLIGHT_SIZE:
            raise ProtocolError(f"vhost-user SET_INFLIGHT_FD: {wanted.mmap_size} bytes for {needed}")
        fd = message.take_fd()
        try:
            area = Area.map(fd, wanted.mmap_size, wanted.mmap_offset, "SET_INFLIGHT_FD")
        finally:
            os.close(fd)
        self._inflight.area.unmap()
        self._inflight = _Inflight(area, wanted.num_queues, wanted.queue_size)

    def _set_backend_req_fd(self, message: Message) -> None:
        sock = socket.socket(fileno=message.take_fd())
        if self._events is not None:
            self._events.close()
        self._events = Connection(self._reactor, sock, Message.close_fds, self._events_closed)

    def _events_closed(self, _: Exception | None) -> None:
        self._events = None


# What a handler returns is the reply's payload, with descriptors if it is a Message; None: nothing but REPLY_ACK.
_Handler = Callable[[Server, Message], bytes | Message | None]
_HANDLERS: Final[dict[int, _Handler]] = {
    Request.GET_FEATURES: Server._get_features,
    Request.SET_FEATURES: Server._set_features,
    Request.SET_OWNER: Server._set_owner,
    Request.RESET_OWNER: Server._reset_device,
    Request.SET_MEM_TABLE: Server._set_mem_table,
    Request.SET_LOG_BASE: Server._set_log_base,
    Request.SET_LOG_FD: Server._set_log_fd,
    Request.SET_VRING_NUM: Server._set_vring_num,
    Request.SET_VRING_ADDR: Server._set_vring_addr,
    Request.SET_VRING_BASE: Server._set_vring_base,
    Request.GET_VRING_BASE: Server._get_vring_base,
    Request.SET_VRING_KICK: Server._set_vring_kick,
    Request.SET_VRING_CALL: Server._set_vring_call,
    Request.SET_VRING_ERR: Server._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: Server._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Server._set_protocol_features,
    Request.GET_QUEUE_NUM: Server._get_queue_num,
    Request.SET_VRING_ENABLE: Server._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: Server._set_backend_req_fd,
    Request.GET_CONFIG: Server._get_config,
    Request.SET_CONFIG: Server._set_config,
    Request.GET_INFLIGHT_FD: Server._get_inflight_fd,
    Request.SET_INFLIGHT_FD: Server._set_inflight_fd,
    Request.RESET_DEVICE: Server._reset_device,
    Request.GET_MAX_MEM_SLOTS: Server._get_max_mem_slots,
    Request.ADD_MEM_REG: Server._add_mem_reg,
    Request.REM_MEM_REG: Server._rem_mem_reg,
    Request.SET_STATUS: Server._set_status,
    Request.GET_STATUS: Server._get_status,
}
