"""`main` of the metrics exporter: confined, it serves until it is killed."""

from __future__ import annotations

import gc
import signal
import socket

from metrics_exporter.exposition import encode
from metrics_exporter.http import Server
from metrics_exporter.source import Source
from shared import sandbox
from shared.linux import die_with_parent, set_name
from shared.reactor import Reactor


def main(listen_fd: int, sidecar_fd: int, endpoint: str, parent: int) -> int:
    """`listen_fd` listens, tcp or unix; `sidecar_fd` brings descriptors; `endpoint` is the controller's."""
    set_name("metrics")
    box = sandbox.confine("exporter")
    with box.leave_files():
        pass
    die_with_parent(parent)  # after the credentials have changed
    gc.freeze()  # what has been imported stays
    gc.enable()
    # When to end is the controller's decision, not a terminal's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    reactor = Reactor()
    source = Source(reactor, endpoint, socket.socket(fileno=sidecar_fd))

    async def scrape(accept: str) -> tuple[bytes, str]:
        return encode(await source.measure(), accept)

    Server(reactor, socket.socket(fileno=listen_fd), scrape)
    return reactor.run()
