"""A vhost-user front end of our own, synchronous and small, for a back end in another process."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from shared import vhost_user as vu
from shared.linux import recv_fds, send_fds
from shared.vhost_user import (
    ConfigSpan,
    InflightArea,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VringAddr,
)
from tests.ring_driver import GPA, Memory, RingDriver

UVA = 0x7000_0000_0000  # where this front end claims to have guest memory: only the back end's arithmetic sees it
WANTED = (
    ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.LOG_SHMFD
)  # fmt: skip


def connect(path: Path, seconds: float = 20.0) -> socket.socket:
    """Connect as soon as somebody listens."""
    deadline = time.monotonic() + seconds
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
            sock.settimeout(seconds)
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            assert time.monotonic() < deadline, f"nobody listens on {path}"
            time.sleep(0.005)  # there is no event for a socket that appears


class Frontend:
    """One connection. `inflight` is None for the first one; what it becomes is handed to the next."""

    def __init__(
        self,
        sock: socket.socket,
        memory: Memory,
        drivers: Sequence[RingDriver],
        inflight: bytes | None = None,
        inflight_fd: int = -1,
    ) -> None:
        self.sock = sock
        self.memory = memory
        self.drivers = drivers
        self.send(Request.SET_OWNER)
        self.features = vu.unpack_u64(self.ask(Request.GET_FEATURES))
        protocol = vu.unpack_u64(self.ask(Request.GET_PROTOCOL_FEATURES))
        assert protocol & WANTED == WANTED
        self.send(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(WANTED))
        self.acked = self.features & ~vu.VHOST_F_LOG_ALL
        self.send(Request.SET_FEATURES, vu.pack_u64(self.acked))
        regions = [MemoryRegion(GPA, memory.size, UVA, 0)]
        self.send(Request.SET_MEM_TABLE, vu.pack_regions(regions), [memory.fd])
        if inflight is None:
            wanted = InflightArea(0, 0, len(drivers), drivers[0].size).pack()
            inflight, fds = self.ask_with_fds(Request.GET_INFLIGHT_FD, wanted)
            (inflight_fd,) = fds
        self.inflight, self.inflight_fd = inflight, inflight_fd
        self.send(Request.SET_INFLIGHT_FD, inflight, [inflight_fd])

    def send(self, request: Request, payload: bytes = b"", fds: list[int] | None = None) -> None:
        send_fds(self.sock, Message(request, payload).pack(), fds or [])

    def ask_with_fds(self, request: Request, payload: bytes = b"") -> tuple[bytes, list[int]]:
        self.send(request, payload)
        data, fds = recv_fds(self.sock, 12)
        number, _flags, size = struct.unpack("=III", data)
        assert number == request
        body = b""
        while len(body) < size:
            part = self.sock.recv(size - len(body))
            assert part, "the back end has closed the connection"
            body += part
        return body, fds

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        body, fds = self.ask_with_fds(request, payload)
        assert not fds
        return body

    def start(self, driver: RingDriver, base: int) -> None:
        index = driver.index
        self.send(Request.SET_VRING_NUM, vu.VringState(index, driver.size).pack())
        shift = UVA - GPA
        addr = VringAddr(index, 0, driver.desc + shift, driver.used + shift, driver.avail + shift, 0)
        self.send(Request.SET_VRING_ADDR, addr.pack())
        self.send(Request.SET_VRING_BASE, vu.VringState(index, base).pack())
        self.send(Request.SET_VRING_CALL, vu.pack_u64(index), [driver.call_fd])
        self.send(Request.SET_VRING_KICK, vu.pack_u64(index), [driver.kick_fd])
        self.send(Request.SET_VRING_ENABLE, vu.VringState(index, 1).pack())

    def stop(self, driver: RingDriver) -> int:
        """The next avail index; everything in flight is done."""
        return vu.VringState.unpack(self.ask(Request.GET_VRING_BASE, vu.VringState(driver.index, 0).pack())).num

    def config(self, size: int = 60) -> bytes:
        return ConfigSpan.unpack(self.ask(Request.GET_CONFIG, ConfigSpan(0, 0, bytes(size)).pack())).data

    def close(self, keep_inflight: bool = False) -> None:
        self.sock.close()
        if not keep_inflight:
            os.close(self.inflight_fd)
