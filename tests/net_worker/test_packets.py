"""Packets both ways, in every shape that a driver and a TAP can give them."""

from __future__ import annotations

import os
import random
import struct
import time

import pytest

from shared import virtio_net
from tests.net_worker.rig import PLAIN, Rig
from tests.network import (
    DATA_VALID,
    GSO_NONE,
    GSO_TCPV4,
    HEADER,
    NEEDS_CSUM,
    Network,
    checksum,
    frame,
    ipv4,
    number_of,
    pseudo_header,
    tcp_to_segment,
)

HOST, GUEST = "10.9.8.1", "10.9.8.2"
MERGEABLE = PLAIN | virtio_net.F_MRG_RXBUF
SHAPES = pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
NOTIFICATIONS = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
ETHERNET, IP_HEADER, TCP_HEADER = 14, 20, 20


@SHAPES
@NOTIFICATIONS
def test_guest_to_host(network: Network, event_idx: bool, indirect: bool) -> None:
    wire = network.wire()
    with Rig(network, event_idx=event_idx, indirect=indirect).start() as rig:
        for number in range(3 * rig.tx[0].size):
            rig.tx[0].send(frame(number, 60 + number))
            assert wire.receive() == frame(number, 60 + number)
    wire.close()


@SHAPES
@NOTIFICATIONS
def test_host_to_guest(network: Network, event_idx: bool, indirect: bool) -> None:
    wire = network.wire()
    with Rig(network, event_idx=event_idx, indirect=indirect).start() as rig:
        for number in range(3 * rig.rx[0].size):
            rig.rx[0].post(2048)
            rig.rx[0].kick()
            wire.send(frame(number, 60 + number, to_guest=True))
            (packet,) = rig.rx[0].wait()
            assert packet.frame == frame(number, 60 + number, to_guest=True)
            assert (packet.header[:2], packet.header[10:12]) == (b"\0\0", b"\1\0")
    wire.close()


@NOTIFICATIONS
def test_both_ways_at_once_in_bursts_without_a_lost_interrupt(network: Network, event_idx: bool) -> None:
    wire, chance = network.wire(), random.Random(event_idx)
    with Rig(network, size=64, event_idx=event_idx, indirect=True).start() as rig:
        rx, tx = rig.rx[0], rig.tx[0]
        sent = got = 0
        for _ in range(60):
            rx.post_all(2048)
            rx.kick()
            burst = chance.randrange(1, 64)
            for _ in range(burst):
                since = tx.avail_idx
                tx.put(frame(sent, chance.randrange(60, 1500)))
                sent += 1
                if tx.wants_kick(since):
                    tx.kick()
            for n in range(burst):
                wire.send(frame(n, chance.randrange(60, 1500), to_guest=True))
            assert [number_of(packet.frame) for packet in rx.wait(burst)] == list(range(burst))
            tx.drain()
            for _ in range(burst):
                assert number_of(wire.receive()) == got
                got += 1
    wire.close()


def test_packet_may_be_cut_anywhere(network: Network) -> None:
    """virtio 1.2, 2.7.4: no assumption about how a message is spread over descriptors."""
    wire, chance = network.wire(), random.Random(1)
    with Rig(network, indirect=True).start() as rig:
        for number in range(40):
            size = chance.randrange(60, 1500)
            cuts = sorted(chance.sample(range(1, size + 12), chance.randrange(1, 30)))
            rig.tx[0].put(frame(number, size), cuts=cuts)
            rig.tx[0].kick()
            rig.tx[0].drain()
            assert wire.receive() == frame(number, size)
            parts = [1, 3, 6, 1, 1, 5, chance.randrange(1, 400), 1600]
            rig.rx[0].post(*parts)
            rig.rx[0].kick()
            wire.send(frame(number, size, to_guest=True))
            (packet,) = rig.rx[0].wait()
            assert packet.frame == frame(number, size, to_guest=True)
    wire.close()


def test_driver_before_virtio_1_has_a_shorter_header(network: Network) -> None:
    wire = network.wire()
    with Rig(network, features=PLAIN & ~virtio_net.F_VERSION_1).start() as rig:
        assert rig.tx[0].header == 10
        rig.tx[0].send(frame(1))
        assert wire.receive() == frame(1)
        rig.rx[0].post(2048)
        rig.rx[0].kick()
        wire.send(frame(2, to_guest=True))
        assert rig.rx[0].wait()[0].frame == frame(2, to_guest=True)
    wire.close()


