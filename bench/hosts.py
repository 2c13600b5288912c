"""Two hosts and the network around them, each a network namespace, for migrations between them.

      one ─────── wire, 10.99.0.0/24 ─────── two       migrations
    tap0 │                                    │ tap0    the guest's card, on either host
      br0 ─ lan ───── br0 of `lan` ───── lan ─ br0      one L2 network: guests' 10.98.0.0/24

The namespaces have names, since VMMs are started in them by `ip netns exec`; close() removes them and what is in them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import Final

from bench.wire import CLONE_NEWNET, ip
from shared.linux import check, libc

TAP: Final = "tap0"
LAN, GUEST = "10.98.0.1", "10.98.0.2"
ADDRESSES: Final = {"one": "10.99.0.1", "two": "10.99.0.2"}


class Hosts:
    """The two and the wire between them. Raises BenchError, also for a lack of privileges."""

    NAMES: tuple[str, ...] = tuple(ADDRESSES)

    def __init__(self) -> None:
        self.names = {host: f"fl{os.getpid()}{host}" for host in self.NAMES}
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        for name in self.names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        self._wire()
        for host, address in ADDRESSES.items():
            ip("-n", self.names[host], "addr", "add", f"{address}/24", "dev", "wire")

    def _wire(self) -> None:
        self._join("one", "wire", "two", "wire")

    def _join(self, here: str, end: str, there: str, other: str) -> None:
        """A cable between two hosts, and the names of its ends."""
        one, two = self.names[here], self.names[there]
        ip("-n", one, "link", "add", end, "type", "veth", "peer", "name", other, "netns", two)
        ip("-n", one, "link", "set", end, "up")
        ip("-n", two, "link", "set", other, "up")

    def cable(self, state: str) -> None:
        """`down`: the wire is pulled; `up`."""
        ip("-n", self.names["one"], "link", "set", "wire", state)

    def command(self, host: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *words]

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """What is started meanwhile, and the sockets that are made, live on that host."""
        with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{self.names[host]}") as theirs:
            check(libc.setns(theirs.fileno(), CLONE_NEWNET), "setns")
            try:
                yield
            finally:
                check(libc.setns(ours.fileno(), CLONE_NEWNET), "setns")

    def close(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class BridgedHosts(Hosts):
    """The same with the guests' network, and a third host on it from which a guest is watched."""

    NAMES = (*ADDRESSES, "lan")

    def _make(self) -> None:
        super()._make()
        for name in self.names.values():
            ip("-n", name, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
            ip("-n", name, "link", "set", "br0", "up")
        for host in ADDRESSES:
            name, port = self.names[host], f"to-{host}"
            self._join(host, "lan", "lan", port)
            ip("-n", self.names["lan"], "link", "set", port, "master", "br0")
            ip("-n", name, "tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
            for each in ("lan", TAP):
                ip("-n", name, "link", "set", each, "master", "br0", "up")
        ip("-n", self.names["lan"], "addr", "add", f"{LAN}/24", "dev", "br0")
