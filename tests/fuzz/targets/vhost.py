"""Both ends of vhost-user, each with a peer that says anything; and the Python ring with a hostile driver."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator

from controller.pci.virtio import Virtqueue
from controller.vhost_frontend import Frontend
from shared import vhost_user as vu
from shared.errors import FlotillaError
from shared.linux import memfd, recv_fds, send_fds
from shared.memory import GuestMemory
from shared.reactor import Reactor, Task
from shared.vhost_backend import Server
from shared.vhost_user import Message, Request
from tests.echo_backend import FEATURES, Echo, drained
from tests.fuzz.choices import Choices
from tests.fuzz.engine import Target
from tests.fuzz.turns import settle

SIZE = 1 << 16
UVA = 0x7000_0000_0000


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class Files:
    """Descriptors that a peer may pass: a memfd of guest RAM, a short one, an eventfd, a socket, a directory."""

    def __init__(self) -> None:
        self.ram = memfd("fuzz-ram", SIZE)
        self.short = memfd("fuzz-short", 4096)
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ours, self.theirs = socket.socketpair()
        self.folder = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.all = (self.ram, self.ram, self.event, self.event, self.short, self.theirs.fileno(), self.folder)

    def close(self) -> None:
        for fd in (self.ram, self.short, self.event, self.folder):
            os.close(fd)
        self.ours.close()
        self.theirs.close()


# The back end: a front end says anything -------------------------------------------------------------------------


def payload_of(request: int, choices: Choices) -> bytes:
    """What belongs to the request, with some of its numbers out of all bounds."""

    def number(usual: int, bits: int = 64) -> int:
        return usual if choices.below(8) else choices.number(bits)

    queue = number(choices.below(3), 32)
    match request:
        case Request.SET_MEM_TABLE:
            regions = [vu.MemoryRegion(number(0x10000 * n), number(SIZE), number(UVA + 0x10000 * n), number(0))
                       for n in range(choices.below(3))]  # fmt: skip
            return vu.pack_regions(regions)
        case Request.ADD_MEM_REG | Request.REM_MEM_REG:
            gpa = 0x10000 * choices.below(3)
            return vu.MemoryRegion(number(gpa), number(SIZE), number(UVA + gpa), number(0)).pack_single()
        case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.GET_VRING_BASE | Request.SET_VRING_ENABLE:
            return vu.VringState(queue, number(choices.one_of((0, 1, 16, 256)), 32)).pack()
        case Request.SET_VRING_ADDR:
            base = UVA + 0x4000 * choices.below(3)
            addresses = (number(base), number(base + 0x1000), number(base + 0x2000), number(0x1000))
            return vu.VringAddr(queue, number(choices.below(2), 32), *addresses).pack()
        case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
            return vu.pack_u64(number(queue | (vu.VRING_NOFD if not choices.below(6) else 0)))
        case Request.SET_LOG_BASE:
            return vu.LogArea(number(choices.one_of((8, 4096))), number(0)).pack()
        case Request.GET_CONFIG | Request.SET_CONFIG:
            return struct.pack("=III", number(choices.below(20), 32), number(8, 32), 0) + bytes(8)
        case Request.GET_INFLIGHT_FD | Request.SET_INFLIGHT_FD:
            area = (number(SIZE), number(0), number(choices.below(4), 16), number(16, 16))
            return vu.InflightArea(*area).pack()
        case Request.SET_FEATURES:
            return vu.pack_u64(number(FEATURES | choices.below(2) << 26 | choices.below(2) << 30))
        case Request.SET_PROTOCOL_FEATURES:
            return vu.pack_u64(number(choices.number(20) & 0x9A4B))
        case _:
            return vu.pack_u64(choices.number(64)) if choices.flag() else b""


USUAL = (
    Request.SET_MEM_TABLE, Request.SET_VRING_NUM, Request.SET_VRING_ADDR, Request.SET_VRING_KICK,
    Request.SET_VRING_CALL, Request.SET_VRING_ENABLE, Request.SET_FEATURES, Request.SET_PROTOCOL_FEATURES,
    Request.SET_INFLIGHT_FD, Request.SET_LOG_BASE, Request.ADD_MEM_REG,
)  # fmt: skip
WITH_FD = {
    Request.SET_VRING_KICK: 2, Request.SET_VRING_CALL: 2, Request.SET_VRING_ERR: 2, Request.ADD_MEM_REG: 0,
    Request.SET_LOG_BASE: 0, Request.SET_INFLIGHT_FD: 0, Request.SET_BACKEND_REQ_FD: 5,
}  # fmt: skip


class BackendRig:
    """One server with a device that reverses what it reads, and rings full of the fuzzer's bytes."""

    def __init__(self, files: Files, reactor: Reactor) -> None:
        self.files, self.reactor = files, reactor

    def run(self, data: bytes) -> None:
        """Nothing of the inputs before is left in the files, so that a finding shows again."""
        os.pwrite(self.files.ram, bytes(SIZE), 0)
        drained(self.files.event)
        choices = Choices(data)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        server = Server(self.reactor, theirs, Echo(self.reactor))
        before, watched = open_fds(), set(self.reactor._readers)
        try:
            while choices.left and server.connected:
                self.step(choices, ours)
                settle(self.reactor, 2)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    while ours.recv(4096):
                        pass
            if server.connected:
                self.hangs_up_on_nonsense(ours, server)
        finally:
            server.close()
            settle(self.reactor)
            ours.close()
        assert open_fds() <= before, "descriptors were left open"
        assert set(self.reactor._readers) <= watched, "descriptors are watched that nobody has"

    def step(self, choices: Choices, sock: socket.socket) -> None:
        kind = choices.below(16)
        if kind == 0:
            with contextlib.suppress(OSError):
                sock.send(choices.bytes(choices.below(40)))
            return
        if kind == 1:
            os.pwrite(self.files.ram, choices.bytes(choices.below(64)), choices.below(SIZE - 64))
            return
        if kind == 2:
            os.pwrite(self.files.ram, struct.pack("<HHH", 0, choices.number(16) & 31, choices.below(16)), 0x2000)
            os.eventfd_write(self.files.event, 1)
            return
        request = choices.one_of(USUAL) if kind < 12 else choices.one_of(list(Request))
        count = 2 if request == Request.SET_MEM_TABLE else int(request in WITH_FD)
        fds = [self.files.all[WITH_FD.get(request, 0)] if choices.below(8) else choices.one_of(self.files.all)
               for _ in range(count if choices.below(10) else choices.below(10))]  # fmt: skip
        flags = vu.VERSION | (vu.NEED_REPLY if choices.below(3) else 0)
        message = Message(request, payload_of(request, choices), flags)
        if request == Request.SET_MEM_TABLE:
            fds = fds[: len(message.payload) // 32]
        with contextlib.suppress(OSError):
            send_fds(sock, message.pack(), tuple(fds))

    def hangs_up_on_nonsense(self, sock: socket.socket, server: Server) -> None:
        """So it still listens. Zeros that end a message which may be half sent, and one more header of them."""
        with contextlib.suppress(ConnectionError):
            sock.send(bytes(vu.HEADER_SIZE + vu.MAX_PAYLOAD + vu.HEADER_SIZE))
        settle(self.reactor)
        assert not server.connected, "it does not listen any more"


def vhost_backend() -> Iterator[Callable[[bytes], None]]:
    files, reactor = Files(), Reactor()
    try:
        yield BackendRig(files, reactor).run
    finally:
        reactor.close()
        files.close()


# The front end: a back end says anything -------------------------------------------------------------------------


class FrontendRig:
    """A front end with two rings, whose back end is the input."""

    def __init__(self, files: Files, reactor: Reactor) -> None:
        self.files, self.reactor = files, reactor
        self.memory = GuestMemory.create(4 << 20)
        self.queues = tuple(
            Virtqueue(n, 16, 0x1000 + 0x4000 * n, 0x2000 + 0x4000 * n, 0x3000 + 0x4000 * n, files.event, files.event)
            for n in range(2)
        )

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        before = open_fds()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        front = Frontend(self.reactor, self.memory, "_disk0", own=choices.flag())
        lost: list[Exception | None] = []
        front.on_lost = lost.append
        task = self.reactor.spawn(self.life(front, ours), "life")
        try:
            turns = 0
            while not task.done() and turns < 200:
                turns += 1
                settle(self.reactor, 1)
                if not self.answer(choices, theirs) or not choices.left:
                    theirs.close()
            theirs.close()
            settle(self.reactor)
            front.give_up(FlotillaError("no successor comes"))
            self.finish(task)
        finally:
            theirs.close()
            front.close()
            settle(self.reactor)
            task.cancel()
            settle(self.reactor)
        assert open_fds() <= before, "descriptors were left open"

    def finish(self, task: Task[None]) -> None:
        for _ in range(20):
            if task.done():
                break
            settle(self.reactor, 1)
        assert task.done(), "the back end is gone, and somebody waits for it"
        task.result()

    async def life(self, front: Frontend, sock: socket.socket) -> None:
        with contextlib.suppress(FlotillaError):
            await front.connect(sock)
            with contextlib.suppress(FlotillaError):
                await front.get_config(60)
            await front.activate(FEATURES, self.queues)
            with contextlib.suppress(FlotillaError):
                await front.set_config(0, b"\1")
            await front.start_logging(self.files.ram, 4096)
            await front.stop(1.0)
            await front.resume()
            await front.reset()

    def answer(self, choices: Choices, sock: socket.socket) -> bool:
        """Read requests and answer them; False to hang up."""
        try:
            data, fds = recv_fds(sock, 12)
            for fd in fds:
                os.close(fd)
            if len(data) < 12:
                return False
            request, flags, size = struct.unpack("=III", data)
            if size:
                sock.recv(size)
        except BlockingIOError:
            return True
        except OSError:
            return False
        wants = flags & vu.NEED_REPLY or request in (1, 6, 11, 15, 17, 24, 31)
        if not wants:
            return True
        body = self.reply_to(request, choices) if choices.below(12) else choices.bytes(choices.below(40))
        number = request if choices.below(16) else choices.below(45)
        out = Message(number, body, vu.VERSION | (vu.REPLY if choices.below(16) else 0))
        passed = (self.files.ram,) if request == 31 and choices.below(4) else ()
        if not choices.below(12):
            passed = tuple(choices.one_of(self.files.all) for _ in range(choices.below(4)))
        try:
            send_fds(sock, out.pack() if choices.below(16) else out.pack()[: choices.below(20)], passed)
        except OSError:
            return False
        return bool(choices.below(32))

    def reply_to(self, request: int, choices: Choices) -> bytes:
        match request:
            case Request.GET_FEATURES:
                return vu.pack_u64((FEATURES | 1 << 26 | 1 << 30) if choices.below(8) else choices.number(64))
            case Request.GET_PROTOCOL_FEATURES:
                return vu.pack_u64(0x1 | 0x2 | 0x8 | 0x20 | 0x200 | 0x1000 if choices.flag() else choices.number(64))
            case Request.GET_QUEUE_NUM:
                return vu.pack_u64(choices.one_of((0, 1, 2, 1 << 40)))
            case Request.GET_VRING_BASE:
                return vu.VringState(choices.below(2), choices.number(32)).pack()
            case Request.GET_CONFIG:
                return vu.ConfigSpan(0, 0, choices.bytes(choices.one_of((0, 1, 60, 60, 200)))).pack()
            case Request.GET_INFLIGHT_FD:
                return vu.InflightArea(choices.number(32), choices.number(32), 2, choices.number(16)).pack()
            case _:
                return vu.pack_u64(0 if choices.below(8) else choices.number(64))

    def close(self) -> None:
        self.memory.close()


def vhost_frontend() -> Iterator[Callable[[bytes], None]]:
    files, reactor = Files(), Reactor()
    rig = FrontendRig(files, reactor)
    try:
        yield rig.run
    finally:
        rig.close()
        reactor.close()
        files.close()


TARGETS = (
    Target("vhost_backend", vhost_backend, about="a vhost-user server whose front end and rings are hostile"),
    Target("vhost_frontend", vhost_frontend, about="the VMM's side of vhost-user with a back end that lies"),
)
