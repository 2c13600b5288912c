"""Does a NetConfig make sense, alone and beside the others? Nothing here looks at the host (`controller.taps` does)."""

from __future__ import annotations

import os

from controller.config.model import NetConfig, VhostMode
from shared.errors import ConfigError

MAX_TAP_NAME = 15  # IFNAMSIZ with its NUL
MIN_MTU = 1280  # of virtio 1.2, section 5.1.4.1: what IPv6 needs
MAX_MTU = 65535 - 14  # the kernel's limit for a TAP, whose packets have an Ethernet header
MAX_QUEUE_SIZE = 1 << 15
FIRST_FD = 3  # below are standard input, output and error


def validate_nets(nets: tuple[NetConfig, ...], boot_vcpus: int) -> None:
    """Raises ConfigError."""
    for index, net in enumerate(nets):
        _net(f"net[{index}] (--net {_sketch(net)})", net, boot_vcpus)
    _unique(nets)


def mac_bytes(text: str) -> bytes | None:
    """The 6 bytes of `12:34:56:78:90:ab`, None for what is no address of one station."""
    parts = text.split(":")
    if len(parts) != 6 or not all(len(part) == 2 and part.isalnum() for part in parts):
        return None
    try:
        address = bytes.fromhex("".join(parts))
    except ValueError:
        return None
    return address if any(address) and not address[0] & 1 else None


def _sketch(net: NetConfig) -> str:
    """Enough of a `--net` value to tell which one is meant."""
    for key, value in (("tap", net.tap), ("fd", net.fds), ("socket", net.vhost_socket), ("ip", net.ip)):
        if value:
            return f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
    return f"id={net.id}" if net.id else ""


def _net(name: str, net: NetConfig, boot_vcpus: int) -> None:
    _queues(name, net, boot_vcpus)
    for key, address in (("mac", net.mac), ("host_mac", net.host_mac)):
        if address is not None and mac_bytes(address) is None:
            raise ConfigError(
                f"{name}: {key} {address!r} is no address of a network card",
                "six bytes such as 2e:34:56:78:90:ab, the first one even",
            )
    if net.mtu is not None and not MIN_MTU <= net.mtu <= MAX_MTU:
        raise ConfigError(f"{name}: mtu is {net.mtu}", f"{MIN_MTU} to {MAX_MTU}")
    _addresses(name, net)
    _tap_name(name, net)
    _host_side(name, net)


def _queues(name: str, net: NetConfig, boot_vcpus: int) -> None:
    if net.num_queues < 2 or net.num_queues % 2:
        raise ConfigError(
            f"{name}: num_queues is {net.num_queues}", "an even number from 2: each rx queue has its tx queue"
        )
    if net.queue_pairs > boot_vcpus:
        raise ConfigError(
            f"{name}: num_queues is {net.num_queues}",
            f"at most two for each vCPU, {2 * boot_vcpus}",
        )
    size = net.queue_size
    if not 2 < size <= MAX_QUEUE_SIZE or size & (size - 1):
        raise ConfigError(f"{name}: queue_size is {size}", f"a power of two from 4 to {MAX_QUEUE_SIZE}")


def _addresses(name: str, net: NetConfig) -> None:
    if net.mask is not None and net.ip is None:
        raise ConfigError(f"{name}: a mask without an ip", "add ip=ADDRESS, or leave mask out")
    for key, text in (("ip", net.ip), ("mask", net.mask)):
        if text is None:
            continue
        if ":" in text:
            raise ConfigError(f"{name}: {key} {text}: IPv6 is not available yet in this version of Flotilla")
        try:
            import socket

            value = int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big")
        except (OSError, ValueError):
            raise ConfigError(
                f"{name}: {key} {text!r} is no IPv4 address", "four numbers such as 192.168.100.1"
            ) from None
        hosts = value ^ 0xFFFF_FFFF
        if key == "mask" and (not value or hosts & (hosts + 1)):
            raise ConfigError(f"{name}: mask {text} is no network mask", "ones, then zeros, such as 255.255.255.0")


def _tap_name(name: str, net: NetConfig) -> None:
    if net.tap is None:
        return
    encoded = os.fsencode(net.tap)
    if len(encoded) > MAX_TAP_NAME:
        raise ConfigError(
            f"{name}: tap {net.tap!r} has {len(encoded)} bytes",
            f"a network interface's name has at most {MAX_TAP_NAME}",
        )
    bad = not net.tap.isprintable() or any(character in "/: %" for character in net.tap)
    if not encoded or bad or net.tap in (".", ".."):
        raise ConfigError(
            f"{name}: tap {net.tap!r} is no name of a network interface",
            "without tap= one is made, vmtap0 or the next that is free",
        )


def _host_side(name: str, net: NetConfig) -> None:
    """A TAP of ours, descriptors, or a vhost-user socket: what belongs to another kind is refused, not ignored."""
    if net.fds:
        _descriptors(name, net)
    if not net.vhost_user:
        if net.vhost_socket is not None:
            raise ConfigError(f"{name}: a socket without vhost_user", "add vhost_user=on")
        return
    if not net.vhost_socket:
        raise ConfigError(f"{name}: vhost_user needs a socket", "add socket=PATH")
    if net.vhost_mode is VhostMode.SERVER:
        raise ConfigError(
            f"{name}: vhost_mode server is not available yet in this version of Flotilla",
            "let the back end listen, and leave vhost_mode out",
        )
    if net.queue_pairs > 1:
        raise ConfigError(
            f"{name}: vhost_user with {net.num_queues} queues is not available yet in this version of Flotilla",
            "leave num_queues out",
        )
    given = {"tap": net.tap, "ip": net.ip, "host_mac": net.host_mac, "fds": net.fds}
    for key, value in given.items():
        if value:
            raise ConfigError(f"{name}: {key} has no meaning with vhost_user", "the back end decides; leave it out")


def _descriptors(name: str, net: NetConfig) -> None:
    given = {"tap": net.tap, "ip": net.ip, "host_mac": net.host_mac}
    for key, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name}: {key} and fd at once", "whoever opened the descriptor has set its interface up"
            )
    for fd in net.fds:
        if fd < FIRST_FD:
            raise ConfigError(f"{name}: fd={fd} is standard input, output or error", f"{FIRST_FD} or more")
    if len(net.fds) != net.queue_pairs:
        raise ConfigError(
            f"{name}: {len(net.fds)} descriptors and num_queues={net.num_queues}", "two queues for each descriptor"
        )


def _unique(nets: tuple[NetConfig, ...]) -> None:
    """One interface, descriptor or MAC can't be two devices'."""
    owners: dict[tuple[str, object], str] = {}
    for index, net in enumerate(nets):
        claims: list[tuple[str, object]] = [("fd", fd) for fd in net.fds]
        if net.tap is not None:
            claims.append(("tap", net.tap))
        if net.mac is not None:
            claims.append(("mac", net.mac.lower()))
        for key, value in claims:
            if (key, value) in owners:
                raise ConfigError(f"net[{index}]: {key} {value} is taken", f"{owners[key, value]} has it already")
            owners[key, value] = f"net[{index}]"