# Offloads -------------------------------------------------------------------------------------------------------


def test_guest_may_leave_segmentation_to_the_host(network: Network) -> None:
    wire = network.wire(vnet_header=True)
    data = os.urandom(40_000)
    packet = tcp_to_segment(GUEST, HOST, data, to_guest=False)
    header = HEADER.pack(NEEDS_CSUM, GSO_TCPV4, ETHERNET + IP_HEADER + TCP_HEADER, 1448, ETHERNET + IP_HEADER, 16)
    with Rig(network, indirect=True).start() as rig:
        rig.tx[0].put(packet, header, cuts=[12, 4000, 8192])
        rig.tx[0].kick()
        rig.tx[0].drain()
        seen = wire.receive()
        flags, gso_type, _, gso_size, _, _ = HEADER.unpack_from(seen)
        assert (flags, gso_type, gso_size) == (NEEDS_CSUM, GSO_TCPV4, 1448)
        assert seen[HEADER.size :] == packet
    wire.close()


def send_to_segment(network: Network, data: bytes) -> None:
    """A large TCP segment onto the TAP, segmentation left to whoever comes next."""
    wire = network.wire(vnet_header=True)
    header = HEADER.pack(NEEDS_CSUM, GSO_TCPV4, ETHERNET + IP_HEADER + TCP_HEADER, 1448, ETHERNET + IP_HEADER, 16)
    wire.send(header + tcp_to_segment(HOST, GUEST, data, to_guest=True))
    wire.close()


def test_host_may_leave_segmentation_to_the_guest(network: Network) -> None:
    data = os.urandom(40_000)
    with Rig(network).start() as rig:
        rig.rx[0].post(66_000)
        rig.rx[0].kick()
        send_to_segment(network, data)
        (packet,) = rig.rx[0].wait()
        flags, gso_type, _, gso_size, _, _ = HEADER.unpack_from(packet.header)
        assert (flags & NEEDS_CSUM, gso_type, gso_size) == (NEEDS_CSUM, GSO_TCPV4, 1448)
        assert packet.frame[ETHERNET + IP_HEADER + TCP_HEADER :] == data


@pytest.mark.parametrize("without", ["tso", "csum"])
def test_guest_that_takes_no_large_segments_gets_none(network: Network, without: str) -> None:
    gone = virtio_net.F_GUEST_TSO4 if without == "tso" else virtio_net.F_GUEST_CSUM
    data = os.urandom(12_000)
    with Rig(network, size=64, features=PLAIN & ~gone).start() as rig:
        rig.rx[0].post_all(2048)
        rig.rx[0].kick()
        send_to_segment(network, data)
        packets = rig.rx[0].wait(9)
        assert [HEADER.unpack_from(packet.header)[1] for packet in packets] == [GSO_NONE] * 9
        assert b"".join(packet.frame[ETHERNET + IP_HEADER + TCP_HEADER :] for packet in packets) == data
        if without == "csum":
            assert not any(packet.header[0] & NEEDS_CSUM for packet in packets)


@pytest.mark.parametrize("offload", [True, False], ids=["partial", "full"])
def test_checksums_of_the_guest_reach_a_socket(offload: bool) -> None:
    network = Network(address=f"{HOST}/24")
    sock = network.datagram(7000)
    text = b"a datagram of an odd size"
    size = 8 + len(text)
    start = pseudo_header(17, GUEST, HOST, size)
    udp = struct.pack(">HHHH", 5000, 7000, size, 0) + text
    full = 0xFFFF ^ checksum(udp, start)
    with Rig(network).start() as rig:
        udp = udp[:6] + (start if offload else full).to_bytes(2, "big") + udp[8:]
        header = HEADER.pack(NEEDS_CSUM, 0, 0, 0, ETHERNET + IP_HEADER, 6) if offload else b""
        packet = ipv4(17, GUEST, HOST, udp, to_guest=False)
        rig.tx[0].send(network.mac() + packet[6:], header=header)
        assert sock.recv(100) == text
    sock.close()
    network.close()


