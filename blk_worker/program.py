"""`python -m blk_worker`: the disk as a program for foreign front ends (shared/vhost_program.py).

--read-only and --blk-file are the names that vhost-user.rst gives to a block back end's options.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from blk_worker.backend import BlockBackend
from blk_worker.disk import open_disk
from shared import vhost_program
from shared.reactor import Reactor
from shared.vhost_worker import VhostWorker

CAPABILITIES = '{\n  "type": "block",\n  "features": [\n    "read-only",\n    "blk-file"\n  ]\n}'


def run(arguments: Sequence[str]) -> int:
    return vhost_program.run(arguments, _parser(), CAPABILITIES, "path", _make)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blk_worker", description="vhost-user back end for a raw disk image")
    parser.add_argument("--path", "--blk-file", metavar="DISK", help="raw image or block device")
    parser.add_argument("--readonly", "--read-only", action="store_true")
    parser.add_argument("--direct", action="store_true", help="bypass the page cache (O_DIRECT)")
    parser.add_argument("--serial", default="", metavar="TEXT", help="the disk's serial number as the guest sees it")
    parser.add_argument("--num-queues", type=int, default=1, metavar="N")
    parser.add_argument("--queue-size", type=int, default=128, metavar="N")
    return parser


def _make(options: argparse.Namespace, reactor: Reactor, cleanup: contextlib.ExitStack) -> VhostWorker:
    disk = open_disk(options.path, readonly=options.readonly, direct=options.direct, serial=options.serial)
    backend = BlockBackend(reactor, disk, num_queues=options.num_queues, queue_size=options.queue_size)
    cleanup.callback(backend.close)
    return VhostWorker("blk_worker", backend)
