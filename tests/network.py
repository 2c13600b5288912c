"""A TAP in a network namespace of the test's own, and sockets that see every frame on it.

The namespace has no name: it goes with the last descriptor that belongs to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from net_worker.tap import open_tap
from tests.vmm import SECONDS, poll

CLONE_NEWNET = 0x4000_0000
TUNSETSNDBUF, SIOCGIFHWADDR = 0x4004_54D4, 0x8927
SOL_PACKET, PACKET_VNET_HDR = 263, 15
ETH_P_ALL = 3
HEADER = struct.Struct("<BBHHHH")  # struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def free_port(host: str = "127.0.0.1") -> int:
    """Of tcp, a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


class Network:
    """One namespace with one TAP interface `tap0`, up, without an address, quiet (no IPv6)."""

    NAME = "tap0"

    def __init__(self, queues: int = 1, address: str = "", mtu: int = 1500, *, opened: bool = True) -> None:
        """`opened` false: the interface is there for somebody else to open by its name."""
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _check(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
        try:
            self._inside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
            self.fds: list[int] = []
            if opened:
                self.fds = open_tap(self.NAME, queues)
            else:
                several = ["multi_queue"] if queues > 1 else []
                self.ip("tuntap", "add", self.NAME, "mode", "tap", "vnet_hdr", *several)
            self.ip("link", "set", self.NAME, "up", "mtu", str(mtu))
            if address:
                self.ip("address", "add", address, "dev", self.NAME)
        finally:
            self._go(self._home)

    @staticmethod
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, timeout=20)

    @staticmethod
    def tc(*arguments: str) -> None:
        subprocess.run(["tc", *arguments], check=True, timeout=20)

    @staticmethod
    def _go(fd: int) -> None:
        _check(_libc.setns(fd, CLONE_NEWNET), "setns")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and the processes and sockets that it makes, are in the namespace."""
        self._go(self._inside)
        try:
            yield
        finally:
            self._go(self._home)

    def mac(self) -> bytes:
        """The interface's own address on the host's side."""
        with self.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            answer = fcntl.ioctl(control, SIOCGIFHWADDR, self.NAME.encode().ljust(40, b"\0"))
        return answer[18:24]

    def choke(self, send_buffer: int) -> None:
        """What the guest sends goes through a slow queue, and the TAP takes only `send_buffer` bytes in advance."""
        fcntl.ioctl(self.fds[0], TUNSETSNDBUF, struct.pack("i", send_buffer))
        with self.inside():
            self.ip("link", "add", "slow", "type", "veth", "peer", "name", "sink")
            self.ip("link", "set", "sink", "up")
            self.ip("link", "set", "slow", "up")
            self.tc("qdisc", "add", "dev", "slow", "root", "tbf", "rate", "400kbit", "burst", "1600", "latency", "10s")
            self.ip("link", "add", "bridge", "type", "bridge", "mcast_snooping", "0")
            self.ip("link", "set", "bridge", "up")
            for name in (self.NAME, "slow"):
                self.ip("link", "set", name, "master", "bridge")
            # A port takes part when the kernel has heard of its carrier; until then what comes by it is dropped.
            poll(lambda: all(self._forwards(name) for name in (self.NAME, "slow")))

    @staticmethod
    def _forwards(port: str) -> bool:
        shown = subprocess.run(["ip", "-d", "link", "show", port], check=True, timeout=20, capture_output=True)
        return b"state forwarding" in shown.stdout

    def fds_for_a_worker(self) -> list[int]:
        """Duplicates that become somebody else's; the interface lives on ours."""
        return [os.dup(fd) for fd in self.fds]

    def wire(self, *, vnet_header: bool = False) -> Wire:
        with self.inside():
            return Wire(self.NAME, vnet_header)

    def datagram(self, port: int) -> socket.socket:
        """A bound UDP socket of the namespace."""
        with self.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("", port))
        sock.settimeout(SECONDS)
        return sock

    def close(self) -> None:
        for fd in (*self.fds, self._inside, self._home):
            os.close(fd)


class Wire:
    """Every frame that the guest sends, and a way to send it some. With `vnet_header` 10 bytes stand before each."""

    def __init__(self, name: str, vnet_header: bool) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        if vnet_header:
            self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.bind((name, 0))
        self.socket.settimeout(SECONDS)

    def send(self, frame: bytes) -> None:
        self.socket.send(frame)

    def receive(self) -> bytes:
        """The next frame from the guest."""
        while True:
            data, (_, _, kind, *_) = self.socket.recvfrom(1 << 17)
            if kind != socket.PACKET_OUTGOING:  # our own, on its way to the guest
                return data

    def silent(self) -> bool:
        """Whether no frame from the guest is there to be received."""
        while select.select([self.socket], [], [], 0)[0]:
            if self.socket.recvfrom(1 << 17, socket.MSG_PEEK)[1][2] != socket.PACKET_OUTGOING:
                return False
            self.socket.recv(1)
        return True

    def close(self) -> None:
        self.socket.close()


# Frames ---------------------------------------------------------------------------------------------------------

GUEST_MAC, HOST_MAC = bytes.fromhex("525400123456"), bytes.fromhex("020000000001")
ETHERTYPE = 0x88B5  # for local experiments


def frame(number: int, size: int = 100, *, to_guest: bool = False) -> bytes:
    """A frame that no stack answers and that says its number."""
    to, by = (GUEST_MAC, HOST_MAC) if to_guest else (HOST_MAC, GUEST_MAC)
    head = to + by + ETHERTYPE.to_bytes(2, "big") + number.to_bytes(4, "big")
    body = (number.to_bytes(4, "little") * (size // 4 + 1))[: size - len(head)]
    return head + body


def number_of(data: bytes) -> int:
    return int.from_bytes(data[14:18], "big")


def checksum(data: bytes, start: int = 0) -> int:
    """The Internet checksum's sum, not complemented (RFC 1071)."""
    total: int = start + sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & -2]))
    if len(data) % 2:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4(protocol: int, source: str, target: str, payload: bytes, *, to_guest: bool) -> bytes:
    to, by = (GUEST_MAC, HOST_MAC) if to_guest else (HOST_MAC, GUEST_MAC)
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0x4000, 64, protocol, 0) + addresses
    head = head[:10] + (0xFFFF ^ checksum(head)).to_bytes(2, "big") + head[12:]
    return to + by + b"\x08\x00" + head + payload


def pseudo_header(protocol: int, source: str, target: str, size: int) -> int:
    """The sum that a sender leaves in the checksum field when it leaves the rest to the device."""
    return checksum(socket.inet_aton(source) + socket.inet_aton(target) + struct.pack(">HH", protocol, size))


def tcp_to_segment(source: str, target: str, data: bytes, *, to_guest: bool) -> bytes:
    """A TCP segment of any size with only the pseudo header summed, as TSO wants it."""
    partial = pseudo_header(6, source, target, 20 + len(data))
    head = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 5 << 4, 0x10, 65535, partial, 0)
    return ipv4(6, source, target, head + data, to_guest=to_guest)