@pytest.mark.parametrize("offload", [True, False], ids=["partial", "full"])
def test_checksums_of_the_host_are_the_guests_to_finish_if_it_wants(offload: bool) -> None:
    network = Network(address=f"{HOST}/24")
    with network.inside():
        network.ip("neigh", "add", GUEST, "lladdr", "52:54:00:12:34:56", "dev", network.NAME)
    sock = network.datagram(7000)
    features = PLAIN if offload else PLAIN & ~virtio_net.F_GUEST_CSUM
    with Rig(network, features=features).start() as rig:
        rig.rx[0].post_all(2048)
        rig.rx[0].kick()
        sock.sendto(b"odd", (GUEST, 5000))
        (packet,) = rig.rx[0].wait()
        udp = packet.frame[ETHERNET + IP_HEADER :][:11]
        start = pseudo_header(17, HOST, GUEST, 11)
        assert bool(packet.header[0] & NEEDS_CSUM) == offload
        if offload:
            assert struct.unpack_from(">H", udp, 6)[0] == start
        else:
            assert checksum(udp, start) == 0xFFFF
    sock.close()
    network.close()


def test_a_header_that_the_tap_refuses_costs_its_packet_alone(network: Network) -> None:
    wire = network.wire()
    with Rig(network).start() as rig:
        rig.tx[0].send(frame(1), header=bytes((0, 0x7F)))  # a GSO type that there is not
        rig.tx[0].send(b"short")  # no Ethernet header
        rig.tx[0].send(frame(2))
        assert wire.receive() == frame(2)
        stats = rig.backend.stats()
        assert (stats["tx_dropped"], stats["tx_frames"], stats["broken_queues"]) == (2, 1, 0)
    wire.close()


# Mergeable buffers ----------------------------------------------------------------------------------------------


