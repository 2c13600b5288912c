"""TAP interfaces: made or opened, and set up, by plain ioctls under their kernel names.

    tap=NAME of a TAP that exists     opened; it stays when its descriptors are closed
    tap=NAME of no interface          made under that name ─┐ not persistent: the kernel removes it with its last
    no tap=                           made as vmtapN        ─┘ descriptor, so no end of a VM leaves one behind
    fd=                               somebody else's, checked and not changed

The controller keeps its own duplicate of every descriptor, so a worker's death does not take the interface down. No
route, bridge or sysctl is touched. Sources: include/uapi/linux/if.h, if_tun.h, if_link.h, rtnetlink.h, sockios.h;
drivers/net/tun.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from controller.config.model import NetConfig
from controller.config.validate_net import mac_bytes
from shared.errors import HostError

TUN_DEVICE: Final = "/dev/net/tun"
AUTOMATIC_NAME: Final = "vmtap%d"  # the kernel puts the lowest free number in
VNET_HEADER_SIZE: Final = 12  # struct virtio_net_hdr_v1
DEFAULT_MTU: Final = 1500

IFF_TUN, IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x0002, 0x0100, 0x1000, 0x4000
IFF_UP: Final = 0x1
TUNSETIFF, TUNGETIFF, TUNSETVNETHDRSZ = 0x4004_54CA, 0x8004_54D2, 0x4004_54D8
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFADDR, SIOCSIFADDR = 0x8913, 0x8914, 0x8915, 0x8916
SIOCGIFNETMASK, SIOCSIFNETMASK, SIOCGIFMTU, SIOCSIFMTU = 0x891B, 0x891C, 0x8921, 0x8922
SIOCSIFHWADDR, SIOCGIFHWADDR, SIOCGIFINDEX, SIOCETHTOOL = 0x8924, 0x8927, 0x8933, 0x8946
ETHTOOL_GDRVINFO: Final = 0x3
ARPHRD_ETHER: Final = 1

GETLINK: Final = struct.Struct("=IHHIIBxHiII")  # struct nlmsghdr and struct ifinfomsg
ATTRIBUTE: Final = struct.Struct("=HH")  # struct rtattr
RTM_NEWLINK, RTM_GETLINK, NLM_F_REQUEST = 16, 18, 0x1
IFLA_LINKINFO, IFLA_INFO_DATA, IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES = 18, 2, 8, 9


class sockaddr(ctypes.Structure):
    _fields_ = (("sa_family", ctypes.c_ushort), ("sa_data", ctypes.c_ubyte * 14))


class ifr_ifru(ctypes.Union):
    _fields_ = (
        ("ifru_addr", sockaddr),
        ("ifru_flags", ctypes.c_ushort),
        ("ifru_mtu", ctypes.c_int),
        ("ifru_ivalue", ctypes.c_int),
        ("ifru_data", ctypes.c_void_p),
        ("ifru_map", ctypes.c_ubyte * 24),
    )


class ifreq(ctypes.Structure):
    _anonymous_ = ("ifr_ifru",)
    _fields_ = (("ifr_name", ctypes.c_char * 16), ("ifr_ifru", ifr_ifru))


class ethtool_drvinfo(ctypes.Structure):
    _fields_ = (
        ("cmd", ctypes.c_uint32),
        ("driver", ctypes.c_char * 32),
        ("version", ctypes.c_char * 32),
        ("fw_version", ctypes.c_char * 32),
        ("bus_info", ctypes.c_char * 32),
        ("rest", ctypes.c_ubyte * 64),
    )


@dataclass(frozen=True, slots=True)
class Tap:
    """`fds`: one per queue pair, the caller's. `mtu` in bytes; None when the interface's namespace can't be asked."""

    name: str
    fds: tuple[int, ...]
    mtu: int | None

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def open_tap(net: NetConfig) -> Tap:
    """The TAP of a network device, set up and running. Raises HostError; nothing is left behind or half made then."""
    if net.fds:
        return _inherited(net.fds)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fds: list[int] = []
        try:
            name = _open_queues(net, control, fds)
            _set_up(net, name, control)
            return Tap(name, tuple(fds), _ioctl(control.fileno(), SIOCGIFMTU, name).ifru_mtu)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise


def check_tap(fd: int) -> str:
    """The interface behind a descriptor that somebody gave us. Raises OSError when it is no TAP, ValueError when it is
    one that does not fit."""
    request = _ioctl(fd, TUNGETIFF)
    name, flags = str(request.ifr_name.decode(errors="replace")), request.ifru_flags
    if not flags & IFF_TAP:
        raise ValueError(f"{name} is a TUN interface, not a TAP")
    if not flags & IFF_VNET_HDR:
        raise ValueError(f"{name} was opened without vnet headers (IFF_VNET_HDR)")
    return name


