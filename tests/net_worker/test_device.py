"""The device around the packets: configuration, control queue, queue pairs, stop, dirty log, state, announcement."""

from __future__ import annotations

import ctypes
import os
import random
import select
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from net_worker import native
from net_worker.announce import rarp
from net_worker.backend import NetBackend
from net_worker.settings import Settings
from shared import virtio_net
from shared.errors import ConfigError, FlotillaError, ProtocolError
from shared.reactor import Reactor
from shared.vhost_worker import VhostWorker
from tests.net_worker.rig import PLAIN, SPEC, Rig
from tests.network import GUEST_MAC, Network, frame, number_of
from tests.ring_driver import GPA, Memory, pages

PAGE = 4096
OK, ERR = 0, 1
MQ, OFFLOADS, ANNOUNCE = 4, 5, 3


@pytest.fixture
def rig(network: Network) -> Iterator[Rig]:
    with Rig(network, region=True) as rig:
        yield rig


# What the device is ---------------------------------------------------------------------------------------------


def test_structs_have_the_sizes_of_the_native_loop() -> None:
    library = native.load()
    sizes = [library.net_abi_size(n) for n in range(len(native.ABI) + 1)]
    assert sizes == [*(ctypes.sizeof(struct) for struct in native.ABI), 0]


def test_features_are_cloud_hypervisors_and_two_more_for_other_front_ends(rig: Rig) -> None:
    more = virtio_net.F_MRG_RXBUF | virtio_net.F_INDIRECT_DESC
    assert rig.backend.features == 0x1_2063_7FAF | more


def test_configuration_space(rig: Rig) -> None:
    assert rig.backend.get_config(0, 17) == bytes.fromhex("525400123456 0100 0100 dc05 00000000 00")
    assert rig.backend.get_config(6, 2) == b"\1\0"


