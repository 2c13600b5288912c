"""The network of a guest that moves to another host: how long it is silent, and what it loses.

Two hosts and a third (bench/hosts.py), all of them network namespaces. The probe guest answers pings and echoes to the
third while it moves by tcp from one host to the other, where a TAP on the same L2 network waits. Figures:

    ping_gap_ms   the longest silence between two answers to pings that go out every 5 ms
    ping_lost     pings without an answer
    flow_gap_ms   the same silence of a flow of numbered datagrams, which are sent again until answered
    flow_again    datagrams that had to be sent again
    lost_connections  always 0, or there is no figure: the flow got through, every number once
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bench import processes, report
from bench.errors import BenchError
from bench.flows import Flow, Pings, Silence
from bench.footprint import MICROVM_WORDS
from bench.hosts import ADDRESSES, GUEST, LAN, TAP, BridgedHosts
from bench.recorder import Recorder
from bench.vmms import FlotillaRemotePair, Pair, QemuRemotePair
from guest.lines import NetOpen

MAC: Final = "52:54:00:00:00:01"
PORT: Final = 7000
SIZE: Final = "1G"
DOWNTIME_MS: Final = 300
WORDS: Final = f"mode=net,ram ip={GUEST} ram.mb=256 ram.rate=100 ram.report_ms=1000"
STEADY: Final = 100  # answers before the move, and after it
URL: Final = f"tcp:{ADDRESSES['two']}:{PORT}"


class FlotillaBridgedPair(FlotillaRemotePair):
    """Each VMM on a host of its own."""

    def __init__(self, folder: Path, kernel: str, hosts: BridgedHosts) -> None:
        super().__init__(folder, kernel, WORDS, SIZE, "tcp", DOWNTIME_MS)
        self.url, self._hosts = URL, hosts
        card = ["--net", f"tap={TAP},mac={MAC}"]
        self.source_command = hosts.command("one", *self.source_command, *card)
        self.destination_command = hosts.command("two", *self.destination_command)

    def migrate(self, patience: float) -> None:
        with self._hosts.inside("two"):  # where the listening socket shows
            super().migrate(patience)


class QemuBridgedPair(QemuRemotePair):
    def __init__(self, folder: Path, kernel: str, hosts: BridgedHosts) -> None:
        super().__init__(folder, kernel, f"{WORDS} {MICROVM_WORDS}", SIZE, "tcp", DOWNTIME_MS)
        self.uri = URL
        card = [
            "-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off",
            "-device", f"virtio-net-pci,disable-legacy=on,netdev=n,mac={MAC},romfile=",
        ]  # fmt: skip

        def on(host: str, command: list[str]) -> list[str]:
            machine = [word.replace("microvm", "microvm,pcie=on,pic=off,pit=off") for word in command]
            return hosts.command(host, *machine, *card)

        self.source_command = on("one", self.source_command)
        self.destination_command = on("two", self.destination_command)


MAKERS: Final[dict[str, Callable[[Path, str, BridgedHosts], Pair]]] = {
    "flotilla": FlotillaBridgedPair,
    "qemu-microvm": QemuBridgedPair,
}


def run(kernel: str, runs: int, patience: float) -> dict[str, Any]:
    """Never raises: what can't be measured is a row that says why."""
    rows = {name: report.Row(name, f"{SIZE} tcp") for name in MAKERS}
    for number in range(runs):
        for row in rows.values():
            row.missing = row.missing or report.kvm_missing()
            if not row.missing:
                _one(row, number, kernel, patience)
    notes = [
        f"{WORDS}; watched from {LAN}, a ping every 5 ms",
        "the probe guest has no TCP: the flow is UDP, sent again until answered",
    ]
    return report.result("migrate-net", "ms, datagrams", list(rows.values()), "ping_gap_ms", notes)


def _one(row: report.Row, number: int, kernel: str, patience: float) -> None:
    """One migration into `row`."""
    hosts = None
    try:
        hosts = BridgedHosts()
        with tempfile.TemporaryDirectory(prefix="bench.") as name:
            pair = MAKERS[row.peer](Path(name), kernel, hosts)
            row.command = pair.source_command
            row.add(**sample(Path(name), pair, hosts, patience))
    except (BenchError, OSError) as error:
        row.missing = f"run {number}: {error}"
    finally:
        if hosts is not None:
            hosts.close()


def sample(folder: Path, pair: Pair, hosts: BridgedHosts, patience: float) -> dict[str, float]:
    """One migration between two fresh VMMs. Raises BenchError."""
    try:
        with pair, Recorder() as recorder, processes.Child(folder, "source", pair.source_command) as source:
            pair.started("source", source)
            recorder.add(source.fd, "source")
            try:
                recorder.until(lambda heard: isinstance(heard.event, NetOpen), patience, "guest with a card")
                with processes.Child(folder, "destination", pair.destination_command) as destination:
                    pair.started("destination", destination)
                    recorder.add(destination.fd, "destination")
                    pair.prepare(patience)
                    pings, flow = watch(hosts, lambda: pair.migrate(patience), patience)
                    own = pair.finish(patience)
            except BenchError as error:
                raise BenchError(f"{error}; {pair.complaints()}") from error
    finally:
        processes.settle()
    return {**figures(pings, flow), "own_downtime_ms": own["own_downtime_ms"]}


def watch(hosts: BridgedHosts, migrate: Callable[[], object], patience: float) -> tuple[Silence, Silence]:
    """Pings and a flow from the third host before, during and after `migrate`. Raises BenchError: the guest is gone."""
    with hosts.inside("lan"):
        pings, flow = Pings(GUEST), Flow(GUEST)
    with pings, flow:
        for each in (pings, flow):
            each.goes_on(STEADY, patience)
            each.count_from_now()
        migrate()
        for each in (pings, flow):
            each.goes_on(STEADY, patience)
    return pings.silence(), flow.silence()


def figures(pings: Silence, flow: Silence) -> dict[str, float]:
    return {
        "ping_gap_ms": pings.gap_ms, "ping_lost": pings.lost, "flow_gap_ms": flow.gap_ms, "flow_again": flow.lost,
        "lost_connections": 0,
    }  # fmt: skip
