"""`main(start)` of the metrics exporter: sealed, it serves until it is killed."""

from __future__ import annotations

import gc
import socket

from metrics_exporter.exposition import encode, rehearse
from metrics_exporter.http import Server
from metrics_exporter.source import Source
from shared.reactor import Reactor
from shared.worker import Start


def main(start: Start) -> int:
    """`fds`: "listening", tcp or unix; "sidecar", which brings descriptors. `spec`: "controller", the endpoint to dial.

    A controller that is not there is this process's end: a successor tries.
    """
    gc.freeze()  # what has been imported stays
    rehearse()
    reactor = Reactor()
    with start.sandbox.leave_files(start.spec["controller"]) as endpoint:
        source = Source(reactor, endpoint, socket.socket(fileno=start.fds["sidecar"]))
        reactor.run_until(source.connected())
    start.sandbox.seal()

    async def scrape(accept: str) -> tuple[bytes, str]:
        return encode(await source.measure(), accept)

    Server(reactor, socket.socket(fileno=start.fds["listening"]), scrape)
    return reactor.run()
