"""TAP descriptors that somebody else opened: their ioctls under kernel names (include/uapi/linux/if_tun.h).

None of these needs a capability but TUNSETIFF. All but TUNSETQUEUE concern the interface, whose queues the
descriptors are. A detached queue gets no packets and takes none; it answers most ioctls with EBADFD.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Final

from shared.errors import ConfigError, HostError
from shared.linux import close_fds
from shared.virtio_net import F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_UFO

TUNSETIFF: Final = 0x4004_54CA
TUNSETOFFLOAD: Final = 0x4004_54D0
TUNSETVNETHDRSZ: Final = 0x4004_54D8
TUNSETQUEUE: Final = 0x4004_54D9
IFF_TAP, IFF_MULTI_QUEUE, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0002, 0x0100, 0x0200, 0x0400
IFF_NO_PI, IFF_VNET_HDR = 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO = 1, 2, 4, 8, 16

LONGEST_NAME: Final = 15
_IFREQ: Final = struct.Struct("16sH22x")
_OFFLOADS: Final = {
    F_GUEST_CSUM: TUN_F_CSUM, F_GUEST_TSO4: TUN_F_TSO4, F_GUEST_TSO6: TUN_F_TSO6, F_GUEST_ECN: TUN_F_TSO_ECN,
    F_GUEST_UFO: TUN_F_UFO,
}  # fmt: skip


def open_tap(name: str, queues: int) -> list[int]:
    """Open or make the interface `name`, one descriptor per queue. Needs CAP_NET_ADMIN. HostError, ConfigError."""
    if len(name.encode()) > LONGEST_NAME:
        raise ConfigError(f"tap {name}: the name is longer than {LONGEST_NAME} bytes")
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            fcntl.ioctl(fds[-1], TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    except OSError as error:
        close_fds(fds)
        raise HostError(f"tap {name}: {error.strerror}") from error
    return fds


class Taps:
    """The queues of one interface. The descriptors are this object's until close()."""

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = tuple(fds)
        for fd in self.fds:
            os.set_blocking(fd, False)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = ()

    def set_header(self, size: int) -> None:
        """Bytes of vnet header before each packet. Raises HostError."""
        self._ioctl(TUNSETVNETHDRSZ, struct.pack("i", size), "vnet header size")

    def set_offloads(self, offloads: int) -> None:
        """What the guest takes: GUEST_… feature bits. Without checksums the kernel allows no segmentation either."""
        flags = sum(flag for bit, flag in _OFFLOADS.items() if offloads & bit) if offloads & F_GUEST_CSUM else 0
        self._ioctl(TUNSETOFFLOAD, flags, "offloads")

    def _ioctl(self, request: int, argument: bytes | int, what: str) -> None:
        try:
            fcntl.ioctl(self.fds[0], request, argument)
        except OSError as error:
            raise HostError(f"the TAP's {what} can't be set: {error.strerror}") from error

    def attach(self, queue: int, wanted: bool) -> None:
        """Take part in the interface's queues, or not. Harmless if it is so already."""
        flags = IFF_ATTACH_QUEUE if wanted else IFF_DETACH_QUEUE
        try:
            fcntl.ioctl(self.fds[queue], TUNSETQUEUE, _IFREQ.pack(b"", flags))
        except OSError as error:
            if error.errno != errno.EINVAL:  # which says that it is so already, or that there is but one queue
                raise HostError(f"the TAP's queue {queue} can't be switched: {error.strerror}") from error

    def send(self, header: int, frame: bytes) -> bool:
        """One frame to the host, with an empty vnet header. false: refused, the TAP is full or down."""
        try:
            os.writev(self.fds[0], (bytes(header), frame))
        except OSError:
            return False
        return True