def test_nothing_of_the_configuration_is_the_drivers_to_write(rig: Rig) -> None:
    with pytest.raises(ProtocolError, match="nothing of its configuration"):
        rig.backend.set_config(0, b"\0")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"queue_pairs": 0}, "queue_pairs=0 is not within 1 to 128"),
        ({"queue_pairs": 129}, "queue_pairs=129 is not within 1 to 128"),
        ({"queue_pairs": 2}, "1 TAP descriptors for 2 queue pairs"),
        ({"mac": "nonsense"}, "'nonsense' is no MAC address"),
    ],
    ids=str,
)
def test_spec_that_makes_no_sense(network: Network, bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        NetBackend(Reactor(), SPEC | bad, network.fds)


def test_descriptor_that_is_no_tap_costs_the_start_of_its_queue(network: Network) -> None:
    read_end, write_end = os.pipe()
    fds, network.fds = network.fds, [read_end]
    with Rig(network) as rig, pytest.raises(FlotillaError, match="the TAP's vnet header size can't be set"):
        rig.start()
    network.fds = fds
    os.close(read_end)
    os.close(write_end)


def test_control_queue_whose_kick_can_not_be_waited_for_does_not_run(rig: Rig) -> None:
    """And can be started again with an eventfd."""
    index = rig.ctrl.index
    with open(os.memfd_create("no-eventfd"), "rb") as file, pytest.raises(PermissionError):
        rig.backend.start_queue(replace(rig.ring(index), kick_fd=file.fileno()))
    assert rig.backend._running == set() and rig.backend._control_kick == -1
    rig.start(index)
    assert rig.command(OFFLOADS, 0, bytes(8)) == OK


def test_tap_is_not_touched_before_a_queue_starts(network: Network) -> None:
    """In a local migration the source still has it when the destination is built."""
    with Rig(network).start() as source:
        with Rig(network) as destination:
            destination.backend.set_features(PLAIN & ~virtio_net.F_GUEST_CSUM & ~virtio_net.F_VERSION_1)
            wire = network.wire()
            source.tx[0].send(frame(1))
            assert wire.receive() == frame(1)
            wire.close()


# The control queue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_command_after_command(network: Network, event_idx: bool, indirect: bool) -> None:
    with Rig(network, event_idx=event_idx, indirect=indirect).start() as rig:
        for _ in range(10):
            assert rig.command(MQ, 0, struct.pack("<H", 1)) == OK
        assert rig.backend.stats()["commands"] == 10


@pytest.mark.parametrize(
    ("command", "ack"),
    [
        ((MQ, 0, struct.pack("<H", 1)), OK),
        ((MQ, 0, struct.pack("<H", 0)), ERR),
        ((MQ, 0, struct.pack("<H", 2)), ERR),
        ((MQ, 0, b"\1"), ERR),
        ((MQ, 0, struct.pack("<I", 1)), ERR),
        ((MQ, 1, b"hash configuration"), ERR),
        ((OFFLOADS, 0, struct.pack("<Q", 0)), OK),
        ((OFFLOADS, 0, struct.pack("<Q", virtio_net.GUEST_OFFLOADS)), OK),
        ((OFFLOADS, 0, struct.pack("<Q", 1 << 40)), ERR),
        ((OFFLOADS, 0, struct.pack("<Q", virtio_net.F_HOST_TSO4)), ERR),
        ((OFFLOADS, 0, struct.pack("<Q", virtio_net.F_GUEST_TSO4)), ERR),  # without GUEST_CSUM
        ((ANNOUNCE, 0, b""), OK),
        ((ANNOUNCE, 1, b""), ERR),
        ((0, 0, b"\1"), ERR),  # promiscuous mode
        ((1, 0, bytes(600)), ERR),  # MAC table
        ((2, 0, b"\1\0"), ERR),  # VLAN
        ((255, 255, bytes(1500)), ERR),
    ],
    ids=str,
)
def test_command(rig: Rig, command: tuple[int, int, bytes], ack: int) -> None:
    rig.start()
    assert rig.command(*command) == ack


def test_offloads_that_were_not_negotiated_are_refused(network: Network) -> None:
    features = PLAIN & ~virtio_net.F_GUEST_UFO
    with Rig(network, features=features).start() as rig:
        assert rig.command(OFFLOADS, 0, struct.pack("<Q", virtio_net.GUEST_OFFLOADS)) == ERR
    with Rig(network, features=PLAIN & ~virtio_net.F_CTRL_GUEST_OFFLOADS).start() as rig:
        assert rig.command(OFFLOADS, 0, struct.pack("<Q", 0)) == ERR


def test_guest_switches_large_segments_off_and_on(rig: Rig) -> None:
    from tests.net_worker.test_packets import send_to_segment

    rig.start()
    rig.rx[0].post(66_000)
    rig.rx[0].kick()
    assert rig.command(OFFLOADS, 0, struct.pack("<Q", virtio_net.F_GUEST_CSUM)) == OK
    send_to_segment(rig.network, bytes(1448 * 2))
    (packet,) = rig.rx[0].wait()
    assert packet.header[1] == 0
    rig.rx[0].post(66_000)
    rig.rx[0].kick()
    (packet,) = rig.rx[0].wait()
    assert rig.command(OFFLOADS, 0, struct.pack("<Q", virtio_net.GUEST_OFFLOADS)) == OK
    rig.rx[0].post(66_000)
    rig.rx[0].kick()
    send_to_segment(rig.network, bytes(1448 * 2))
    (packet,) = rig.rx[0].wait()
    assert packet.header[1] == 1


# Queue pairs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wide() -> Iterator[Network]:
    network = Network(queues=4)
    yield network
    network.close()


def flood(rig: Rig, count: int) -> list[int]:
    """Frames of many flows to the guest: how many came on each pair."""
    wire = rig.network.wire()
    for rx in rig.rx:
        rx.post_all(2048)
        rx.kick()
    rig.settled()
    got = [0] * len(rig.rx)
    for n in range(count):
        packet = bytearray(frame(n, to_guest=True))
        packet[12:14] = b"\x08\x00"  # IPv4 and UDP, so that the kernel's hash has something to tell flows by
        packet[14:34] = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 80, n, 0, 64, 17, 0, os.urandom(4), os.urandom(4))
        packet[34:38] = os.urandom(4)
        wire.send(bytes(packet))
        rig.until(lambda: sum(rx.used_idx() - rx.used_seen & 0xFFFF for rx in rig.rx) > 0)
        for index, rx in enumerate(rig.rx):
            got[index] += len(rx.packets())
            if rx.free:
                rx.post_all(2048)
                rx.kick()
    wire.close()
    return got


def test_only_the_first_pair_until_the_driver_asks_for_more(wide: Network) -> None:
    with Rig(wide, pairs=4).start() as rig:
        assert flood(rig, 40) == [40, 0, 0, 0]


def test_every_pair_that_the_driver_asked_for(wide: Network) -> None:
    with Rig(wide, pairs=4).start() as rig:
        assert rig.command(MQ, 0, struct.pack("<H", 3)) == OK
        first = flood(rig, 100)
    assert first[3] == 0 and all(first[:3])


