"""What a hostile guest can put into a ring costs its own queue, until it resets the device, and nothing else."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.native_ring import VringError
from tests.net_worker.rig import Rig
from tests.network import Network, frame
from tests.ring_driver import GPA, INDIRECT, NEXT, WRITE, RingDriver

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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(min_value=0))
def test_random_rings_touch_nothing_outside_guest_memory(network: Network, seed: int) -> None:
    """ASan and the guard pages around the mapping say the rest (test_sanitizers.py runs such rings too)."""
    chance = random.Random(seed)
    with Rig(network, indirect=True).start() as rig:
        for drive in rig.drivers:
            table = b"".join(
                struct.pack("<QIHH", _address(rig, chance), chance.choice((0, 1, 12, 16, 2048, 1 << 31)),
                            chance.randrange(8), chance.randrange(SIZE + 2))
                for _ in range(SIZE)
            )  # fmt: skip
            rig.memory.write(drive.desc, table)
            for _ in range(chance.randrange(1, SIZE)):
                drive.offer(chance.randrange(SIZE))
            drive.kick()
        wire = network.wire()
        wire.send(frame(1, to_guest=True))
        rig.settled()
        wire.close()


def _address(rig: Rig, chance: random.Random) -> int:
    inside = GPA + chance.randrange(rig.memory.size)
    return chance.choice((inside, inside, inside, GPA + rig.memory.size - 8, 0, (1 << 64) - 1))
