"""QEMU as the front end: `-netdev vhost-user`, with iPXE's own virtio-net driver asking for an address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from guest.lines import Bad, NetOk, NetOpen
from tests.guest.conftest import Machine
from tests.net_worker.test_recovery import spawn
from tests.netpeer import Flow, ping
from tests.network import GUEST_MAC, Network, Wire, ipv4
from tests.vmm import SECONDS, until_socket

QEMU = "qemu-system-x86_64"
MAC = GUEST_MAC.hex(":")
HOST, GUEST = "192.168.249.1", "192.168.249.2"  # the probe guest's own
SERVER, LEASE = "10.9.8.1", "10.9.8.77"
DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
MAGIC = bytes((99, 130, 83, 99))
ROMS = [Path("/usr/lib/ipxe/qemu/pxe-virtio.rom"), Path("/usr/share/qemu/pxe-virtio.rom")]

NO_KVM = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened")

pytestmark = [
    pytest.mark.timeout(4 * SECONDS),
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.skipif(not any(rom.exists() for rom in ROMS), reason="iPXE's ROM is not installed (ipxe-qemu)"),
]


@pytest.fixture
def lan() -> Iterator[Network]:
    network = Network(queues=2, opened=False)
    yield network
    network.close()


def qemu(sock: Path, *options: str) -> subprocess.Popen[bytes]:
    device = ",".join(("virtio-net-pci", "netdev=net", f"mac={MAC}", "bootindex=1", "mq=on", "vectors=6", *options))
    command = [
        QEMU, "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-machine", "q35,memory-backend=ram",
        "-object", "memory-backend-memfd,id=ram,size=64M,share=on",
        "-chardev", f"socket,id=card,path={sock},reconnect=1",
        "-netdev", "vhost-user,id=net,chardev=card,queues=2", "-device", device,
        "-boot", "reboot-timeout=100",  # iPXE gives up after a while, and asks anew at the next start
    ]  # fmt: skip
    return subprocess.Popen(command)


def end(program: subprocess.Popen[bytes]) -> int:
    program.send_signal(signal.SIGTERM)
    return program.wait(20)


def dhcp(seen: bytes) -> bytes | None:
    """A frame's DHCP message, BOOTP header first, if it is one from the guest."""
    if seen[6:12] != GUEST_MAC or seen[12:14] != b"\x08\0" or seen[23] != 17 or seen[36:38] != b"\0\x43":
        return None
    return seen[42:]


def kind_of(message: bytes) -> int:
    return int.from_bytes(option(message, 53), "big")


def option(message: bytes, wanted: int) -> bytes:
    at = 240
    while at < len(message) and message[at] != 255:
        if message[at] == 0:
            at += 1
            continue
        if message[at] == wanted:
            return message[at + 2 : at + 2 + message[at + 1]]
        at += 2 + message[at + 1]
    return b""


def answer(wire: Wire, to: bytes, kind: int) -> None:
    """Lend an address (RFC 2131)."""
    server = socket.inet_aton(SERVER)
    head = bytes((2, 1, 6, 0)) + to[4:8] + to[8:12] + bytes(4) + socket.inet_aton(LEASE) + server + bytes(4)
    options = b"".join((
        MAGIC, bytes((53, 1, kind)), bytes((54, 4)), server, bytes((51, 4)), struct.pack(">I", 3600),
        bytes((1, 4, 255, 255, 255, 0)), bytes((3, 4)), server, b"\xff",
    ))  # fmt: skip
    body = head + GUEST_MAC.ljust(16, b"\0") + bytes(192) + options.ljust(64, b"\0")
    udp = struct.pack(">HHHH", 67, 68, 8 + len(body), 0) + body
    wire.send(ipv4(17, SERVER, "255.255.255.255", udp, to_guest=True))


def until_asked(wire: Wire) -> None:
    """Until the guest is looking for a server."""
    while (message := dhcp(wire.receive())) is None or kind_of(message) != DISCOVER:
        pass


def lease(wire: Wire) -> None:
    """From the guest's question to its use of the address: packets pass in both directions. Every question is answered,
    as by a server: an answer that the kernel drops while the interface is coming up is wanted again."""
    requests, end = 0, time.monotonic() + 2 * SECONDS  # iPXE's patience, and the start after it
    while (seen := wire.receive())[12:14] != b"\x08\x06" or not requests:
        assert time.monotonic() < end, f"no use of the address; {requests} times it was asked for"
        if (message := dhcp(seen)) is None:
            continue
        assert message[28:34] == GUEST_MAC
        if kind_of(message) == DISCOVER:
            answer(wire, message, OFFER)
        elif kind_of(message) == REQUEST:
            assert option(message, 50) == socket.inet_aton(LEASE)
            answer(wire, message, ACK)
            requests += 1
    assert seen[28:32] == socket.inet_aton(LEASE), "it uses the address"


