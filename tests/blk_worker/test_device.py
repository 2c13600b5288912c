"""The device around the requests: configuration space, start and stop, the dirty log, proof of life, state."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blk_worker import native
from blk_worker.backend import BlockBackend
from blk_worker.disk import open_disk
from shared import native as loops
from shared.disk_geometry import Topology
from shared.errors import ConfigError, FlotillaError, ProtocolError
from shared.reactor import Reactor
from shared.vhost_backend import Mapping
from shared.vhost_worker import VhostWorker
from shared.virtio_blk import BlkConfig, Feature, config_space
from tests.blk_worker.driver import GPA, IN, IOERR, OK, OUT, Memory, memory_for, pages
from tests.blk_worker.rig import Rig, image, sector_bytes

PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.raw", 2048)


def test_structures_have_the_sizes_that_c_gives_them() -> None:
    library = native.load()
    assert [ctypes.sizeof(struct) for struct in native.ABI] == [library.blk_abi_size(n) for n in range(len(native.ABI))]
    assert library.blk_abi_size(len(native.ABI)) == 0


# Configuration space --------------------------------------------------------------------------------------------


@pytest.fixture
def disk_64m(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    yield path


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 0x1_3000_6E44),
        ({"readonly": True, "sparse": False}, 0x1_3000_0E64),
        ({"num_queues": 4}, 0x1_3000_7E44),
        ({"sparse": False}, 0x1_3000_4E44),
    ],
)
def test_features_are_cloud_hypervisor_s(disk_64m: Path, options: dict[str, int], wanted: int) -> None:
    reactor = Reactor()
    disk = open_disk(str(disk_64m), readonly=bool(options.get("readonly")))
    backend = BlockBackend(
        reactor, disk, num_queues=options.get("num_queues", 1), sparse=bool(options.get("sparse", True))
    )
    assert hex(backend.features) == hex(wanted)
    backend.close()
    reactor.close()


def test_configuration_space_is_cloud_hypervisor_s(disk_64m: Path) -> None:
    wanted = bytes.fromhex(
        "0000020000000000 00000000 7e000000 00000000 00020000 0000 0100 00000000 0100 0000"
        "ffffffff 01000000 01000000 ffffffff 01000000 01000000"
    )
    disk = open_disk(str(disk_64m))
    assert config_space(disk.geometry, num_queues=1, queue_size=128, sparse=True).pack() == wanted
    disk.close()


def test_configuration_space_of_a_4k_disk_with_queues(disk_64m: Path) -> None:
    disk = open_disk(str(disk_64m))
    geometry = disk.geometry._replace(topology=Topology(4096, 16384, 65536, 1 << 20))
    config = config_space(geometry, num_queues=4, queue_size=256, sparse=False)
    assert (config.blk_size, config.physical_block_exp, config.min_io_size, config.opt_io_size) == (4096, 2, 16, 256)
    assert (config.num_queues, config.seg_max, config.discard_sector_alignment) == (4, 254, 8)
    assert config.write_zeroes_may_unmap == 0
    disk.close()


def test_only_writeback_can_be_written(disk: Path) -> None:
    with Rig(disk) as rig:
        before = rig.backend.get_config(0, 60)
        rig.backend.set_config(0, bytes(60))
        after = rig.backend.get_config(0, 60)
        assert after == before[:32] + b"\0" + before[33:]
        with pytest.raises(ProtocolError):
            rig.backend.set_config(32, bytes(29))


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda p: None, {}, "No such file"),
        (lambda p: p.mkdir(), {}, "directory"),
        (lambda p: p.mkdir(), {"readonly": True}, "neither a file nor a block device"),
        (lambda p: p.write_bytes(b"x" * 511), {}, "not one sector"),
        (lambda p: os.mkfifo(p), {"readonly": False}, "neither a file nor a block device"),
        (lambda p: p.write_bytes(bytes(512)), {"serial": "s" * 21}, "serial"),
    ],
    ids=["missing", "directory", "directory-readonly", "empty", "fifo", "serial"],
)
def test_disk_that_is_none_is_named(tmp_path: Path, make: object, options: dict[str, object], says: str) -> None:
    path = tmp_path / "what"
    make(path)  # type: ignore[operator]  # the lambdas above
    with pytest.raises(ConfigError, match=says) as caught:
        open_disk(str(path), **options)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)


def test_descriptor_for_reading_only_is_refused_for_a_writable_disk(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY)
    with pytest.raises(ConfigError, match="reading only"):
        open_disk(str(disk), fd=fd)


# Start and stop -------------------------------------------------------------------------------------------------


def test_stop_waits_for_what_is_in_flight(disk: Path) -> None:
    """The fence: when stop_queue answers, the slow write is done and its notification sent."""
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        rig.until(lambda: drained(drive.call_fd) == 1)  # that of the ring's start
        rig.backend.fault("hang", 0)
        heads = {drive.submit(OUT, n, sector_bytes(n, 1)) for n in range(3)}
        drive.kick()
        rig.until(lambda: rig.backend.counters(0).inflight > 0)
        rig.backend.request_stop()
        assert not rig.backend._native.blk_stopped(rig.backend._device, 0)
        release = threading.Thread(target=rig.backend.fault, args=("clear", 0))
        release.start()
        base = rig.backend.stop_queue(0)
        release.join()
        assert rig.backend.counters(0).inflight == 0
        taken = drive.reap()
        assert base == drive.used_idx() == len(taken) > 0
        assert drained(drive.call_fd) > 0
        rig.backend.start_queue(rig.ring(0, base))
        left = drive.wait(len(drive.pending)) if drive.pending else {}
        assert set(taken) | set(left) == heads


def test_stopped_queue_takes_nothing(disk: Path) -> None:
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        drive.do(IN, 0, length=512)
        base = rig.backend.stop_queue(0)
        drive.submit(OUT, 0, sector_bytes(0, 1))
        drive.kick()
        assert rig.backend.stop_queue(0) == base == drive.used_idx() == 1
        rig.backend.start_queue(rig.ring(0, base))
        assert len(drive.wait(1)) == 1


def test_request_stop_drains_several_queues_side_by_side(disk: Path) -> None:
    with Rig(disk, queues=3, io_threads=8).start() as rig:
        rig.backend.fault("hang", 0)
        for drive in rig.drive:
            drive.submit(OUT, drive.index, sector_bytes(drive.index, 1))
            drive.kick()
        rig.until(lambda: rig.backend.stats()["inflight"] == 3)
        rig.backend.request_stop()
        release = threading.Thread(target=rig.backend.fault, args=("clear", 0))
        release.start()
        assert [rig.backend.stop_queue(n) for n in range(3)] == [1, 1, 1]
        release.join()


def test_requests_that_were_there_before_the_start_need_no_kick(disk: Path) -> None:
    with Rig(disk) as rig:
        head = rig.drive[0].submit(IN, 5, length=512)
        rig.start()
        assert rig.drive[0].wait(1) == {head: (OK, sector_bytes(5))}


def test_memory_may_be_added_while_queues_run(disk: Path) -> None:
    with Rig(disk).start() as rig:
        extra = Memory(PAGE)
        here = Mapping(GPA, rig.memory.size, 0, rig.memory.address)
        for n in range(50):
            rig.drive[0].submit(IN, n, length=512)
            rig.drive[0].kick()
            rig.backend.set_memory((here, Mapping(1 << 40, PAGE, 0, extra.address)))
            assert list(rig.drive[0].wait(1).values()) == [(OK, sector_bytes(n))]
        rig.backend.stop_queue(0)
        rig.backend.set_memory((here,))
        extra.close()


# Proof of life --------------------------------------------------------------------------------------------------


def test_epoch_rises_while_the_guest_is_idle_and_not_when_a_loop_hangs(disk: Path) -> None:
    with Rig(disk, queues=2).start() as rig:
        for _ in range(4):
            last = rig.backend.epoch()
            rig.until(lambda last=last: rig.backend.epoch() > last)  # type: ignore[misc]
        rig.backend.fault("hang", 0)
        rig.drive[1].submit(IN, 0, length=512)
        rig.drive[1].kick()
        rig.until(lambda: rig.backend.counters(1).inflight == 1)
        rig.backend.epoch()
        stuck = rig.backend.epoch()
        assert rig.backend.epoch() == stuck
        rig.backend.fault("clear", 0)
        rig.drive[1].wait(1)
        rig.until(lambda: rig.backend.epoch() > stuck)


def test_epoch_rises_without_a_running_queue(disk: Path) -> None:
    with Rig(disk) as rig:
        assert rig.backend.epoch() < rig.backend.epoch()


# Dirty log ------------------------------------------------------------------------------------------------------


def marked(log: Memory) -> set[int]:
    data = bytes(log.view)
    return {8 * n + bit for n, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("size", [16, 512], ids=["one-page-used-ring", "two-page-used-ring"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_every_page_that_changes_is_marked(disk: Path, size: int, event_idx: bool) -> None:
    heads = 12
    with Rig(disk, size=size, indirect=True, event_idx=event_idx, memory=memory_for(1, size, heads)) as rig:
        log = Memory(pages((GPA + rig.memory.size) // PAGE // 8 + 1))
        rig.backend.set_log(log.address, log.size)
        rig.start()
        drive, chance = rig.drive[0], random.Random(size)
        drive.free = list(range(heads))
        driver_s = {(drive.avail + 4 + 2 * size) // PAGE}  # used_event, which the driver itself writes
        for n in range(size + 8):
            drive.submit(IN, n, length=512 * chance.randrange(1, 30), split=chance.randrange(1, 5))
            log.view[:] = bytes(log.size)  # before the snapshot: what changes after it is marked after it
            before = bytes(rig.memory.view)
            drive.kick()
            drive.wait(1)
            after = bytes(rig.memory.view)
            spans = [slice(at, at + PAGE) for at in range(0, len(after), PAGE)]
            changed = {(GPA + span.start) // PAGE for span in spans if after[span] != before[span]}
            rig.until(lambda c=changed: c - driver_s <= marked(log))  # type: ignore[misc]
        rig.backend.set_log(0, 0)
        log.view[:] = bytes(log.size)
        drive.do(IN, 0, length=512)
        assert not marked(log)
        rig.backend.stop_queue(0)
        log.close()


def test_failed_read_marks_what_it_may_have_written(disk: Path) -> None:
    with Rig(disk) as rig:
        log = Memory(pages((GPA + rig.memory.size) // PAGE // 8 + 1))
        rig.backend.set_log(log.address, log.size)
        rig.start()
        os.truncate(disk, 512)
        head = rig.drive[0].submit(IN, 0, length=1024)
        rig.drive[0].kick()
        rig.drive[0].wait(1)
        assert (rig.drive[0].slot(head) + 4096) // PAGE in marked(log)
        rig.backend.stop_queue(0)
        log.close()


def test_log_that_ends_early_is_not_overrun(disk: Path) -> None:
    with Rig(disk) as rig:
        log = Memory(PAGE)
        rig.backend.set_log(log.address, GPA // PAGE // 8 + 1)
        rig.start()
        for n in range(8):
            rig.drive[0].do(IN, n, length=4096)
        assert max(marked(log)) // 8 == GPA // PAGE // 8
        rig.backend.stop_queue(0)
        log.close()


# State ----------------------------------------------------------------------------------------------------------


def test_state_goes_to_a_successor(disk: Path) -> None:
    with Rig(disk) as rig:
        worker = VhostWorker("blk_worker", rig.backend)
        rig.backend.set_config(32, b"\0")
        with pytest.raises(ProtocolError, match="save before quiesce"):
            worker.save()
        assert worker.quiesce() == {"bases": {}}
        state = worker.save()
        assert set(state) == {"disk_path", "disk_nsectors", "avail_features", "acked_features", "config"}
        assert state["config"]["geometry"] == {"cylinders": 0, "heads": 0, "sectors": 0}
        assert (state["config"]["writeback"], state["disk_nsectors"]) == (0, 2048)
    with disk.open("ab") as file:
        file.truncate(4096 * 512)
    with Rig(disk) as rig:
        rig.backend.load(state)
        assert rig.backend.save() == state
        rig.start()
        assert rig.drive[0].do(OUT, 0, bytes(512))[0] == OK
        assert rig.backend.stats()["syncs"] == 1
        assert rig.drive[0].do(IN, 2048, length=512)[0] != OK


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}},
        {"avail_features": None},
        {"disk": "smaller"},
        {"config_field": ("capacity", -1)},
        {"config_field": ("blk_size", 1 << 40)},
        {"config_field": ("num_queues", 9)},
    ],
    ids=str,
)
def test_state_that_does_not_fit_is_refused_and_harms_nothing(disk: Path, change: dict[str, object]) -> None:
    with Rig(disk) as rig:
        state = rig.backend.save()
        before = BlkConfig.load(state["config"])
        match change:
            case {"disk": _}:
                state["config"] = dict(state["config"], capacity=4096)
            case {"config_field": (str(name), value)}:
                state["config"] = dict(state["config"], **{name: value})
            case _:
                state |= change
        with pytest.raises(FlotillaError):
            rig.backend.load(state)
        assert rig.backend.config == before
        rig.start()
        assert rig.drive[0].do(IN, 0, length=512)[0] == OK


def test_unknown_fault_is_refused(disk: Path) -> None:
    with Rig(disk) as rig, pytest.raises(ProtocolError, match="unknown fault"):
        rig.backend.fault("die-never", 1)


def test_event_idx_spares_notifications(disk: Path) -> None:
    """A driver that asks for one interrupt after many requests gets far fewer than requests."""
    with Rig(disk, size=64, indirect=True).start() as rig:
        drive = rig.drive[0]
        assert rig.features & Feature.RING_EVENT_IDX
        for n in range(50):
            drive.submit(IN, n, length=512)
        drive.memory.u16(drive.avail + 4 + 2 * drive.size)[0] = 49
        drive.kick()
        rig.until(lambda: drive.used_idx() == 50)
        rig.backend.stop_queue(0)
        assert rig.backend.stats()["calls"] <= 3


# Rehearsed faults -----------------------------------------------------------------------------------------------


def test_a_frozen_ring_thread_takes_no_turn_until_it_is_cleared(disk: Path) -> None:
    with Rig(disk) as rig:
        rig.backend.fault("freeze", 0)
        rig.start()
        rig.backend.epoch()
        rig.drive[0].submit(IN, 0, length=512)
        rig.drive[0].kick()
        stuck = rig.backend.epoch()
        assert rig.backend.epoch() == stuck and not rig.drive[0].reap()
        rig.backend.fault("clear", 0)
        assert len(rig.drive[0].wait(1)) == 1


def test_a_notification_that_got_lost_is_sent_at_the_next_heartbeat(disk: Path) -> None:
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        drive.do(IN, 0, length=512)
        rig.until(lambda: rig.backend.counters(0).inflight == 0)
        drained(drive.call_fd)
        rig.backend.fault("withhold", 1)
        drive.arm()  # else none is owed, and none can be withheld
        drive.submit(IN, 1, length=512)
        drive.kick()
        rig.until(lambda: drive.used_idx() == 2 and rig.backend.counters(0).inflight == 0)
        assert drained(drive.call_fd) == 0
        rig.backend.epoch()
        rig.until(lambda: drained(drive.call_fd) == 1)


def test_a_notification_may_come_twice(disk: Path) -> None:
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        rig.until(lambda: drained(drive.call_fd) == 1)  # that of the ring's start
        rig.backend.fault("repeat", 1)
        drive.submit(IN, 1, length=512)
        drive.kick()
        rig.until(lambda: drive.used_idx() == 1 and rig.backend.counters(0).inflight == 0)
        assert drained(drive.call_fd) == 2


def test_errors_by_sector_range_number_and_rate(disk: Path) -> None:
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        rig.backend.fault("fail", 0, {"first_sector": 8, "last_sector": 15})
        assert [drive.do(IN, n, length=512)[0] for n in (7, 8, 15, 16)] == [OK, IOERR, IOERR, OK]
        rig.backend.fault("clear", 0)
        rig.backend.fault("fail", 1, {"after": 2})
        assert [drive.do(IN, n, length=512)[0] for n in range(4)] == [OK, OK, IOERR, OK]
        failures = []
        for _ in range(2):
            rig.backend.fault("clear", 0)
            rig.backend.fault("fail", 0, {"fail": 300_000, "seed": 7})
            failures.append([drive.do(IN, n % 8, length=512)[0] for n in range(100)])
        assert failures[0] == failures[1] and 10 < failures[0].count(IOERR) < 60


def test_a_fault_is_not_armed_again_by_the_next_one(disk: Path) -> None:
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        rig.backend.fault("fail", 1, {"first_sector": 8, "last_sector": 15})
        assert drive.do(IN, 8, length=512)[0] == IOERR
        rig.backend.fault("delay", 1)
        assert drive.do(IN, 8, length=512)[0] == OK
        rig.until(lambda: rig.backend.counters(0).inflight == 0)
        rig.backend.fault("withhold", 1)
        drive.arm()  # else none is owed, and none can be withheld
        drive.submit(IN, 8, length=512)
        drive.kick()
        rig.until(lambda: drive.used_idx() == 3 and rig.backend.counters(0).inflight == 0)
        rig.backend.fault("delay", 1)
        drive.reap()
        assert drive.do(IN, 8, length=512)[0] == OK


def test_a_fault_that_is_refused_leaves_the_one_before(disk: Path) -> None:
    with Rig(disk).start() as rig:
        drive = rig.drive[0]
        rig.backend.fault("fail", 0, {"first_sector": 8, "last_sector": 15})
        with pytest.raises(ProtocolError, match="fault delay: seed='x'"):
            rig.backend.fault("delay", 1, {"first_sector": 0, "last_sector": 7, "seed": "x"})
        assert [drive.do(IN, n, length=512)[0] for n in (7, 8)] == [OK, IOERR]
        rig.backend.fault("withhold", 0)
        assert [drive.do(IN, n, length=512)[0] for n in (7, 8)] == [OK, OK]


@pytest.mark.parametrize("options", [{"fail": -1}, {"colour": 1}, {"seed": "x"}])
def test_a_fault_with_options_that_make_no_sense_is_refused(disk: Path, options: dict[str, object]) -> None:
    with Rig(disk) as rig, pytest.raises(ProtocolError, match="fault delay"):
        rig.backend.fault("delay", 1, options)


# Requests that killed worker after worker -------------------------------------------------------------------------


POISON, BLINDLY = 3, 4  # deaths: to be failed, and without a look at it


def taken_over(rig: Rig, head: int, deaths: int) -> None:
    """As if a predecessor had taken `head`, the only request, and so many had died of it."""
    assert rig.inflight is not None
    address = rig.inflight.address
    ctypes.memmove(address, struct.pack("<QHHHH", 0, 1, rig.size, 0, 0), 16)
    ctypes.memmove(address + 16 + 16 * head, struct.pack("<BB4xHQ", 1, deaths, 0, 0), 16)


@pytest.mark.parametrize(
    ("deaths", "where", "stats"),
    [(POISON, ", the last at sector 9", {"poisoned_sector": 9}), (BLINDLY, "", {})],
    ids=["seen", "blindly"],
)
def test_a_poisoned_request_is_told_once_and_with_its_sector_if_there_is_one(
    disk: Path, capfd: pytest.CaptureFixture[str], deaths: int, where: str, stats: dict[str, int]
) -> None:
    with Rig(disk, inflight=True, trial=True) as rig:
        drive = rig.drive[0]
        head = drive.submit(IN, 9, length=512)
        taken_over(rig, head, deaths)
        rig.start()
        status = IOERR if deaths == POISON else 0xEE
        assert drive.wait(1)[head][0] == status
        rig.until(lambda: rig.backend.stats()["inflight"] == 0)
        told = ""

        def reported() -> bool:
            nonlocal told
            told += capfd.readouterr().err
            return "killed" in told

        rig.until(reported)
        rig.backend._report()
        lines = (told + capfd.readouterr().err).splitlines()
        assert len(lines) == 1
        assert lines[0].endswith(f"1 requests that had killed their worker again and again were failed{where}")
        found = rig.backend.stats()
        assert (found["errors"], found["poisoned"]) == (1, 1)
        assert {key: value for key, value in found.items() if key == "poisoned_sector"} == stats
        rig.backend.fault("fail", 1)
        assert drive.do(IN, 8, length=512)[0] == IOERR
        rig.backend._report()
        assert "1 requests failed: Input/output error" in capfd.readouterr().err


# Stands still, once armed, in the next copy of a request's header.
HELD = """
#define _GNU_SOURCE
#include <string.h>
#include <sched.h>
int held_copies; /* 1: armed, 2: held */
static void *held_memcpy(void *to, const void *from, size_t size)
{
    int armed = 1;
    if (size == 16 && __atomic_compare_exchange_n(&held_copies, &armed, 2, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        while (__atomic_load_n(&held_copies, __ATOMIC_SEQ_CST) == 2)
            sched_yield();
    return memcpy(to, from, size);
}
#define memcpy held_memcpy
"""


def test_a_poisoned_request_is_counted_when_its_sector_is_known(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees the count tells the sector with it: it must not be seen before."""
    library, loop = tmp_path / "blk.so", loops.LOOPS["blk"]
    (tmp_path / "held.h").write_text(HELD)
    command = ["gcc", "-std=gnu11", *loop.cflags, "-include", tmp_path / "held.h", "-o", library, loop.source]
    subprocess.run(command, cwd=loops.ROOT, check=True, timeout=60)
    monkeypatch.setitem(loops.LOOPS, "blk", loop._replace(library=str(library)))
    with Rig(disk, inflight=True, trial=True) as rig:
        drive, held = rig.drive[0], ctypes.c_int.in_dll(rig.backend._native, "held_copies")
        taken_over(rig, drive.submit(IN, 9, length=512), POISON)
        held.value = 1
        rig.start()
        try:
            rig.until(lambda: held.value == 2)
            before = rig.backend.stats()
        finally:
            held.value = 0
        assert before["poisoned"] == 0 and "poisoned_sector" not in before
        drive.wait(1)
        after = rig.backend.stats()
        assert (after["poisoned"], after["poisoned_sector"]) == (1, 9)


def drained(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
