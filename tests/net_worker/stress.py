"""A storm over the native loop, for sanitizers: `python -m tests.net_worker.stress LIBRARY SECONDS`.

Two pairs under traffic both ways, and at the same time everything that the reactor may do to them: stop and start, the
dirty log on and off, memory added, pairs and offloads switched, malformed chains. Exit code 0: every packet was right.
"""

from __future__ import annotations

import random
import struct
import sys
import time

from shared import native, virtio_net
from shared.vhost_backend import Mapping
from tests.net_worker.driver import RxDriver, TxDriver
from tests.net_worker.rig import PLAIN, Rig
from tests.net_worker.test_packets import send_to_segment
from tests.network import Network, Wire, frame, number_of
from tests.ring_driver import GPA, Memory, RingDriver, pages

SIZE = 16


def send(tx: TxDriver, chance: random.Random) -> None:
    while tx.free:
        size = chance.randrange(60, 1500)
        cuts = sorted(chance.sample(range(1, size + 12), chance.randrange(5)))
        tx.put(frame(chance.randrange(1 << 32), size), cuts=cuts)
    tx.kick()


def check(data: bytes) -> bool:
    """Whether a frame of ours came through whole; what others send on the wire is no matter."""
    if data[12:14] != b"\x88\xb5":
        return False
    assert data == frame(number_of(data), len(data), to_guest=data[0] == 0x52)
    return True


def receive(rx: RxDriver, chance: random.Random) -> int:
    count = sum(check(packet.frame) for packet in rx.packets())
    while rx.free:
        rx.post(*(chance.choice(((2048,), (12, 2036), (100, 70_000), (1, 11, 3000)))))
    rx.kick()
    return count


def nonsense(rig: Rig, drive: RingDriver, chance: random.Random) -> None:
    """A malformed chain, alone in its ring; then the driver resets."""
    rig.backend.stop_queue(drive.index)
    drive.completed()
    entry = struct.pack("<QIHH", chance.randrange(1 << 64), chance.randrange(1 << 32), chance.randrange(8), 3)
    drive.memory.write(drive.desc, entry)
    drive.avail_idx = drive.used_idx()
    drive.offer(0)
    rig.start(drive.index)
    rig.settled()
    rig.backend.stop_queue(drive.index)
    drive.avail_idx = drive.used_seen = drive.used_idx()
    drive.memory.u16(drive.avail + 2)[0] = drive.avail_idx
    if isinstance(drive, RxDriver):
        drive.posted.clear()
    elif isinstance(drive, TxDriver):
        drive.pending.clear()
    if isinstance(drive, RxDriver | TxDriver):
        drive.free.clear()
        drive.free.extend(range(SIZE))
    rig.start(drive.index)


def storm(rig: Rig, wires: tuple[Wire, Wire], log: Memory, extra: Memory, chance: random.Random, end: float) -> int:
    own = Mapping(GPA, rig.memory.size, 0, rig.memory.address)
    got = turn = 0
    while time.monotonic() < end or turn < 31:
        turn += 1
        for tx in rig.tx:
            send(tx, chance)
        for n in range(8):
            wires[0].send(frame(n, chance.randrange(60, 1500), to_guest=True))
        match turn % 7:
            case 0:
                index = chance.randrange(4)
                rig.backend.stop_queue(index)
                rig.start(index)
            case 1:
                rig.backend.set_log(log.address, log.size)
            case 2:
                rig.backend.set_log(0, 0)
            case 3:
                rig.backend.set_memory((own, Mapping(1 << 40, 4096, 0, extra.address)))
            case 4:
                rig.command(4, 0, struct.pack("<H", chance.randrange(1, 3)))
                rig.command(5, 0, struct.pack("<Q", chance.choice((0, 2, virtio_net.GUEST_OFFLOADS))))
            case 5:
                send_to_segment(rig.network, bytes(chance.randrange(2000, 60_000)))
            case _:
                rig.backend.epoch()
                rig.backend.stats()
        for tx in rig.tx:
            tx.drain()
        got += sum(receive(rx, chance) for rx in rig.rx)
        while not wires[1].silent():
            check(wires[1].receive())
        if turn % 30 == 0:
            nonsense(rig, chance.choice([rig.rx[0], rig.tx[0]]), chance)  # the pair that always runs
    return got


def main(library: str, seconds: float) -> int:
    native.LOOPS["net"] = native.LOOPS["net"]._replace(library=library)
    network = Network(queues=2)
    wires = network.wire(), network.wire()
    log, extra = Memory(pages(1 << 20)), Memory(4096)
    got = 0
    for mergeable in (0, virtio_net.F_MRG_RXBUF):
        features, end = PLAIN | mergeable, time.monotonic() + seconds / 2
        with Rig(network, pairs=2, size=SIZE, indirect=True, features=features, region=True).start() as rig:
            got += storm(rig, wires, log, extra, random.Random(mergeable), end)
            stats = rig.backend.stats()
            assert stats["malformed"] > 0 and stats["tx_frames"] > 100
    print(got)
    for thing in (*wires, log, extra, network):
        thing.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
