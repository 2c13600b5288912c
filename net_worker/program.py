"""`python -m net_worker`: the network card as a program for foreign front ends (shared/vhost_program.py)."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from net_worker.backend import NetBackend
from net_worker.tap import open_tap
from shared import vhost_program
from shared.reactor import Reactor
from shared.vhost_worker import VhostWorker

CAPABILITIES = '{\n  "type": "net"\n}'


def run(arguments: Sequence[str]) -> int:
    return vhost_program.run(arguments, _parser(), CAPABILITIES, "tap", _make)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="net_worker", description="vhost-user back end for a TAP interface")
    parser.add_argument("--tap", metavar="NAME", help="the interface, made unless it exists")
    parser.add_argument("--mac", default="52:54:00:12:34:56", metavar="MAC", help="for announcements")
    parser.add_argument("--mtu", type=int, metavar="BYTES")
    parser.add_argument("--queue-pairs", type=int, default=1, metavar="N")
    for name in ("csum", "tso", "ufo"):
        parser.add_argument(f"--no-{name}", action="store_true", help=f"do not offer {name.upper()} offload")
    return parser


def _make(options: argparse.Namespace, reactor: Reactor, cleanup: contextlib.ExitStack) -> VhostWorker:
    spec = {
        "mac": options.mac, "mtu": options.mtu, "queue_pairs": options.queue_pairs, "queue_size": 256,
        "offload_csum": not options.no_csum, "offload_tso": not options.no_tso, "offload_ufo": not options.no_ufo,
    }  # fmt: skip
    backend = NetBackend(reactor, spec, open_tap(options.tap, options.queue_pairs), f"tap {options.tap}")
    cleanup.callback(backend.close)
    return VhostWorker("net_worker", backend)