def check_given(fds: Sequence[int]) -> None:
    """Descriptors that came with a request. Raises HostError for one that is no TAP, by its place in the request: their
    numbers are nobody's but ours."""
    for place, fd in enumerate(fds):
        try:
            check_tap(fd)
        except (OSError, ValueError) as error:
            raise HostError(f"fds[{place}]: {_reason(error)}", "send the descriptor of an open TAP") from error


def adopt(fds: Sequence[int]) -> Tap:
    """The TAP whose descriptors another VMM handed over; they belong to the Tap from now on. Raises HostError."""
    try:
        names = [check_tap(fd) for fd in fds]
        for fd in fds:
            os.set_blocking(fd, False)
        return Tap(names[0], tuple(fds), _mtu_behind(fds[0], names[0]))
    except (OSError, ValueError, IndexError) as error:
        for fd in fds:
            os.close(fd)
        raise HostError(f"the peer's TAP can't be used: {_reason(error)}") from error


def _inherited(fds: Sequence[int]) -> Tap:
    """`fd=`: duplicates, so that a reboot finds the originals again."""
    names = []
    for fd in fds:
        try:
            names.append(check_tap(fd))
            os.set_inheritable(fd, False)  # or every process that we start would keep the interface alive
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_SIZE))
            os.set_blocking(fd, False)
        except (OSError, ValueError) as error:
            raise HostError(
                f"--net fd={fd}: {_reason(error)}", "give the number of an open TAP that this process inherits"
            ) from error
    if len(set(names)) > 1:
        raise HostError(
            f"--net fd=[{','.join(map(str, fds))}]: these are TAPs of different interfaces, {', '.join(names)}"
        )
    return Tap(names[0], tuple(os.dup(fd) for fd in fds), _mtu_behind(fds[0], names[0]))


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.errno == errno.EBADF:
        return "this descriptor is not open"
    # What other files say to an ioctl that is not theirs; EBADFD: /dev/net/tun without an interface.
    if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EBADFD, errno.EOPNOTSUPP):
        return "this descriptor is no TAP"
    return error.strerror or str(error)


# Interfaces of our own ----------------------------------------------------------------------------------------------


def _open_queues(net: NetConfig, control: socket.socket, fds: list[int]) -> str:
    """Open one descriptor per queue pair into `fds`; the interface's name."""
    what = f"--net tap={net.tap}" if net.tap is not None else "--net"
    name = net.tap if net.tap is not None else AUTOMATIC_NAME
    kind = _kind(control, name) if net.tap is not None else None
    if kind not in (None, "tap"):
        raise HostError(
            f"{what}: this interface is no TAP", f"its driver is {kind}; name another one, or leave tap= out"
        )
    if kind is not None and _queues_in_use(name):
        # Of a TAP for one queue the kernel says so itself; one for several would share its frames out among all users.
        raise _refusal(what, errno.EBUSY)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    attempts = [flags | IFF_MULTI_QUEUE] if net.queue_pairs > 1 else [flags]
    if kind is not None and net.queue_pairs == 1:
        attempts.append(flags | IFF_MULTI_QUEUE)  # one queue of a TAP that was made for several
    for _ in range(net.queue_pairs):
        try:
            fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(
                f"{what}: {TUN_DEVICE}: {error.strerror}", "load the tun module, and allow access to it"
            ) from error
        fds.append(fd)
        name = _attach(fd, name, attempts, what)
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_SIZE))
    return name


def _attach(fd: int, name: str, attempts: list[int], what: str) -> str:
    """Join a queue to the interface, which is made if there is none."""
    for flags in attempts:
        request = ifreq(ifr_name=name.encode())
        request.ifru_flags = flags
        try:
            fcntl.ioctl(fd, TUNSETIFF, request)
        except OSError as error:
            failure = error
            if error.errno != errno.EINVAL:
                break
        else:
            return str(request.ifr_name.decode())
    raise _refusal(what, failure.errno or 0) from failure


def _refusal(what: str, number: int) -> HostError:
    why, hint = _REFUSALS.get(number, (os.strerror(number), ""))
    return HostError(f"{what}: {why}", hint)


_REFUSALS: Final = {
    errno.EBUSY: ("another process has this TAP open", "end that one, or name another TAP"),
    errno.EPERM: (
        "making a TAP needs CAP_NET_ADMIN",
        "without it, name one that was made by `ip tuntap add NAME mode tap user USER`",
    ),
    errno.EINVAL: ("this TAP was made for one queue", "make it with multi_queue, or use num_queues=2"),
}