@SHAPES
def test_a_large_packet_takes_several_mergeable_buffers(network: Network, indirect: bool) -> None:
    data = os.urandom(60_000)
    with Rig(network, size=256, features=MERGEABLE, indirect=indirect).start() as rig:
        rig.rx[0].free = type(rig.rx[0].free)(range(256))  # one descriptor per chain
        rig.rx[0].post_all(1536)
        rig.rx[0].kick()
        for _ in range(5):
            send_to_segment(network, data)
            (packet,) = rig.rx[0].wait()
            assert packet.frame[ETHERNET + IP_HEADER + TCP_HEADER :] == data
            assert packet.buffers == -(-(60_000 + 54 + 12) // 1536)
            rig.rx[0].post_all(1536)


def test_small_packets_take_one_mergeable_buffer_each(network: Network) -> None:
    wire = network.wire()
    with Rig(network, size=256, features=MERGEABLE).start() as rig:
        rig.rx[0].free = type(rig.rx[0].free)(range(256))
        rig.rx[0].post_all(1536)
        rig.rx[0].kick()
        for number in range(600):
            wire.send(frame(number, to_guest=True))
            (packet,) = rig.rx[0].wait()
            assert (packet.frame, packet.buffers) == (frame(number, to_guest=True), 1)
            rig.rx[0].post_all(1536)
    wire.close()


def test_a_packet_waits_for_enough_mergeable_buffers(network: Network) -> None:
    """Two buffers are there, it needs three: it is held, whole, until the driver has refilled."""
    data = os.urandom(4000)
    with Rig(network, features=MERGEABLE).start() as rig:
        rig.rx[0].post(1536, times=2)
        rig.rx[0].kick()
        rig.settled()
        before = rig.backend.stats()["rx_stalls"]
        send_to_segment(network, data)
        rig.until(lambda: rig.backend.stats()["rx_stalls"] > before)
        assert rig.rx[0].used_idx() == 0
        rig.rx[0].post(1536)
        rig.rx[0].kick()
        (packet,) = rig.rx[0].wait()
        assert (packet.buffers, packet.frame[ETHERNET + IP_HEADER + TCP_HEADER :]) == (3, data)


def test_a_packet_that_the_whole_ring_is_too_small_for_is_dropped(network: Network) -> None:
    wire = network.wire()
    with Rig(network, size=4, indirect=True, features=MERGEABLE).start() as rig:
        rig.rx[0].post_all(1536)
        rig.rx[0].kick()
        send_to_segment(network, os.urandom(30_000))
        wire.send(frame(7, to_guest=True))
        (packet,) = rig.rx[0].wait()
        assert packet.frame == frame(7, to_guest=True)
        assert rig.backend.stats()["rx_dropped"] == 1
    wire.close()


def test_a_packet_larger_than_a_lone_buffer_is_dropped_and_the_next_one_comes(network: Network) -> None:
    wire = network.wire()
    with Rig(network).start() as rig:
        rig.rx[0].post(500)
        rig.rx[0].kick()
        wire.send(frame(1, 1000, to_guest=True))
        wire.send(frame(2, 400, to_guest=True))
        (packet,) = rig.rx[0].wait()
        assert packet.frame == frame(2, 400, to_guest=True)
        assert rig.backend.stats()["rx_dropped"] == 1
    wire.close()


# Nothing waits behind a full or empty end -----------------------------------------------------------------------


def test_without_buffers_the_tap_is_left_alone_until_the_kick(network: Network) -> None:
    wire = network.wire()
    with Rig(network).start() as rig:
        for number in range(8):
            wire.send(frame(number, to_guest=True))
        rig.settled()
        before = rig.backend.counters(0).epoch
        rig.tx[0].send(frame(99))  # sending goes on meanwhile
        assert wire.receive() == frame(99)
        assert rig.backend.counters(0).epoch - before < 10, "the thread spins"
        rig.rx[0].post(2048, times=4)
        rig.rx[0].kick()
        assert [number_of(packet.frame) for packet in rig.rx[0].wait(4)] == [0, 1, 2, 3]
        rig.rx[0].post(2048, times=4)
        rig.rx[0].kick()
        assert [number_of(packet.frame) for packet in rig.rx[0].wait(4)] == [4, 5, 6, 7]
    wire.close()


def test_full_tap_is_waited_for_and_receiving_goes_on(network: Network) -> None:
    """The TAP's send buffer is small, and what it takes sits in a slow queue behind it."""
    network.choke(send_buffer=4000)
    wire = network.wire()
    with Rig(network, size=64).start() as rig:
        for number in range(10):
            rig.tx[0].put(frame(number, 1400))
        rig.tx[0].kick()
        rig.until(lambda: rig.backend.stats()["tx_stalls"] > 0)
        assert rig.tx[0].pending
        rig.rx[0].post(2048)
        rig.rx[0].kick()
        wire.send(frame(50, to_guest=True))
        assert rig.rx[0].wait()[0].frame == frame(50, to_guest=True)
        rig.tx[0].drain()
        assert rig.backend.stats()["tx_frames"] == 10
    wire.close()


def test_interface_that_is_down_drops_says_so_and_comes_back(
    network: Network, capfd: pytest.CaptureFixture[str]
) -> None:
    with Rig(network).start() as rig:
        with network.inside():
            network.ip("link", "set", network.NAME, "down")
        rig.tx[0].send(frame(1))
        assert rig.backend.stats()["tx_dropped"] == 1
        rig.backend.epoch()
        rig.backend.epoch()
        assert capfd.readouterr().err.count("the TAP refuses frames (Input/output error; is it up?): 1 dropped") == 1
        with network.inside():
            network.ip("link", "set", network.NAME, "up")
        wire = network.wire()
        rig.tx[0].send(frame(2))
        assert wire.receive() == frame(2)
        rig.rx[0].post(2048)
        rig.rx[0].kick()
        wire.send(frame(3, to_guest=True))
        assert rig.rx[0].wait()[0].frame == frame(3, to_guest=True)
        wire.close()


def test_interface_that_is_deleted_is_reported_once_and_nothing_spins(
    network: Network, capfd: pytest.CaptureFixture[str]
) -> None:
    with Rig(network).start() as rig:
        rig.rx[0].post_all(2048)
        rig.rx[0].kick()
        with network.inside():
            network.ip("link", "delete", network.NAME)
        rig.until(lambda: rig.backend.stats()["tap_gone"] > 0)
        rig.settled()
        before, began = rig.backend.counters(0).epoch, time.monotonic()
        while time.monotonic() - began < 0.05:  # a thread that spins takes thousands of turns in this time
            pass
        assert rig.backend.counters(0).epoch - before < 10
        rig.tx[0].send(frame(1))
        assert rig.backend.stats()["tx_dropped"] == 1
        rig.until(lambda: "the TAP can't be read" in capfd.readouterr().err)


def test_data_valid_is_the_hosts_to_say(network: Network) -> None:
    """What a flag in the guest's header means is the kernel's to judge: this one it ignores."""
    wire = network.wire()
    with Rig(network).start() as rig:
        rig.tx[0].send(frame(1), header=bytes((DATA_VALID,)))
        assert wire.receive() == frame(1)
    wire.close()
