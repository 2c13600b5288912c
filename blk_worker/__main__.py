"""The worker's start.

`Start.spec`: path, readonly, direct, serial, sparse, num_queues, queue_size, and what BlockBackend says of trial, blame
and die_on_sector; all but `path` may be missing.
`Start.fds`: `vhost`, a connected vhost-user socket; `disk`, the image already open, else `path` is opened.

`python -m blk_worker` is the same disk as a program for foreign front ends: blk_worker/program.py.
"""

from __future__ import annotations

import socket

from blk_worker.backend import BlockBackend
from blk_worker.disk import open_disk
from shared.messages import Verb
from shared.reactor import Reactor
from shared.vhost_worker import VhostWorker
from shared.worker import Start, serve


def main(start: Start) -> int:
    spec = start.spec
    reactor = Reactor()
    disk = open_disk(
        spec["path"], fd=start.fds.get("disk", -1), readonly=bool(spec.get("readonly")),
        direct=bool(spec.get("direct")), serial=spec.get("serial") or "",
    )  # fmt: skip
    backend = BlockBackend(
        reactor, disk, num_queues=spec.get("num_queues", 1), queue_size=spec.get("queue_size", 128),
        sparse=bool(spec.get("sparse", True)), trial=bool(spec.get("trial")), blame=bool(spec.get("blame")),
        die_on_sector=spec.get("die_on_sector"),
    )  # fmt: skip
    worker = VhostWorker("blk_worker", backend)
    worker.attach(reactor, socket.socket(fileno=start.fds["vhost"]))
    try:
        return serve(start, worker, reactor, {Verb.FLUSH: lambda _: backend.flush()})
    finally:
        backend.close()


if __name__ == "__main__":
    import sys

    from blk_worker.program import run

    sys.exit(run(sys.argv[1:]))