def _set_up(net: NetConfig, name: str, control: socket.socket) -> None:
    """Addresses, MTU, up. What is so already is left alone, so that a user without privileges can use a ready TAP."""
    fd = control.fileno()

    def step(key: str, request: int, wanted: ifreq) -> None:
        try:
            fcntl.ioctl(fd, request, wanted)
        except OSError as error:
            hint = "changing an interface needs CAP_NET_ADMIN" if error.errno == errno.EPERM else ""
            raise HostError(f"--net tap={name}: {key}: {error.strerror}", hint) from error

    for key, text, get, put in (
        ("ip", net.ip, SIOCGIFADDR, SIOCSIFADDR),
        ("mask", net.mask, SIOCGIFNETMASK, SIOCSIFNETMASK),
    ):
        if text is not None and _ipv4(fd, get, name) != (address := socket.inet_aton(text)):
            step(f"{key}={text}", put, _with_address(name, socket.AF_INET, bytes(2) + address))
    if net.host_mac is not None and _mac(fd, name) != (mac := mac_bytes(net.host_mac)):
        assert mac is not None
        step(f"host_mac={net.host_mac}", SIOCSIFHWADDR, _with_address(name, ARPHRD_ETHER, mac))
    if net.mtu is not None and _ioctl(fd, SIOCGIFMTU, name).ifru_mtu != net.mtu:
        request = ifreq(ifr_name=name.encode())
        request.ifru_mtu = net.mtu
        step(f"mtu={net.mtu}", SIOCSIFMTU, request)
    request = _ioctl(fd, SIOCGIFFLAGS, name)
    if not request.ifru_flags & IFF_UP:
        request.ifru_flags |= IFF_UP
        step("up", SIOCSIFFLAGS, request)


def _with_address(name: str, family: int, data: bytes) -> ifreq:
    request = ifreq(ifr_name=name.encode())
    request.ifru_addr.sa_family = family
    request.ifru_addr.sa_data[: len(data)] = data
    return request


# Asking -------------------------------------------------------------------------------------------------------------


def _ioctl(fd: int, number: int, name: str = "") -> ifreq:
    request = ifreq(ifr_name=name.encode())
    fcntl.ioctl(fd, number, request)
    return request


def _mac(fd: int, name: str = "") -> bytes:
    """By a socket and a name, or by a TAP's own descriptor."""
    return bytes(_ioctl(fd, SIOCGIFHWADDR, name).ifru_addr.sa_data[:6])


def _ipv4(fd: int, number: int, name: str) -> bytes | None:
    """None: it has no address."""
    try:
        return bytes(_ioctl(fd, number, name).ifru_addr.sa_data[2:6])
    except OSError:
        return None


def _kind(control: socket.socket, name: str) -> str | None:
    """What an interface is: "tap", another driver's name, or None when there is none."""
    try:
        request = _ioctl(control.fileno(), SIOCGIFINDEX, name)
    except OSError:
        return None
    info = ethtool_drvinfo(cmd=ETHTOOL_GDRVINFO)
    request = ifreq(ifr_name=name.encode())
    request.ifru_data = ctypes.addressof(info)
    try:
        fcntl.ioctl(control.fileno(), SIOCETHTOOL, request)
    except OSError:
        return "none of its own"  # such as lo
    driver = info.driver.decode()
    return str(info.bus_info.decode()) if driver == "tun" else str(driver)


def _queues_in_use(name: str) -> int:
    """Of a TAP that was made for several; 0 of any other interface."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
        try:
            index = socket.if_nametoindex(name)
            route.send(GETLINK.pack(GETLINK.size, RTM_GETLINK, NLM_F_REQUEST, 0, 0, 0, 0, index, 0, 0))
            answer = route.recv(1 << 16, socket.MSG_DONTWAIT)  # it is there when send() returns
        except OSError:  # the interface has gone meanwhile
            return 0
    if GETLINK.unpack_from(answer)[1] != RTM_NEWLINK:
        return 0
    data = answer[GETLINK.size :]
    for kind in (IFLA_LINKINFO, IFLA_INFO_DATA):
        data = _attributes(data).get(kind, b"")
    tun = _attributes(data)
    counts = (tun.get(kind, b"") for kind in (IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES))
    return sum(int.from_bytes(count, sys.byteorder) for count in counts)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= ATTRIBUTE.size:
        size, kind = ATTRIBUTE.unpack_from(data)
        found[kind] = data[ATTRIBUTE.size : size]
        data = data[max(size, ATTRIBUTE.size) + 3 & ~3 :]
    return found


def _mtu_behind(fd: int, name: str) -> int | None:
    """MTU of a TAP that we did not open: only sockets can be asked, and ours may be in another namespace, where that
    name is another interface's or nobody's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        try:
            if _mac(fd) == _mac(control.fileno(), name):
                return int(_ioctl(control.fileno(), SIOCGIFMTU, name).ifru_mtu)
        except OSError:
            pass
    return None
