"""The worker's start.

`Start.spec`: path, readonly, direct, serial, sparse, num_queues, queue_size; all but `path` may be missing.
`Start.fds`: `vhost`, a connected vhost-user socket; `disk`, the image already open, else `path` is opened.

`python -m blk_worker` is the same disk as a program for foreign front ends: blk_worker/program.py.
"""

from __future__ import annotations

import socket

from blk_worker.backend import BlockBackend
from blk_worker.disk import open_disk
from shared import log
from shared.errors import FlotillaError
from shared.reactor import Reactor, describe
from shared.vhost_worker import VhostWorker
from shared.worker import Start, serve


def main(start: Start) -> int:
    spec = start.spec
    reactor = Reactor()
    try:
        disk = open_disk(
            spec["path"], fd=start.fds.get("disk", -1), readonly=bool(spec.get("readonly")),
            direct=bool(spec.get("direct")), serial=spec.get("serial") or "",
        )  # fmt: skip
        backend = BlockBackend(
            reactor, disk, num_queues=spec.get("num_queues", 1), queue_size=spec.get("queue_size", 128),
            sparse=bool(spec.get("sparse", True)),
        )  # fmt: skip
    except (FlotillaError, OSError) as error:
        log.error(describe(error))
        return 1
    worker = VhostWorker("blk_worker", backend)
    worker.attach(reactor, socket.socket(fileno=start.fds["vhost"]))
    try:
        return serve(start, worker, reactor)
    finally:
        backend.close()


if __name__ == "__main__":
    import sys

    from blk_worker.program import run

    sys.exit(run(sys.argv[1:]))