def test_pairs_are_taken_back(wide: Network) -> None:
    with Rig(wide, pairs=4).start() as rig:
        assert rig.command(MQ, 0, struct.pack("<H", 4)) == OK
        assert rig.command(MQ, 0, struct.pack("<H", 5)) == ERR
        assert rig.command(MQ, 0, struct.pack("<H", 1)) == OK
        assert flood(rig, 40) == [40, 0, 0, 0]


def test_pairs_of_a_front_end_that_keeps_the_control_queue_are_those_it_starts(wide: Network) -> None:
    with Rig(wide, pairs=4, features=PLAIN & ~virtio_net.F_CTRL_VQ).start(0, 1, 4, 5) as rig:
        first = flood(rig, 100)
        assert first[0] and first[2] and not first[1] and not first[3]
        assert rig.backend.stop_queue(4) == first[2]
        rig.start(2)
        second = flood(rig, 100)
        assert second[0] and second[1] and not second[2] and not second[3]


def test_every_pair_sends(wide: Network) -> None:
    wire = wide.wire()
    with Rig(wide, pairs=4).start() as rig:
        assert rig.command(MQ, 0, struct.pack("<H", 4)) == OK
        for n, tx in enumerate(rig.tx):
            tx.send(frame(n))
            assert wire.receive() == frame(n)
    wire.close()


# Stop, start, life ----------------------------------------------------------------------------------------------


def test_stop_answers_where_to_go_on_and_touches_nothing_after_it(rig: Rig) -> None:
    wire = rig.network.wire()
    rig.start()
    rig.tx[0].send(*(frame(n) for n in range(3)))
    rig.rx[0].post(2048, times=4)
    rig.rx[0].kick()
    wire.send(frame(9, to_guest=True))
    rig.rx[0].wait(1)
    assert [rig.backend.stop_queue(index) for index in range(3)] == [1, 3, 0]
    while not wire.silent():
        wire.receive()
    for driver in rig.drivers:
        with suppress(BlockingIOError):
            os.eventfd_read(driver.call_fd)
    before = rig.memory.read(GPA, rig.memory.size)
    wire.send(frame(10, to_guest=True))
    assert before == rig.memory.read(GPA, rig.memory.size)
    rig.tx[0].put(frame(11))
    rig.tx[0].kick()
    offered = rig.memory.read(GPA, rig.memory.size)
    rig.settled()
    assert rig.memory.read(GPA, rig.memory.size) == offered and wire.silent()
    for driver in rig.drivers:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(driver.call_fd)
    rig.start()
    rig.tx[0].drain()
    assert number_of(wire.receive()) == 11
    assert [number_of(packet.frame) for packet in rig.rx[0].wait(1)] == [10]
    wire.close()


def test_stop_is_not_kept_waiting_by_a_busy_thread(network: Network) -> None:
    wire = network.wire()
    with Rig(network, size=64).start() as rig:
        for _ in range(50):
            while rig.tx[0].free:
                rig.tx[0].put(frame(0))
            rig.tx[0].kick()
            rig.backend.stop_queue(1)
            rig.tx[0].reap()
            rig.start(1)
        rig.tx[0].drain()
    wire.close()


def test_epoch_rises_while_the_guest_is_idle(rig: Rig) -> None:
    rig.start()
    for _ in range(4):
        last = rig.backend.epoch()
        rig.until(lambda last=last: rig.backend.epoch() > last)  # type: ignore[misc]


def test_every_notification_is_counted(rig: Rig) -> None:
    rig.start()
    rig.tx[0].send(frame(1), frame(2))
    rig.settled()  # both are counted after the frames have gone: the kick perhaps in the turn after that
    stats = rig.backend.stats()
    assert (stats["tx_frames"], stats["tx_bytes"]) == (2, 200)
    assert stats["kicks"] >= 1 and stats["calls"] >= 1


# Dirty log ------------------------------------------------------------------------------------------------------


