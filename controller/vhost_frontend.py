"""The VMM side of vhost-user: one device's rings, given to a back end, and to its successor when it dies.

    await frontend.connect(sock)                    negotiate
    await frontend.activate(acked, queues)          the driver said DRIVER_OK
    await frontend.stop() … await frontend.resume() quiesce and go on
    await frontend.reset()                          the driver said 0

A back end that refuses to stop its rings, or to start those of a guest that can't do without, is given up as one that
died.

What the device is to do (the session) is kept here and is recorded before it is sent. So when the back end dies, at
any message, the supervisor hears of it by `on_lost`, brings up another one, and `replay(sock)` puts that into the same
state; whoever awaited activate(), stop() or reset() meanwhile just waits longer. The guest's kicks stay in the
eventfds, and requests that were in flight are in the inflight region, which lives here.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

from controller.vhost_link import Link, dial
from controller.vhost_session import Batch, DirtyLog, Inflight, Queue, Session
from shared import vhost_user as vu
from shared.errors import FlotillaError, HostError, ProtocolError, Timeout, WorkerLost
from shared.memory import GuestMemory
from shared.reactor import Event, Future, Lock, Reactor, within
from shared.typed import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import socket
from shared.vhost_user import Message, ProtocolFeature, Request, VringAddr, VringState

__all__ = ("Frontend", "Queue", "dial")

T = TypeVar("T")

SECONDS = 10.0  # for what a back end answers at once
STOP_SECONDS = 60.0  # for what may have to wait for a disk

WANTED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class Frontend:
    """One device's front end. All methods belong to the reactor's thread.

    `features` (with vhost's own two bits), `protocol_features` and `max_queues` are the back end's, valid after
    connect(). `on_lost(error)` tells that a connected back end is gone: None if it closed, else what it did wrong.
    `on_config_change()` tells that the configuration space reads differently now.
    """

    def __init__(self, reactor: Reactor, memory: GuestMemory, name: str, *, own: bool = True) -> None:
        """`own`: the back end is a worker of ours. A stranger allocates the inflight region itself."""
        self._reactor = reactor
        self._memory = memory
        self.name = name
        self._own = own
        self._link: Link | None = None
        self._events: vu.Connection | None = None
        self._session: Session | None = None
        self._log: DirtyLog | None = None
        self._config_writes: dict[int, bytes] = {}
        self._live = Event()  # a back end is connected and does what the session says, or we gave up
        self.conversation = Lock()  # one at a time
        self._given_up: FlotillaError | None = None
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.max_queues = 1
        self.on_lost: Callable[[Exception | None], None] = lambda _error: None
        self.on_config_change: Callable[[], None] = lambda: None

    @property
    def connected(self) -> bool:
        return self._live.is_set() and self._given_up is None

    @property
    def busy(self) -> bool:
        return self.conversation.held  # a conversation is under way, which may have to wait for a disk

    @property
    def bases(self) -> dict[int, int]:
        """Next avail index per queue if stop() has stopped them; empty while they run."""
        return {} if self._session is None or self._session.running else dict(self._session.bases)

    @property
    def active(self) -> bool:
        """Whether the driver has activated the device, its rings running or stopped."""
        return self._session is not None

    async def wait_connected(self) -> None:
        """Until a back end is there for the first time, or again. Raises what give_up() was told."""
        await self._live.wait()
        if self._given_up is not None:
            raise self._given_up

    # Connections ------------------------------------------------------------------------------------------------

    async def connect(self, sock: socket.socket) -> None:
        """Take a connected socket and negotiate. Raises WorkerLost and ProtocolError; on_lost is then not called."""
        await self.replay(sock)

    async def replay(self, sock: socket.socket) -> None:
        """Let a new back end take over where the last one ended; nothing of that one may write any more.

        Rings that ran go on from their used index and the inflight region. Raises as connect() does, and HostError
        when the new back end can't do what the driver has negotiated with the last one.
        """
        async with self.conversation:
            self._drop()
            link = Link(self._reactor, sock, self.name, self._lost)
            self._link = link
            try:
                await self._negotiate(link)
                if self._session is not None and self._session.running:
                    await self._start(link, self._session, self._used_indices(self._session), wake=True)
                if self._link is not link:  # it answered everything, and hung up before this task's next step
                    raise WorkerLost(f"{self.name}: the back end went away as soon as it was connected")
            except BaseException:
                self._drop()
                raise
            self._given_up = None
            self._live.set()
        if self._session is not None:
            self.on_config_change()  # whatever changed while there was no back end to say so

    def give_up(self, error: FlotillaError) -> None:
        """There will be no successor: fail whoever waits for one with `error`."""
        self._drop()
        self._given_up = error
        self._live.set()

    def close(self) -> None:
        """Hang up and let go of everything. on_lost is not called. Idempotent."""
        self.give_up(WorkerLost(f"{self.name}: the device was closed"))
        if self._session is not None:
            self._session.close()
            self._session = None
        self._forget_log()

    def _drop(self) -> None:
        link, self._link = self._link, None
        self._live.clear()
        if link is not None:
            link.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def _lost(self, link: Link, error: Exception | None) -> None:
        if link is not self._link:
            return
        was_live = self._live.is_set()
        self._drop()
        if was_live:  # otherwise connect() or replay() raises it
            self.on_lost(error)

    async def _negotiate(self, link: Link) -> None:
        features = await self._ask_u64(link, Request.GET_FEATURES)
        protocol = ProtocolFeature(0)
        if features & vu.VHOST_USER_F_PROTOCOL_FEATURES:
            protocol = ProtocolFeature(await self._ask_u64(link, Request.GET_PROTOCOL_FEATURES)) & WANTED
            link.tell(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(protocol))
            link.acks = ProtocolFeature.REPLY_ACK in protocol
        if self._session is not None:
            self._check_features(self._session, features)
        queues = await self._ask_u64(link, Request.GET_QUEUE_NUM) if ProtocolFeature.MQ in protocol else 1
        batch = Batch()
        batch.add(link.tell(Request.SET_OWNER))
        if ProtocolFeature.BACKEND_REQ in protocol:
            import socket

            ours, theirs = socket.socketpair()
            self._events = vu.Connection(self._reactor, ours, self._on_event, self._events_closed)
            with theirs:
                batch.add(link.tell(Request.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),)))
        await self._within(link, batch.wait(), "negotiation")
        self.features, self.protocol_features, self.max_queues = features, protocol, queues

    def _check_features(self, session: Session, features: int) -> None:
        if lacking := session.features & ~features:
            raise HostError(
                f"{self.name}: the new back end lacks features {lacking:#x} that the guest uses",
                "start it with the options of the one before it",
            )

    def _on_event(self, message: Message) -> None:
        message.close_fds()
        if message.needs_reply and self._events is not None:
            known = message.request == vu.BackendRequest.CONFIG_CHANGE_MSG
            reply = Message(message.request, vu.pack_u64(0 if known else 1), vu.VERSION | vu.REPLY)
            self._events.send(reply)
        if message.request == vu.BackendRequest.CONFIG_CHANGE_MSG:
            self.on_config_change()

    def _events_closed(self, _: Exception | None) -> None:
        self._events = None

    async def _ask_u64(self, link: Link, request: Request) -> int:
        message: Message = await self._within(link, link.call(request), request.name)
        message.close_fds()
        return vu.unpack_u64(message.payload)

    async def _within(self, link: Link, awaitable: Awaitable[T], what: str) -> T:
        """A back end that does not answer in time is as good as dead: the supervisor is to replace it."""
        try:
            return await within(self._reactor, SECONDS, awaitable, f"{self.name}: vhost-user {what}")
        except Timeout as error:
            link.fail(error)
            raise WorkerLost(f"{self.name}: the back end does not answer") from error

    async def _on_back_end(self, action: Callable[[Link], Awaitable[T]]) -> T:
        """Carry an action out; when the back end dies under it, on its successor."""
        while True:
            await self._live.wait()
            async with self.conversation:
                link = self._link
                if link is None:
                    if self._given_up is not None:
                        raise self._given_up
                    continue
                try:
                    return await action(link)
                except WorkerLost:
                    if self._link is link:
                        raise

    async def _insist(self, action: Callable[[Link], Awaitable[T]]) -> T:
        """The same for what leaves rings of which nobody knows whether they run, when it fails or nobody waits for it
        any more: that back end is given up, and its successor does what the session says."""

        async def attempt(link: Link) -> T:
            try:
                return await action(link)
            # With the conversation still held: whoever has it next, or judges by it, must find the back end given up.
            except BaseException as error:
                late = Timeout(f"{self.name}: the back end did not start or stop its rings in time")
                link.fail(error if isinstance(error, Exception) else late)
                raise

        return await self._on_back_end(attempt)

    # Rings ------------------------------------------------------------------------------------------------------

    async def activate(
        self, acked: int, queues: Sequence[Queue], bases: Mapping[int, int] | None = None, *, restored: bool = False
    ) -> None:
        """Start the rings of a driver that has negotiated `acked`.

        `bases` are next avail indices by queue; without one a ring starts at 0, or, if `restored`, where its used
        ring in guest memory ends. A restored device also has every kick and call signalled. Raises BadGuestAddress
        for rings outside RAM, HostError when the back end lacks a feature and ProtocolError when it refuses; the device
        is not active then. A restored one is, for its guest can't do without: whoever comes next starts its rings.
        """
        if self._session is not None:
            self._session.close()
        features = acked & ~(vu.VHOST_F_LOG_ALL | vu.VHOST_USER_F_PROTOCOL_FEATURES)
        session = Session(features, tuple(queues), {})
        session.bases = {q.index: 0 for q in session.queues}
        if restored:
            session.bases = self._used_indices(session)
        session.bases.update((index, base) for index, base in (bases or {}).items() if index in session.bases)
        self._session = session

        async def start(link: Link) -> None:
            if session.link is not link:  # otherwise a replay has done it
                self._check_features(session, self.features)
                await self._start(link, session, session.bases, wake=restored)

        async def start_all_or_none(link: Link) -> None:
            try:
                await start(link)
            except ProtocolError:
                # Some of the rings may run already. A back end that hangs up on this has stopped them too.
                try:
                    await self._halt(link)
                except WorkerLost:
                    pass
                except ProtocolError as error:
                    link.fail(error)
                raise

        if restored:
            await self._insist(start)
            return
        try:
            await self._on_back_end(start_all_or_none)
        except BaseException:
            session.close()
            self._session = None
            raise

    async def resume(self) -> None:
        """Start the rings again that stop() has stopped, from its bases. Raises FlotillaError and OSError: the back
        end is given up then, and its successor starts them."""
        session = self._session
        if session is None or session.running:
            return  # those that a stop() in vain may have stopped are the successor's
        session.running = True
        session.link = None

        async def start(link: Link) -> None:
            if session.link is not link:
                await self._start(link, session, session.bases, wake=True)

        await self._insist(start)

    async def stop(self, seconds: float | None = STOP_SECONDS) -> dict[int, int]:
        """Stop all rings; when this returns nothing is in flight. {queue index: next avail index}.

        Raises Timeout, and ProtocolError for an answer that is none: a back end that was asked is given up then
        (`on_lost`), and the rings run on with its successor. A back end that dies meanwhile is waited for: its
        successor finishes what was in flight.
        """
        session = self._session
        if session is None:
            return {}
        if session.running:
            what = f"{self.name}: stopping the rings"
            session.bases = await within(self._reactor, seconds, self._insist(self._halt), what)
            session.running = False
            session.link = None
        return dict(session.bases)

    async def _halt(self, link: Link) -> dict[int, int]:
        session = self._session
        if session is None:
            return {}
        batch = Batch()
        for queue in session.queues:
            batch.add(link.call(Request.GET_VRING_BASE, VringState(queue.index, 0).pack()))
        bases: dict[int, int] = {}
        for queue, message in zip(session.queues, await batch.wait(), strict=True):
            message.close_fds()
            state = VringState.unpack(message.payload)
            if state.queue != queue.index:
                raise ProtocolError(f"{self.name}: asked for queue {queue.index}, told of {state.queue}")
            bases[state.queue] = state.num & 0xFFFF
        return bases

    async def reset(self) -> None:
        """Take the rings away; when this returns the back end has stopped touching guest memory."""
        session = self._session
        if session is None:
            return
        try:
            await self.stop(None)
        except FlotillaError:
            if self._given_up is None:
                raise  # otherwise it is dead, and touches nothing
        session.close()
        self._session = None

    def _used_indices(self, session: Session) -> dict[int, int]:
        """Where a back end has to go on that nobody could ask: what it has published counts as done."""
        return {q.index: self._memory.u16(q.used + 2) for q in session.queues}

    async def _start(self, link: Link, session: Session, bases: Mapping[int, int], *, wake: bool) -> None:
        # All addresses first: a bad one must not leave half of the rings running.
        addresses = [self._vring_addr(queue) for queue in session.queues]
        batch = Batch()
        batch.add(link.tell(Request.SET_FEATURES, vu.pack_u64(self._feature_bits(session))))
        self._send_memory(link, batch)
        if self._log is not None:
            batch.add(self._send_log(link, self._log))
        if ProtocolFeature.INFLIGHT_SHMFD in self.protocol_features and session.queues:
            if session.inflight is None:
                session.inflight = await self._new_inflight(link, session)
            batch.add(link.tell(Request.SET_INFLIGHT_FD, session.inflight.area.pack(), (session.inflight.fd,)))
        settings = self._config_writes if ProtocolFeature.CONFIG in self.protocol_features else {}
        for offset, data in settings.items():
            # A fresh back end has to know the driver's settings (a disk's write-back mode) before the first request.
            batch.add(link.tell(Request.SET_CONFIG, vu.ConfigSpan(offset, 0, data).pack()))
        for queue, address in zip(session.queues, addresses, strict=True):
            self._send_queue(link, batch, queue, address, bases[queue.index])
        if not link.acks:
            batch.add(link.call(Request.GET_FEATURES))  # its reply tells that all before it has been read
        await self._within(link, batch.wait(), "activation")
        session.link = link
        if wake:
            # A kick may have been consumed by the back end before, and an interrupt may have died with it.
            for queue in session.queues:
                os.eventfd_write(queue.kick_fd, 1)
                os.eventfd_write(queue.call_fd, 1)

    def _feature_bits(self, session: Session) -> int:
        bits = self.features & (session.features | vu.VHOST_USER_F_PROTOCOL_FEATURES)
        return bits | (vu.VHOST_F_LOG_ALL if self._log is not None else 0)

    def _send_memory(self, link: Link, batch: Batch) -> None:
        regions = [(vu.MemoryRegion(r.gpa, r.size, r.address, r.offset), r.fd) for r in self._memory.regions]
        table, rest = regions[: vu.MAX_REGIONS], regions[vu.MAX_REGIONS :]
        if rest and ProtocolFeature.CONFIGURE_MEM_SLOTS not in self.protocol_features:
            raise HostError(f"{self.name}: the back end takes {vu.MAX_REGIONS} memory regions, not {len(regions)}")
        payload = vu.pack_regions([region for region, _ in table])
        batch.add(link.tell(Request.SET_MEM_TABLE, payload, tuple(fd for _, fd in table)))
        for region, fd in rest:
            batch.add(link.tell(Request.ADD_MEM_REG, region.pack_single(), (fd,)))

    async def _new_inflight(self, link: Link, session: Session) -> Inflight:
        num_queues = max(q.index for q in session.queues) + 1
        queue_size = max(q.size for q in session.queues)
        if self._own:
            return Inflight.allocate(num_queues, queue_size)
        wanted = vu.InflightArea(0, 0, num_queues, queue_size).pack()
        message: Message = await self._within(link, link.call(Request.GET_INFLIGHT_FD, wanted), "GET_INFLIGHT_FD")
        try:
            area = vu.InflightArea.unpack(message.payload)
            return Inflight(message.take_fd(), area)
        finally:
            message.close_fds()

    def _send_queue(self, link: Link, batch: Batch, queue: Queue, address: bytes, base: int) -> None:
        batch.add(link.tell(Request.SET_VRING_NUM, VringState(queue.index, queue.size).pack()))
        batch.add(link.tell(Request.SET_VRING_ADDR, address))
        batch.add(link.tell(Request.SET_VRING_BASE, VringState(queue.index, base).pack()))
        batch.add(link.tell(Request.SET_VRING_CALL, vu.pack_u64(queue.index), (queue.call_fd,)))
        batch.add(link.tell(Request.SET_VRING_KICK, vu.pack_u64(queue.index), (queue.kick_fd,)))
        if self.features & vu.VHOST_USER_F_PROTOCOL_FEATURES:
            batch.add(link.tell(Request.SET_VRING_ENABLE, VringState(queue.index, 1).pack()))

    def _vring_addr(self, queue: Queue) -> bytes:
        address = self._memory.host_address
        return VringAddr(
            queue=queue.index,
            flags=vu.VRING_F_LOG if self._log is not None else 0,
            desc=address(queue.desc, 16 * queue.size),
            used=address(queue.used, 6 + 8 * queue.size),
            avail=address(queue.avail, 6 + 2 * queue.size),
            log=queue.used,
        ).pack()

    # Memory, dirty log, configuration space ---------------------------------------------------------------------

    async def set_memory(self, memory: GuestMemory) -> None:
        """Guest memory has grown or shrunk; regions that stay keep their addresses. Rings go on."""
        self._memory = memory

        async def send(link: Link) -> None:
            batch = Batch()
            self._send_memory(link, batch)
            await self._within(link, batch.wait(), "SET_MEM_TABLE")

        if self._session is not None:
            await self._on_back_end(send)

    @property
    def can_log(self) -> bool:
        """Whether a VM with this device can be migrated while it runs."""
        return bool(self.features & vu.VHOST_F_LOG_ALL) and ProtocolFeature.LOG_SHMFD in self.protocol_features

    async def start_logging(self, fd: int, size: int) -> None:
        """From now on the back end marks every page it writes in the bitmap: `size` bytes of `fd`, which stays the
        caller's; one bit per 4 KiB of guest address, to be harvested by atomic exchange. Raises HostError."""
        if not self.can_log:
            raise HostError(
                f"{self.name}: its vhost-user back end keeps no dirty log", "the VM can't migrate while it runs"
            )
        self._forget_log()
        self._log = DirtyLog(os.dup(fd), size)
        await self._switch_log()

    async def stop_logging(self) -> None:
        """The back end marks nothing from now on."""
        if self._log is not None:
            self._forget_log()
            await self._switch_log()

    def _forget_log(self) -> None:
        if self._log is not None:
            os.close(self._log.fd)
            self._log = None

    def _send_log(self, link: Link, log: DirtyLog) -> Future[Message]:
        return link.call(Request.SET_LOG_BASE, vu.LogArea(log.size, 0).pack(), (log.fd,))

    async def _switch_log(self) -> None:
        session = self._session
        if session is None:
            return

        async def send(link: Link) -> None:
            batch = Batch()
            if self._log is not None:
                batch.add(self._send_log(link, self._log))
            batch.add(link.tell(Request.SET_FEATURES, vu.pack_u64(self._feature_bits(session))))
            for queue in session.queues:
                batch.add(link.tell(Request.SET_VRING_ADDR, self._vring_addr(queue)))
            if not link.acks:
                batch.add(link.call(Request.GET_FEATURES))
            await self._within(link, batch.wait(), "switching the dirty log")

        if session.running:
            await self._on_back_end(send)

    async def get_config(self, size: int) -> bytes:
        """The first `size` bytes of the device's configuration space. Raises ProtocolError when it has none."""

        return await self._on_back_end(lambda link: self.read_config(link, size))

    async def read_config(self, link: Link, size: int) -> bytes:
        """The same over one connection."""
        if ProtocolFeature.CONFIG not in self.protocol_features:
            raise ProtocolError(f"{self.name}: the back end offers no configuration space")
        wanted = vu.ConfigSpan(0, 0, bytes(size)).pack()
        message: Message = await self._within(link, link.call(Request.GET_CONFIG, wanted), "GET_CONFIG")
        if not message.payload:
            raise ProtocolError(f"{self.name}: the back end refuses to read {size} bytes of configuration")
        return vu.ConfigSpan.unpack(message.payload).data.ljust(size, b"\0")

    async def set_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space on behalf of the driver, now and to every successor of the back end.

        Raises ProtocolError when it is refused.
        """

        async def send(link: Link) -> None:
            payload = vu.ConfigSpan(offset, 0, data).pack()
            await self._within(link, link.tell(Request.SET_CONFIG, payload), "SET_CONFIG")

        self.keep_config(offset, data)
        if ProtocolFeature.CONFIG in self.protocol_features:
            await self._on_back_end(send)

    def keep_config(self, offset: int, data: bytes) -> None:
        """What set_config() would have to tell, for a restored device: sent with the next activation."""
        self._config_writes[offset] = data
