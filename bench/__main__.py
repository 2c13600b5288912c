"""`python -m bench boot | footprint | migrate-local | migrate-remote |
net | migrate-net | sandbox | faults`. Exit code 1 when ours could not be measured."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

from bench import (
    boot,
    faults,
    footprint,
    lab,
    migrate_local,
    migrate_net,
    migrate_remote,
    net,
    net_debian,
    processes,
    report,
    sandbox,
)
from guest import build
from shared.errors import FlotillaError

DESCRIPTION = """\
Figures of Flotilla beside its peers, in the same run on the same machine.

  boot            exec of the VMM to the first byte on the guest's serial port
  footprint       memory of each process beyond guest RAM
  migrate-local   downtime of a local migration as the guest sees it; --lab: on the lab's KVM
  migrate-remote  throughput and downtime of a migration over loopback, idle and with a guest that writes
  net             frames and bytes a second through a network card on a TAP, and round trips; --debian: iperf3 of a
                  Debian guest (~/workloads; a KVM that runs Linux), --lab: that in the lab
  migrate-net     silence of a guest's network, and what is lost, while it moves to another host
  sandbox         block requests and the way to the first one, with the processes' filters and without
  faults          how long a guest under load waits while a process of its VMM is replaced

Peers: QEMU from PATH; Cloud Hypervisor and Firecracker where FLOTILLA_BENCH_CLOUD_HYPERVISOR and
FLOTILLA_BENCH_FIRECRACKER name a binary. A peer that can't be measured is reported with the reason.
"""
RUNS = {
    "boot": 20, "footprint": 3, "migrate-local": 5, "migrate-remote": 1, "net": 5, "migrate-net": 5, "sandbox": 10,
    "faults": 20,
}  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--runs", type=_positive, metavar="N", help="samples of each peer")
    common.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    common.add_argument("--kernel", metavar="ELF", help="the probe guest (default: built when needed)")
    common.add_argument("--patience", type=_positive, default=30, metavar="S", help="longest wait for anything")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=DESCRIPTION, formatter_class=form)
    verbs = parser.add_subparsers(dest="bench", required=True)
    for name in ("boot", "footprint", "migrate-net"):
        verbs.add_parser(name, parents=[common])
    migration = verbs.add_parser("migrate-local", parents=[common])
    migration.add_argument("--sizes", nargs="+", type=_size, default=list(migrate_local.SIZES), metavar="SIZE")
    migration.add_argument("--lab", action="store_true", help="inside the lab (deploy/lab/README.md)")
    migration.add_argument("--tick-us", type=_positive, default=1000, metavar="N", help="a heartbeat each N us")
    migration.add_argument("--sleep", action="store_true", help="the guest sleeps between heartbeats, not spins")
    remote = verbs.add_parser("migrate-remote", parents=[common])
    remote.add_argument("--sizes", nargs="+", type=_size, default=list(migrate_remote.SIZES), metavar="SIZE")
    ways, rates = migrate_remote.WAYS, migrate_remote.RATES
    remote.add_argument("--ways", nargs="+", choices=ways, default=list(ways))
    remote.add_argument("--rates", nargs="+", type=int, default=list(rates), metavar="MIB", help="the guest writes")
    card = verbs.add_parser("net", parents=[common])
    card.add_argument("--cases", nargs="+", choices=[str(case) for case in net.CASES], default=[], metavar="CASE")
    card.add_argument("--seconds", type=float, default=2.0, metavar="S", help="that a sample takes")
    guest = card.add_mutually_exclusive_group()
    guest.add_argument("--debian", action="store_true", help="a Debian guest's iperf3 instead of the probe guest")
    guest.add_argument("--lab", action="store_true", help="--debian inside the lab (deploy/lab/README.md)")
    walls = verbs.add_parser("sandbox", parents=[common])
    walls.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of I/O that a sample counts")
    rehearsal = verbs.add_parser("faults", parents=[common])
    names = [str(case) for case in faults.CASES]
    rehearsal.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    options = parser.parse_args(arguments)
    if options.bench == "net" and options.cases and (options.debian or options.lab):
        card.error("--cases are the probe guest's: leave out --debian and --lab")
    options.runs = options.runs or RUNS[options.bench]
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return number


def _size(text: str) -> str:
    if not text[:-1].isdigit() or text[-1:] not in ("M", "G") or not int(text[:-1]):
        raise argparse.ArgumentTypeError(f"{text}: write it like 256M or 4G")
    return text


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Raises FlotillaError when the probe guest can't be built or the lab does not answer."""
    kernel = options.kernel or str(build.build())
    if options.bench == "boot":
        return boot.run(kernel, options.runs, options.patience)
    if options.bench == "footprint":
        return footprint.run(kernel, options.runs, options.patience)
    if options.bench == "migrate-remote":
        return migrate_remote.run(
            kernel, options.runs, options.patience, options.sizes, options.ways, options.rates
        )
    if options.bench == "net" and options.lab:
        words = ["net", "--debian", "--runs", str(options.runs), "--seconds", str(options.seconds)]
        return lab.run(kernel, words, lab_memory(()))
    if options.bench == "net" and options.debian:
        return net_debian.run(options.runs, options.patience, options.seconds)
    if options.bench == "net":
        return net.run(kernel, options.runs, options.patience, options.seconds, options.cases)
    if options.bench == "sandbox":
        return sandbox.run(kernel, options.runs, options.patience, options.seconds)
    if options.bench == "faults":
        return faults.run(kernel, options.runs, options.patience, options.cases)
    if options.bench == "migrate-net":
        return migrate_net.run(kernel, options.runs, options.patience)
    if options.lab:
        words = ["migrate-local", "--sizes", *options.sizes, "--runs", str(options.runs)]
        words += ["--tick-us", str(lab.TICK_US), "--sleep"]
        return lab.run(kernel, words, lab_memory(options.sizes))
    return migrate_local.run(
        kernel, options.runs, options.patience, options.sizes, options.tick_us, not options.sleep
    )


def lab_memory(sizes: Sequence[str]) -> str:
    """RAM of a lab machine that may hold such guests: what a guest does not touch costs nothing."""
    largest = max((int(size[:-1]) * {"M": 1, "G": 1024}[size[-1]] for size in sizes), default=0)
    return f"{max(4096, largest + 2048)}M"


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    # So that a bench that is told to end takes its VMMs, or its lab, with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    processes.become_subreaper()
    try:
        answer = measure(options)
    except FlotillaError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    report.show(answer, options.json)
    return int(any(row["missing"] for row in answer["rows"] if row["peer"] == "flotilla"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