def marked(log: Memory) -> set[int]:
    data = bytes(log.view)
    return {8 * n + bit for n, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("mergeable", [False, True], ids=["whole", "mergeable"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_every_page_that_changes_is_marked(network: Network, event_idx: bool, mergeable: bool) -> None:
    from tests.net_worker.test_packets import send_to_segment

    features = PLAIN | (virtio_net.F_MRG_RXBUF if mergeable else 0)
    with Rig(network, size=64, event_idx=event_idx, indirect=True, features=features) as rig:
        log = Memory(pages((GPA + rig.memory.size) // PAGE // 8 + 1))
        rig.backend.set_log(log.address, log.size)
        rig.start()
        rig.settled()
        chance = random.Random(event_idx)
        ours = {(driver.avail + 4 + 2 * driver.size) // PAGE for driver in rig.drivers}  # used_event: the driver's
        for _ in range(30):
            rig.rx[0].post_all(*([3000] if mergeable else [100, 33_000, 40_000]))
            rig.tx[0].put(frame(1, 1000))
            ack = rig.ctrl.put(MQ, 0, struct.pack("<H", 1))
            log.view[:] = bytes(log.size)  # before the snapshot: what changes after it is marked after it
            before = bytes(rig.memory.view)
            rig.rx[0].kick()
            rig.tx[0].kick()
            send_to_segment(network, chance.randbytes(chance.randrange(1500, 50_000)))
            rig.rx[0].wait(1)
            rig.tx[0].drain()
            rig.ctrl.kick()
            rig.until(lambda ack=ack: rig.memory.read(ack, 1) == b"\0")  # type: ignore[misc]
            rig.settled()
            after = bytes(rig.memory.view)
            spans = [slice(at, at + PAGE) for at in range(0, len(after), PAGE)]
            changed = {(GPA + span.start) // PAGE for span in spans if after[span] != before[span]}
            changed -= {page for driver in rig.drivers for page in driver_pages(driver)} | ours
            assert changed <= marked(log)
        log.close()


def driver_pages(driver: Any) -> set[int]:
    """Descriptor table and avail ring: written by the driver alone."""
    return set(range(driver.desc // PAGE, driver.used // PAGE))


# Settings and state ---------------------------------------------------------------------------------------------


def test_settings_outlive_a_killed_worker_by_the_inflight_region(wide: Network) -> None:
    with Rig(wide, pairs=4, region=True).start() as rig:
        assert rig.command(MQ, 0, struct.pack("<H", 3)) == OK
        assert rig.command(OFFLOADS, 0, struct.pack("<Q", virtio_net.F_GUEST_CSUM)) == OK
        rig.backend.announce()
        assert rig.region is not None
        wanted = Settings(3, virtio_net.F_GUEST_CSUM, announce=True)
        assert Settings.kept(rig.region.address, 4) == wanted
        fds = wide.fds_for_a_worker()
        successor = NetBackend(rig.reactor, SPEC | {"queue_pairs": 4}, fds)
        successor.set_features(rig.features)
        successor.set_memory(())
        successor._adopt_settings(rig.region.address)
        assert successor.settings == wanted
        successor.close()


def test_region_of_a_driver_that_has_just_begun_means_the_initial_settings(rig: Rig) -> None:
    rig.start()
    assert rig.command(OFFLOADS, 0, struct.pack("<Q", 0)) == OK
    for index in range(3):
        rig.backend.stop_queue(index)
    assert rig.region is not None
    rig.region.view[:] = bytes(rig.region.size)
    rig.start()
    assert rig.backend.settings == Settings(1, virtio_net.GUEST_OFFLOADS)


@pytest.mark.parametrize("word", [0x8000_0000, 0x8000_0001 | 1 << 11, 0xBFFF_F800], ids=hex)
def test_region_that_makes_no_sense_is_ignored(rig: Rig, word: int) -> None:
    assert rig.region is not None
    rig.region.view[24:28] = word.to_bytes(4, "little")
    rig.start()
    assert rig.backend.settings == Settings(1, virtio_net.GUEST_OFFLOADS)


GOLDEN = {
    "pairs": 1, "offloads": 0x782, "announce": False, "avail_features": 0x1_3063_FFAF, "acked_features": 0x1_2063_7FAF,
}  # fmt: skip


def test_state_of_version_1(rig: Rig) -> None:
    """What version 1 has always written; and it loads."""
    rig.start()
    assert rig.backend.save() == GOLDEN
    for index in range(3):
        rig.backend.stop_queue(index)
    rig.backend.load(GOLDEN)
    assert rig.backend.save() == GOLDEN


def test_loaded_settings_win_over_the_region(rig: Rig) -> None:
    rig.start()
    for index in range(3):
        rig.backend.stop_queue(index)
    rig.backend.load(GOLDEN | {"offloads": 2, "announce": True})
    rig.backend.set_features(rig.features)
    rig.start()
    assert rig.backend.settings == Settings(1, 2, announce=True)
    assert rig.region is not None
    assert Settings.kept(rig.region.address, 1) == Settings(1, 2, announce=True)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"pairs": None}, "wrong type"),
        ({"pairs": True}, "wrong type"),
        ({"pairs": 0}, "make no sense"),
        ({"pairs": 2}, "the guest uses 2 queue pairs, this network device has 1"),
        ({"offloads": 1}, "make no sense"),
        ({"offloads": -1}, "make no sense"),
        ({"announce": 1}, "wrong type"),
        ({"acked_features": 1 << 50}, "features that this device lacks"),
        ({"acked_features": "all"}, "features that this device lacks"),
    ],
    ids=str,
)
def test_state_that_cannot_be_loaded(rig: Rig, bad: dict[str, Any], says: str) -> None:
    before = rig.backend.save()
    with pytest.raises(FlotillaError, match=says):
        rig.backend.load(GOLDEN | bad)
    assert rig.backend.save() == before


@pytest.mark.parametrize("missing", ["pairs", "offloads", "announce"])
def test_state_with_a_field_missing(rig: Rig, missing: str) -> None:
    with pytest.raises(FlotillaError, match=f"'{missing}' is missing"):
        rig.backend.load({name: value for name, value in GOLDEN.items() if name != missing})


def test_state_while_queues_run_is_refused(rig: Rig) -> None:
    rig.start()
    with pytest.raises(ProtocolError, match="while queues run"):
        rig.backend.load(GOLDEN)


# Announcement ---------------------------------------------------------------------------------------------------


def test_announcement_reaches_the_network_and_the_guest(rig: Rig) -> None:
    wire, told = rig.network.wire(), []
    rig.backend.on_config = lambda: told.append(rig.backend.get_config(6, 2))
    rig.start()
    rig.backend.announce()
    assert told == [b"\3\0"]
    assert rig.command(ANNOUNCE, 0) == OK
    assert told == [b"\3\0", b"\1\0"]
    rig.until(lambda: rig.backend.stats()["announcements"] == 5)
    for _ in range(5):
        seen = wire.receive()
        assert seen == rarp(GUEST_MAC)
        assert seen[:14] == b"\xff" * 6 + GUEST_MAC + b"\x80\x35"
        assert seen[14:42] == b"\0\1\x08\0\6\4\0\3" + (GUEST_MAC + bytes(4)) * 2
    wire.close()


def test_guest_without_announce_is_announced_to_the_network_alone(network: Network) -> None:
    wire = network.wire()
    with Rig(network, features=PLAIN & ~virtio_net.F_GUEST_ANNOUNCE).start() as rig:
        rig.backend.on_config = lambda: pytest.fail("the guest was told")
        rig.backend.announce()
        assert wire.receive() == rarp(GUEST_MAC)
        assert rig.backend.get_config(6, 2) == b"\1\0"
    wire.close()


def test_announcement_stops_at_quiesce_and_is_refused_after_it(rig: Rig) -> None:
    worker = VhostWorker("net_worker", rig.backend)
    wire = rig.network.wire()
    rig.start()
    rig.backend.announce()
    worker.quiesce()
    assert wire.receive() == rarp(GUEST_MAC) and wire.silent()
    assert rig.reactor._timers == [] or all(timer.callback is None for timer in rig.reactor._timers)
    with pytest.raises(ProtocolError, match="announce while quiesced"):
        rig.backend.announce()
    wire.close()


def test_unknown_fault(rig: Rig) -> None:
    with pytest.raises(ProtocolError, match="unknown fault 'explode'"):
        rig.backend.fault("explode", 0)


def test_what_can_be_rehearsed_and_what_has_no_options(rig: Rig) -> None:
    """A frozen pair takes no turn until it is cleared; how notifications get lost is one code for all native loops."""
    rig.start()
    rig.settled()
    rig.backend.fault("freeze", 0)
    stuck = rig.backend.epoch()
    assert rig.backend.epoch() == stuck
    for what in ("withhold", "repeat", "delay"):
        rig.backend.fault(what, 1)
    rig.backend.fault("clear", 0)
    rig.settled()
    with pytest.raises(ProtocolError, match="has no seed"):
        rig.backend.fault("delay", 1, {"seed": 1})


def test_a_fault_is_not_armed_again_by_the_next_one(rig: Rig) -> None:
    rig.start()
    rig.settled()
    tx = rig.tx[0]
    rig.backend.fault("withhold", 1)
    tx.arm()
    tx.put(frame(1))
    tx.kick()
    rig.until(lambda: tx.reap() == 1)
    rig.backend.fault("delay", 1)
    rig.settled()  # the reminder of what was withheld comes before the drain, and only once
    with suppress(BlockingIOError):
        os.eventfd_read(tx.call_fd)
    tx.arm()
    tx.put(frame(2))
    tx.kick()
    assert select.select([tx.call_fd], [], [], 20)[0] and tx.reap() == 1
