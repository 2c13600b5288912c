"""The worker's start, and the same disk as a program for foreign front ends (QEMU, Cloud Hypervisor).

`Start.spec`: path, readonly, direct, serial, sparse, num_queues, queue_size; all but `path` may be missing.
`Start.fds`: `vhost`, a connected vhost-user socket; `disk`, the image already open, else `path` is opened.

The program follows "Backend program conventions" of vhost-user.rst: --socket-path, --fd, --print-capabilities, SIGTERM
ends it, it never daemonises. --read-only and --blk-file are the names which that text gives a block back end's options.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blk_worker.backend import BlockBackend
from blk_worker.disk import open_disk
from blk_worker.worker import BlockWorker
from shared import log
from shared.errors import FlotillaError
from shared.reactor import Reactor
from shared.vhost_backend import Server
from shared.worker import Start, serve

if TYPE_CHECKING:
    import argparse

CAPABILITIES = '{\n  "type": "block",\n  "features": [\n    "read-only",\n    "blk-file"\n  ]\n}'


def main(start: Start) -> int:
    spec = start.spec
    reactor = Reactor()
    disk = open_disk(
        spec["path"], fd=start.fds.get("disk", -1), readonly=bool(spec.get("readonly")),
        direct=bool(spec.get("direct")), serial=spec.get("serial") or "",
    )  # fmt: skip
    backend = BlockBackend(
        reactor, disk, num_queues=spec.get("num_queues", 1), queue_size=spec.get("queue_size", 128),
        sparse=bool(spec.get("sparse", True)),
    )  # fmt: skip
    worker = BlockWorker(backend)
    attach(worker, reactor, socket.socket(fileno=start.fds["vhost"]))
    try:
        return serve(start, worker, reactor)
    finally:
        backend.close()


def attach(worker: BlockWorker, reactor: Reactor, sock: socket.socket) -> Server:
    """Serve the front end at the other end of a connected socket."""

    def gone(error: Exception | None) -> None:
        worker.server = None
        worker.backend.on_broken = lambda index: None
        if error is not None:
            log.error(f"disk path={worker.backend.disk.path}: {error}")

    server = worker.server = Server(reactor, sock, worker.backend, gone)
    worker.backend.on_broken = server.queue_failed
    return server


# The program ----------------------------------------------------------------------------------------------------


def program(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.print_capabilities:
        print(CAPABILITIES)
        return 0
    if not options.path:
        _parser().error("--path is missing")
    log.configure(log.Level.INFO, thread="blk_worker")
    try:
        return _serve_program(options)
    except (FlotillaError, OSError) as error:
        print(f"blk_worker: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(prog="blk_worker", description="vhost-user back end for a raw disk image")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", help="listen here")
    where.add_argument("--fd", type=int, metavar="N", help="listening or connected socket, inherited")
    parser.add_argument("--path", "--blk-file", metavar="DISK", help="raw image or block device")
    parser.add_argument("--readonly", "--read-only", action="store_true")
    parser.add_argument("--direct", action="store_true", help="bypass the page cache (O_DIRECT)")
    parser.add_argument("--serial", default="", metavar="TEXT", help="what the guest sees as the disk's serial number")
    parser.add_argument("--num-queues", type=int, default=1, metavar="N")
    parser.add_argument("--queue-size", type=int, default=128, metavar="N")
    parser.add_argument("--print-capabilities", action="store_true", help="print what this back end can do, as JSON")
    return parser


def _serve_program(options: argparse.Namespace) -> int:
    reactor = Reactor()
    disk = open_disk(options.path, readonly=options.readonly, direct=options.direct, serial=options.serial)
    backend = BlockBackend(reactor, disk, num_queues=options.num_queues, queue_size=options.queue_size)
    worker = BlockWorker(backend)
    _stop_on_signals(reactor)
    try:
        if options.fd is not None:
            return _serve_fd(worker, reactor, socket.socket(fileno=options.fd))
        if not options.socket_path:
            raise FlotillaError("neither --socket-path nor --fd is given")
        with _listen(options.socket_path) as listener:
            try:
                return _serve_listener(worker, reactor, listener)
            finally:
                os.unlink(options.socket_path)
    finally:
        backend.close()
        reactor.close()


def _serve_fd(worker: BlockWorker, reactor: Reactor, sock: socket.socket) -> int:
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        with sock:
            return _serve_listener(worker, reactor, sock)
    attach(worker, reactor, sock)
    server_gone = worker.backend  # one connection: its end is ours
    _stop_when_gone(worker, reactor)
    del server_gone
    return reactor.run()


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise FlotillaError(f"--socket-path={path}: {os.strerror(error.errno or 0)}") from error
    return listener


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
