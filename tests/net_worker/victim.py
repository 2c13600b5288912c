"""A network card without vhost-user, in a process that is meant to die: `python -m tests.net_worker.victim JSON`.

JSON: ram_size, size (of the rings) and descriptors as in `main`. Prints "up" once the queues run, serves until its
standard input ends, then stops in good order and exits 0.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from net_worker.backend import NetBackend
from shared.native_ring import Step
from shared.reactor import Reactor
from shared.vhost_backend import Mapping, Ring
from tests.net_worker.rig import PLAIN, SPEC
from tests.ring_driver import GPA, Memory


def main(text: str) -> int:
    task: dict[str, Any] = json.loads(text)
    reactor = Reactor()
    memory = Memory(task["ram_size"], task["ram_fd"])
    host = memory.address - GPA
    backend = NetBackend(reactor, SPEC, [task["tap_fd"]])
    backend.set_features(PLAIN | task["features"])
    backend.set_memory((Mapping(GPA, memory.size, 0, memory.address),))
    if task["step"]:
        backend.fault(f"die-{Step(task['step']).name.lower()}", task["nth"])
    for queue in task["queues"]:
        backend.start_queue(
            Ring(
                index=queue["index"], size=task["size"], desc=host + queue["desc"], avail=host + queue["avail"],
                used=host + queue["used"], base=0, kick_fd=queue["kick_fd"], call_fd=queue["call_fd"],
                log_used=False, used_gpa=0, inflight=0, inflight_desc_num=0,
            )
        )  # fmt: skip
    print("up", flush=True)
    reactor.add_reader(sys.stdin.fileno(), reactor.stop)
    reactor.run()
    for queue in task["queues"]:
        backend.stop_queue(queue["index"])
    backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
