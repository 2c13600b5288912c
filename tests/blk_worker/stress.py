"""A storm over the native loop, for sanitizers: `python -m tests.blk_worker.stress LIBRARY DISK SECONDS`.

Two queues under load, and at the same time everything that the reactor may do to them: stop and start, the dirty log on
and off, memory added, malformed chains, faults. Exit code 0: every answer was right. The sanitizers say the rest.
"""

from __future__ import annotations

import random
import struct
import sys
import time
from pathlib import Path

from shared import native
from shared.vhost_backend import Mapping
from tests.blk_worker.driver import GPA, IN, OK, OUT, Driver, Memory, pages
from tests.blk_worker.rig import Rig, sector_bytes

SECTORS = 2048
MIN_TURNS = 120  # every kind of turn, and more than 100 requests, however little of the time was ours


def submit(drive: Driver, chance: random.Random, stamps: dict[int, int], busy: dict[int, tuple[int, int]]) -> None:
    while drive.free:
        sector = chance.randrange(SECTORS // 2) * 2 + drive.index
        if sector in {number for number, _ in busy.values()}:
            return
        kind = chance.choice((IN, OUT))
        data = sector_bytes(sector, stamps.get(sector, 0) + 1) if kind == OUT else b""
        head = drive.submit(kind, sector, data, 512, split=chance.randrange(1, 9))
        busy[head] = sector, kind


def take(drive: Driver, count: int, stamps: dict[int, int], busy: dict[int, tuple[int, int]]) -> None:
    for head, (status, data) in drive.wait(count).items():
        sector, kind = busy.pop(head)
        assert status == OK
        if kind == OUT:
            stamps[sector] = stamps.get(sector, 0) + 1
        else:
            assert data == sector_bytes(sector, stamps.get(sector, 0))


def nonsense(drive: Driver, chance: random.Random) -> None:
    """A malformed chain, alone in flight."""
    head = drive.free.pop()
    entry = struct.pack("<QIHH", chance.randrange(1 << 64), chance.randrange(1 << 32), chance.randrange(8), 3)
    drive.memory.write(drive.desc + 16 * head, entry)
    before = drive.used_seen
    drive.offer(head)
    drive.kick()
    while drive.used_idx() == before:
        time.sleep(0)
    drive.used_seen = drive.used_idx()
    drive.free.append(head)


def main(library: str, disk: str, seconds: float) -> int:
    native.LOOPS["blk"] = native.LOOPS["blk"]._replace(library=library)
    chance = random.Random(1)
    rig = Rig(Path(disk), queues=2, size=32, indirect=True, inflight=True).start()
    log = Memory(pages((GPA + rig.memory.size) // 4096 // 8 + 1))
    extra = Memory(4096)
    stamps: list[dict[int, int]] = [{}, {}]
    busy: list[dict[int, tuple[int, int]]] = [{}, {}]
    own = Mapping(GPA, rig.memory.size, 0, rig.memory.address)
    end = time.monotonic() + seconds
    turn = 0
    while time.monotonic() < end or turn < MIN_TURNS:
        turn += 1
        for n, drive in enumerate(rig.drive):
            submit(drive, chance, stamps[n], busy[n])
            drive.kick()
        match turn % 6:
            case 0:
                index = chance.randrange(2)
                rig.backend.start_queue(rig.ring(index, rig.backend.stop_queue(index)))
            case 1:
                rig.backend.set_log(log.address, log.size)
            case 2:
                rig.backend.set_log(0, 0)
            case 3:
                rig.backend.set_memory((own, Mapping(1 << 40, 4096, 0, extra.address)))
            case 4:
                rig.backend.fault("delay" if turn % 60 == 4 else "clear", 1)
            case _:
                rig.backend.epoch()
                rig.backend.stats()
        for n, drive in enumerate(rig.drive):
            take(drive, chance.randrange(1, len(drive.pending) + 1) if turn % 20 else len(drive.pending),
                 stamps[n], busy[n])  # fmt: skip
            if not drive.pending:
                nonsense(drive, chance)
    rig.backend.fault("clear", 0)
    for n, drive in enumerate(rig.drive):
        take(drive, len(drive.pending), stamps[n], busy[n])
    assert rig.backend.stats()["malformed"] > 0
    print(rig.backend.stats()["read_ops"] + rig.backend.stats()["write_ops"])
    rig.close()
    log.close()
    extra.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
