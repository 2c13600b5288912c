"""A block device without vhost-user, in a process that is meant to die: `python -m tests.blk_worker.victim JSON`.

JSON: path, size (of the ring), queue features and descriptors as in `main`. Prints "up" once the queue runs, serves
until its standard input ends, then stops in good order and exits 0.
"""

from __future__ import annotations

import json
import sys

from shared.native_ring import Step
from shared.vhost_backend import Ring
from tests.blk_worker.driver import Memory
from tests.blk_worker.rig import Rig


def main(text: str) -> int:
    task = json.loads(text)
    rig = Rig(
        task["path"], size=task["size"], indirect=True, io_threads=3, memory=Memory(task["ram_size"], task["ram_fd"])
    )
    drive = rig.drive[0]
    inflight = Memory(task["inflight_size"], task["inflight_fd"])
    plain = rig.ring(0, drive.used_idx())
    ring = Ring(
        index=0, size=plain.size, desc=plain.desc, avail=plain.avail, used=plain.used, base=plain.base,
        kick_fd=task["kick_fd"], call_fd=task["call_fd"], log_used=False, used_gpa=0,
        inflight=inflight.address, inflight_desc_num=plain.size,
    )  # fmt: skip
    if task["step"]:
        rig.backend.fault(f"die-{Step(task['step']).name.lower()}", task["nth"])
    rig.backend.start_queue(ring)
    print("up", flush=True)
    rig.reactor.add_reader(sys.stdin.fileno(), rig.reactor.stop)
    rig.reactor.run()
    base = rig.backend.stop_queue(0)
    assert base == drive.used_idx(), f"stopped at {base}, used.idx {drive.used_idx()}"
    print(rig.backend.stats()["resubmitted"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