@pytest.mark.parametrize("mode", ["disable-legacy=on", "disable-modern=on"], ids=["modern", "legacy"])
def test_ipxe_gets_an_address_through_our_card(lan: Network, runtime_folder: Path, mode: str) -> None:
    sock, wire = runtime_folder / "qemu.sock", lan.wire()
    worker = spawn(lan, sock, "--queue-pairs", "2")
    guest = qemu(sock, mode)
    lease(wire)
    end(guest)
    assert end(worker) == 0
    wire.close()


def test_killed_card_comes_back_while_ipxe_asks(lan: Network, runtime_folder: Path) -> None:
    sock, wire = runtime_folder / "qemu.sock", lan.wire()
    worker = spawn(lan, sock, "--queue-pairs", "2")
    guest = qemu(sock, "disable-legacy=on")
    until_asked(wire)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    while not wire.silent():
        wire.receive()
    worker = spawn(lan, sock, "--queue-pairs", "2")
    lease(wire)
    end(guest)
    assert end(worker) == 0
    wire.close()


@pytest.mark.parametrize(
    ("accel", "words"),
    [
        # Without KVM's irqfds QEMU 7.2 dies of MSI-X and vhost-user in msix_set_vector_notifiers(): the guest polls.
        ("tcg", "poll=1"),
        pytest.param("kvm", "", marks=[pytest.mark.probe, NO_KVM]),
    ],
    ids=["emulated", "kvm"],
)
def test_probe_guest_verifies_its_datagrams_across_kills_under_load(
    runtime_folder: Path, accel: str, words: str
) -> None:
    """A foreign front end, which keeps no inflight table of a card's. Two flows of datagrams go through the guest and
    back, each checked at both ends; what is lost with a worker is sent again, and none may come back changed."""
    sock = runtime_folder / "load.sock"
    with closing(Network(opened=False, address=f"{HOST}/24")) as lan:
        worker = spawn(lan, sock)
        try:
            until_socket(sock, worker)  # QEMU does not wait for it
            with closing(Machine(
                accel, f"mode=net {words} report_ms=100 lost_irq_ticks=100",
                "-object", "memory-backend-memfd,id=ram,size=128M,share=on", "-machine", "memory-backend=ram",
                "-chardev", f"socket,id=card,path={sock},reconnect=1", "-netdev", "vhost-user,id=net,chardev=card",
                "-device", f"virtio-net-pci,disable-legacy=on,netdev=net,mac={MAC},romfile=",
            )) as machine:  # fmt: skip
                machine.line(NetOpen)
                with lan.inside():
                    ping(GUEST)
                    flows = Flow(GUEST, 1400), Flow(GUEST, 200)
                    with flows[0], flows[1]:
                        for life in range(4):
                            for flow in flows:
                                flow.goes_on(50, 60.0)
                            if life < 3:
                                worker.send_signal(signal.SIGKILL)
                                worker.wait()
                                worker = spawn(lan, sock)
                answers = 4 * 2 * 50  # that many at least: this report is newer than the last of them
                machine.until(lambda event: isinstance(event, NetOk) and event.echoed >= answers, "a report of them")
                assert not [event for event in machine.events if isinstance(event, Bad)]
        finally:
            worker.terminate()
            assert worker.wait(20) == 0


# The program ----------------------------------------------------------------------------------------------------


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "net_worker", *arguments], capture_output=True, text=True, timeout=20, check=False
    )


def test_program_prints_its_capabilities() -> None:
    assert json.loads(program("--print-capabilities").stdout) == {"type": "net"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--socket-path", "x"], "--tap is missing"),
        (["--tap", "tap0"], "neither --socket-path nor --fd"),
        (["--tap", "lo", "--socket-path", "x"], "tap lo: Invalid argument"),
        (["--tap", "lo", "--queue-pairs", "0", "--socket-path", "x"], "queue_pairs=0 is not within 1 to 128"),
        (["--tap", "a-name-of-more-than-15", "--socket-path", "x"], "is longer than 15 bytes"),
    ],
)
def test_program_names_what_is_wrong(arguments: list[str], says: str) -> None:
    done = program(*arguments)
    assert done.returncode in (1, 2)
    assert says in done.stderr
