"""The worker's start.

`Start.spec`: mac ("52:54:…"), mtu (int or None), queue_pairs, queue_size, offload_tso, offload_ufo, offload_csum;
after a predecessor's death `trial` and `blame` (net_worker/net_trial.h); for tests `lethal`, an EtherType that kills.
`Start.fds`: `vhost`, a connected vhost-user socket; `tap0`, `tap1`, …: one queue of the TAP for each pair.

`python -m net_worker` is the same card as a program for foreign front ends: net_worker/program.py.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from net_worker.backend import NetBackend
from shared import atomics, log
from shared.errors import FlotillaError
from shared.messages import Verb
from shared.reactor import Reactor, describe
from shared.vhost_worker import VhostWorker
from shared.worker import Start, serve


def main(start: Start) -> int:
    atomics.preload()
    reactor = Reactor()
    try:
        taps = [start.fds[name] for name in _tap_names(start.fds)]
        backend = NetBackend(reactor, start.spec, taps, start.name)
    except (FlotillaError, OSError) as error:
        log.error(describe(error))
        return 1
    worker = VhostWorker("net_worker", backend)
    worker.attach(reactor, socket.socket(fileno=start.fds["vhost"]))

    def announce(_: dict[str, Any]) -> dict[str, Any]:
        backend.announce()
        return {}

    try:
        return serve(start, worker, reactor, {Verb.ANNOUNCE: announce})
    finally:
        backend.close()


def _tap_names(fds: Mapping[str, int]) -> list[str]:
    """tap0, tap1, … in this order, up to the first that is not there."""
    names = [f"tap{pair}" for pair in range(len(fds))]
    return [name for name in names if name in fds]


if __name__ == "__main__":
    import sys

    from net_worker.program import run

    sys.exit(run(sys.argv[1:]))
