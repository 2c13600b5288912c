"""What a hostile guest can put into a ring costs its own queue, until it resets the device, and nothing else."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from shared import virtio_net
from shared.linux import bytes_at, memfd, mmap_fd
from shared.native_ring import VringError
from tests.net_worker.driver import SLOT_BYTES
from tests.net_worker.rig import PLAIN, Rig
from tests.network import Network, frame
from tests.ring_driver import GPA, INDIRECT, NEXT, WRITE, Memory, RingDriver, pages, rings_size

SIZE = 16
RX, TX, CTRL = 0, 1, 2


@pytest.fixture
def rig(network: Network) -> Iterator[Rig]:
    with Rig(network, indirect=True).start() as rig:
        yield rig


def desc(driver: RingDriver, slot: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
    driver.memory.write(driver.desc + 16 * slot, struct.pack("<QIHH", gpa, length, flags, following))


def expect(rig: Rig, queue: int, wanted: VringError) -> None:
    """The chain at head 0 breaks its queue, under its name; nothing is returned; the other queues go on."""
    drive = rig.drivers[queue]
    broken: list[int] = []
    rig.backend.on_broken = broken.append
    before = drive.used_idx()
    drive.offer(0)
    drive.kick()
    rig.until(lambda: broken == [queue])
    assert VringError(rig.backend.counters(queue).broken) is wanted
    assert rig.backend.stats()["malformed"] == 1
    assert drive.used_idx() == before
    others(rig, queue)
    assert rig.backend.stop_queue(queue) == before


def others(rig: Rig, queue: int) -> None:
    wire = rig.network.wire()
    if queue != TX:
        rig.tx[0].send(frame(5))
        assert wire.receive() == frame(5)
    if queue != RX:
        rig.rx[0].post(2048)
        rig.rx[0].kick()
        wire.send(frame(6, to_guest=True))
        assert rig.rx[0].wait(1)[0].frame == frame(6, to_guest=True)
    if queue != CTRL:
        assert rig.command(4, 0, b"\1\0") == 0
    wire.close()


FLAGS = {RX: WRITE, TX: 0, CTRL: 0}
EACH = pytest.mark.parametrize("queue", [RX, TX, CTRL], ids=["rx", "tx", "ctrl"])


@EACH
def test_loop(rig: Rig, queue: int) -> None:
    drive = rig.drivers[queue]
    desc(drive, 0, drive.slot(0), 16, NEXT | FLAGS[queue], 1)
    desc(drive, 1, drive.slot(0), 16, NEXT | FLAGS[queue], 0)
    expect(rig, queue, VringError.TOO_LONG)


@EACH
def test_next_outside_the_table(rig: Rig, queue: int) -> None:
    drive = rig.drivers[queue]
    desc(drive, 0, drive.slot(0), 16, NEXT | FLAGS[queue], SIZE)
    expect(rig, queue, VringError.BAD_NEXT)


@EACH
@pytest.mark.parametrize(
    ("gpa", "length"), [(0, 16), (GPA - 8, 16), ((1 << 64) - 8, 16), (GPA, 0xFFFF_FFFF), (1 << 63, 1)]
)
def test_address_outside_guest_memory(rig: Rig, queue: int, gpa: int, length: int) -> None:
    desc(rig.drivers[queue], 0, gpa, length, FLAGS[queue])
    expect(rig, queue, VringError.BAD_ADDRESS)


@EACH
def test_empty_buffer(rig: Rig, queue: int) -> None:
    desc(rig.drivers[queue], 0, rig.drivers[queue].slot(0), 0, FLAGS[queue])
    expect(rig, queue, VringError.ZERO_LENGTH)


@EACH
def test_readable_after_writable(rig: Rig, queue: int) -> None:
    drive = rig.drivers[queue]
    desc(drive, 0, drive.slot(0), 2048, WRITE | NEXT, 1)
    desc(drive, 1, drive.slot(0), 16, 0)
    expect(rig, queue, VringError.BAD_ORDER)


@EACH
def test_indirect_inside_indirect(rig: Rig, queue: int) -> None:
    drive = rig.drivers[queue]
    table = drive.slot(0) + 64
    rig.memory.write(table, struct.pack("<QIHH", table, 16, INDIRECT, 0))
    desc(drive, 0, table, 16, INDIRECT)
    expect(rig, queue, VringError.BAD_INDIRECT)


@EACH
def test_indirect_not_negotiated(network: Network, queue: int) -> None:
    with Rig(network, indirect=False).start() as rig:
        drive = rig.drivers[queue]
        table = drive.slot(0) + 64
        rig.memory.write(table, struct.pack("<QIHH", drive.slot(0), 2048, FLAGS[queue], 0))
        desc(drive, 0, table, 16, INDIRECT)
        expect(rig, queue, VringError.BAD_INDIRECT)


@pytest.mark.parametrize(
    ("queue", "length", "flags"),
    [(RX, 2048, 0), (RX, 11, WRITE), (TX, 100, WRITE), (TX, 11, 0), (CTRL, 3, 0), (CTRL, 1, WRITE)],
    ids=["rx-readable", "rx-short", "tx-writable", "tx-short", "ctrl-without-ack", "ctrl-without-command"],
)
def test_chain_that_is_no_request(rig: Rig, queue: int, length: int, flags: int) -> None:
    desc(rig.drivers[queue], 0, rig.drivers[queue].slot(0), length, flags)
    expect(rig, queue, VringError.BAD_REQUEST)


@pytest.mark.parametrize("queue", [RX, TX], ids=["rx", "tx"])
def test_chain_of_more_buffers_than_the_kernel_takes_at_once(network: Network, queue: int) -> None:
    with Rig(network, indirect=True, size=SIZE).start() as rig:
        drive = rig.drivers[queue]
        table = drive.slot(1)
        for n in range(1024):
            more = NEXT if n < 1023 else 0
            rig.memory.write(table + 16 * n, struct.pack("<QIHH", drive.slot(0), 1, FLAGS[queue] | more, n + 1))
        desc(drive, 0, table, 16 * 1024, INDIRECT)
        expect(rig, queue, VringError.TOO_LONG)


@EACH
@pytest.mark.parametrize("way", [VringError.BAD_HEAD, VringError.BAD_INDEX])
def test_ring_that_is_broken_itself(rig: Rig, queue: int, way: VringError) -> None:
    drive = rig.drivers[queue]
    broken: list[int] = []
    rig.backend.on_broken = broken.append
    if way is VringError.BAD_HEAD:
        drive.offer(SIZE)
    else:
        drive.memory.u16(drive.avail + 2)[0] = SIZE + 1
    drive.kick()
    rig.until(lambda: broken == [queue])
    assert rig.backend.counters(queue).broken == way
    others(rig, queue)


def test_a_driver_that_resets_the_device_starts_afresh(rig: Rig) -> None:
    desc(rig.tx[0], 0, 0, 16, 0)
    expect(rig, TX, VringError.BAD_ADDRESS)
    rig.tx[0].avail_idx = 0
    rig.memory.u16(rig.tx[0].avail + 2)[0] = 0
    rig.start(TX)
    wire = rig.network.wire()
    rig.tx[0].send(frame(1))
    assert wire.receive() == frame(1)
    wire.close()


def test_repeated_nonsense_is_logged_at_the_1st_2nd_4th_8th_time(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    desc(rig.tx[0], 0, 0, 16, 0)
    rig.tx[0].offer(0)
    for time in range(1, 10):
        rig.tx[0].kick()
        rig.until(lambda time=time: rig.backend.stats()["malformed"] == time)  # type: ignore[misc]
        rig.until(lambda time=time: rig.backend._reported.get(TX) == time)  # type: ignore[misc]
        rig.backend.stop_queue(TX)
        rig.start(TX)
    lines = [line for line in capfd.readouterr().err.splitlines() if "BAD_ADDRESS" in line]
    assert [line.rpartition("; ")[2] for line in lines] == [f"{n} in all" for n in (1, 2, 4, 8)]


# Fuzz -----------------------------------------------------------------------------------------------------------

CANARY = 0xA5
MARGIN = 1 << 20


@pytest.fixture
def fuzzed(network: Network) -> Iterator[tuple[Rig, memoryview]]:
    """A device whose guest memory lies between two canaries in one mapping."""
    size = pages(3 * (rings_size(SIZE) + SIZE * SLOT_BYTES))
    fd = memfd("fuzz", size + 2 * MARGIN)
    base = mmap_fd(fd, size + 2 * MARGIN)
    everything = bytes_at(base, size + 2 * MARGIN)
    memory = Memory.__new__(Memory)
    memory.size, memory.fd, memory.address = size, fd, base + MARGIN
    memory.view = bytes_at(memory.address, size)
    rig = Rig(network, indirect=True, memory=memory, features=PLAIN | virtio_net.F_MRG_RXBUF)
    yield rig, everything
    everything.release()
    memory.address, memory.size = base, size + 2 * MARGIN
    rig.close()


def test_random_rings_touch_nothing_outside_guest_memory(fuzzed: tuple[Rig, memoryview]) -> None:
    rig, everything = fuzzed
    margins = (everything[:MARGIN], everything[-MARGIN:])
    for margin in margins:
        margin[:] = bytes([CANARY]) * MARGIN
    wire, chance, broken, moved = rig.network.wire(), random.Random(1), 0, 0
    for _ in range(400):
        mergeable = chance.choice((0, virtio_net.F_MRG_RXBUF))
        rig.backend.set_features(PLAIN | virtio_net.F_INDIRECT_DESC | mergeable)
        for drive in rig.drivers:
            scribble(rig, drive, chance)
            rig.start(drive.index)
            drive.kick()
        for _ in range(chance.randrange(6)):
            wire.send(frame(1, chance.randrange(60, 1500), to_guest=True))
        rig.settled()
        stats = rig.backend.stats()
        broken += stats["broken_queues"]
        for drive in rig.drivers:
            rig.backend.stop_queue(drive.index)
    moved = rig.backend.stats()["tx_frames"] + rig.backend.stats()["rx_frames"]
    assert broken > 100 and moved > 100, "nothing was tried"
    assert all(bytes(margin) == bytes([CANARY]) * MARGIN for margin in margins)
    for margin in margins:
        margin.release()
    wire.close()


def scribble(rig: Rig, drive: RingDriver, chance: random.Random) -> None:
    """Any rings: mostly of sense in themselves, with something wrong here and there."""
    end = GPA + rig.memory.size
    wrong = chance.choice((0, 0, 0.05, 0.5))
    writable = FLAGS[drive.index]
    for slot in range(SIZE):
        gpa, length, flags, following = GPA + chance.randrange(rig.memory.size - 4096), 100, writable, 0
        if drive.index == RX:
            length = chance.choice((12, 64, 2048))
        if chance.random() < 0.3:
            flags, following = flags | NEXT, chance.randrange(SIZE)
        if chance.random() < wrong:
            gpa = chance.choice((end - 8, end, 0, GPA - 1, (1 << 64) - 16, 1 << 63))
        if chance.random() < wrong:
            length = chance.choice((0, 1, 11, 1 << 31, 0xFFFF_FFFF))
        if chance.random() < wrong:
            flags, following = chance.randrange(16), chance.randrange(SIZE + 3)
        desc(drive, slot, gpa, length, flags, following)
    for n in range(SIZE):
        rig.memory.u16(drive.avail + 4 + 2 * n)[0] = chance.randrange(SIZE + (chance.random() < wrong))
    rig.memory.u16(drive.used + 2)[0] = 0
    rig.memory.u16(drive.avail + 2)[0] = chance.randrange(SIZE + 1 + (chance.random() < wrong))
