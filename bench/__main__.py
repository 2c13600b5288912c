"""`python -m bench NAME`: see BENCHES. Exit code 1 when ours could not be measured."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

PEERS = """\
Peers: QEMU from PATH; Cloud Hypervisor and Firecracker where FLOTILLA_BENCH_CLOUD_HYPERVISOR and
FLOTILLA_BENCH_FIRECRACKER name a binary. A peer that can't be measured is reported with the reason.
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """`runs`: samples of each peer unless the user says otherwise. `arguments` adds options of its own; `measure` takes
    all options and the probe guest's path, and raises FlotillaError when the lab does not answer."""

    text: str
    runs: int
    measure: Callable[[argparse.Namespace, str], dict[str, Any]]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None


def _boot(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    return boot.run(kernel, options.runs, options.patience)


def _footprint(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    return footprint.run(kernel, options.runs, options.patience)


def _local_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", type=_size, default=list(migrate_local.SIZES), metavar="SIZE")
    parser.add_argument("--lab", action="store_true", help="inside the lab (deploy/lab/README.md)")
    parser.add_argument("--tick-us", type=_positive, default=1000, metavar="N", help="a heartbeat each N us")
    parser.add_argument("--sleep", action="store_true", help="the guest sleeps between heartbeats, not spins")


def _local(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    runs, sizes = options.runs, options.sizes
    if options.lab:
        words = ["migrate-local", "--sizes", *sizes, "--runs", str(runs), "--tick-us", str(lab.TICK_US), "--sleep"]
        return lab.run(kernel, words, lab_memory(sizes))
    return migrate_local.run(kernel, runs, options.patience, sizes, options.tick_us, not options.sleep)


def _remote_arguments(parser: argparse.ArgumentParser) -> None:
    ways, rates = list(migrate_remote.WAYS), list(migrate_remote.RATES)
    parser.add_argument("--sizes", nargs="+", type=_size, default=list(migrate_remote.SIZES), metavar="SIZE")
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--rates", nargs="+", type=int, default=rates, metavar="MIB", help="the guest writes")


def _remote(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    what = (options.sizes, options.ways, options.rates)
    return migrate_remote.run(kernel, options.runs, options.patience, *what)


def _net_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=[str(case) for case in net.CASES], default=[], metavar="CASE")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="that a sample takes")
    guest = parser.add_mutually_exclusive_group()
    guest.add_argument("--debian", action="store_true", help="a Debian guest's iperf3 instead of the probe guest")
    guest.add_argument("--lab", action="store_true", help="--debian inside the lab (deploy/lab/README.md)")


def _net(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    runs, patience, seconds = options.runs, options.patience, options.seconds
    if options.lab:
        words = ["net", "--debian", "--runs", str(runs), "--seconds", str(seconds)]
        return lab.run(kernel, words, lab_memory(()))
    if options.debian:
        return net_debian.run(runs, patience, seconds)
    return net.run(kernel, runs, patience, seconds, options.cases)


def _migrate_net(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    return migrate_net.run(kernel, options.runs, options.patience)


def _sandbox_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of I/O that a sample counts")


def _sandbox(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    return sandbox.run(kernel, options.runs, options.patience, options.seconds)


def _faults_arguments(parser: argparse.ArgumentParser) -> None:
    names = [str(case) for case in faults.CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")


def _faults(options: argparse.Namespace, kernel: str) -> dict[str, Any]:
    return faults.run(kernel, options.runs, options.patience, options.cases)


BENCHES = {
    "boot": Bench("exec of the VMM to the first byte on the guest's serial port", 20, _boot),
    "footprint": Bench("memory of each process beyond guest RAM", 3, _footprint),
    "migrate-local": Bench(
        "downtime of a local migration as the guest sees it; --lab: on the lab's KVM", 5, _local, _local_arguments
    ),
    "migrate-remote": Bench(
        "throughput and downtime of a migration over loopback, idle and with a guest that writes", 1,
        _remote, _remote_arguments,
    ),
    "net": Bench(
        "frames and bytes a second through a network card on a TAP, and round trips; --debian: iperf3 of a "
        "Debian guest (~/workloads; a KVM that runs Linux), --lab: that in the lab", 5, _net, _net_arguments,
    ),
    "migrate-net": Bench(
        "silence of a guest's network, and what is lost, while it moves to another host", 5, _migrate_net
    ),
    "sandbox": Bench(
        "block requests and the way to the first one, with the processes' filters and without", 10,
        _sandbox, _sandbox_arguments,
    ),
    "faults": Bench(
        "how long a guest under load waits while a process of its VMM is replaced", 20, _faults, _faults_arguments
    ),
}  # fmt: skip


def _description() -> str:
    lines = ["Figures of Flotilla beside its peers, in the same run on the same machine.", ""]
    for name, bench in BENCHES.items():
        first, *rest = textwrap.wrap(bench.text, 96)
        lines += [f"  {name:15} {first}", *(f"  {'':15} {line}" for line in rest)]
    return "\n".join([*lines, "", PEERS])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--runs", type=_positive, metavar="N", help="samples of each peer")
    common.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    common.add_argument("--kernel", metavar="ELF", help="the probe guest (default: built when needed)")
    common.add_argument("--patience", type=_positive, default=30, metavar="S", help="longest wait for anything")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=_description(), formatter_class=form)
    verbs = parser.add_subparsers(dest="bench", required=True)
    for name, bench in BENCHES.items():
        bench.arguments(verbs.add_parser(name, parents=[common]))
    options = parser.parse_args(arguments)
    if options.bench == "net" and options.cases and (options.debian or options.lab):
        verbs.choices["net"].error("--cases are the probe guest's: leave out --debian and --lab")
    options.runs = options.runs or BENCHES[options.bench].runs
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
        answer = BENCHES[options.bench].measure(options, options.kernel or str(build.build()))
    except FlotillaError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    report.show(answer, options.json)
    return int(any(row["missing"] for row in answer["rows"] if row["peer"] == "flotilla"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
