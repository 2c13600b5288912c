"""Remote migration between two network namespaces, over a network with delay, loss and a limit, and one that breaks."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.hosts import GUEST, TAP, BridgedHosts, Hosts
from bench.migrate_net import MAC, figures, watch
from tests.faulty_wire import Faults, FaultyHosts
from tests.probe.test_remote_migration import Receiver
from tests.vmm import REMOTE, Vmm, poll

pytestmark = [pytest.mark.probe, pytest.mark.timeout(180)]

FAULTS = int(os.environ.get("FLOTILLA_REMOTE_FAULTS", "3"))


class Network(Hosts):
    """Two hosts on one wire, 10.99.0.1 and 10.99.0.2, each a namespace."""

    def shape(self, *qdisc: str) -> None:
        """For both directions."""
        for host in self.names:
            words = self.command(host, "tc", "qdisc", "replace", "dev", "wire", "root", *qdisc)
            subprocess.run(words, check=True)


@pytest.fixture
def network():
    made = Network()
    yield made
    made.close()


def guest_and_destination(hosts: Hosts, folder: Path, words: str, *arguments: str) -> tuple[Vmm, Vmm]:
    """Both still to be entered."""
    with hosts.inside("one"):
        source = Vmm.guest(folder, words, *arguments, name="one")
    with hosts.inside("two"):
        return source, Vmm(folder, name="two")


@pytest.fixture
def pair(network, tmp_path):
    source, destination = guest_and_destination(network, tmp_path, "mode=ram ram.mb=16 ram.rate=5")
    with source, destination:
        source.expect("ram ok ")
        source.wait_api()
        yield source, destination


def receive(network: Hosts, destination: Vmm) -> Receiver:
    """/proc/net/tcp is that of whoever reads it."""
    destination.wait_api()
    with network.inside("two"):
        return Receiver(destination, "tcp:0.0.0.0:7000")


@pytest.mark.parametrize(
    "qdisc",
    [
        "tbf rate 200mbit burst 64kb latency 200ms",
        "tbf rate 100mbit burst 16kb limit 20kb",
    ],
    ids=["limit", "limit that drops"],
)
def test_guest_moves_over_a_bad_network(network, pair, qdisc):
    network.shape(*qdisc.split())
    moves(network, *pair)


@pytest.mark.parametrize(
    "faults",
    [Faults(delay=0.015, jitter=0.01), Faults(delay=0.005, loss=0.02), Faults(rate=5e6)],
    ids=["delay and order", "delay and loss", "rate"],
)
def test_guest_moves_over_a_wire_with(tmp_path, faults):
    hosts = FaultyHosts(faults, seed=1)
    try:
        source, destination = guest_and_destination(hosts, tmp_path, "mode=ram ram.mb=4 ram.rate=2")
        with source, destination:
            source.expect("ram ok ")
            source.wait_api()
            hosts.begin()
            moves(hosts, source, destination)
        assert hosts.lost or not faults.loss
    finally:
        hosts.close()


def moves(hosts: Hosts, source: Vmm, destination: Vmm) -> None:
    receiver = receive(hosts, destination)
    sent = source.remote("send-migration", "destination_url=tcp:10.99.0.2:7000,downtime_ms=1000", timeout=150)
    code, errors = receiver.end()
    assert (sent.returncode, code) == (0, 0), f"{sent.stderr}{errors}"
    destination.expect("ram ok ")
    assert source.wait() == 0 and b"BAD" not in source.output + destination.output


def test_a_network_that_fails_for_good_leaves_the_guest_at_the_source(network, pair):
    """The cable is pulled while RAM moves: both sides notice by the silence, within half a minute."""
    source, destination = pair
    network.shape("tbf", "rate", "20mbit", "burst", "32kb", "latency", "400ms")
    receiver = receive(network, destination)
    sender = subprocess.Popen(
        remote_command(source, "send-migration", "tcp:10.99.0.2:7000"), stderr=subprocess.PIPE, text=True
    )
    poll(lambda: source.ask("migration-progress").get("page_bytes", 0) > 1 << 18)
    network.cable("down")
    _, errors = sender.communicate(timeout=100)
    assert sender.returncode == 1 and "the guest runs on here" in errors, errors
    code, why = receiver.end()
    assert code == 1 and why
    source.more("ram ok ")
    assert source.ask("info")["state"] == "Running"


def remote_command(vmm: Vmm, *words: str) -> list[str]:
    return [sys.executable, "-c", REMOTE, "--api-socket", str(vmm.api), *words]


# A guest with a card ------------------------------------------------------------------------------------------------


@pytest.fixture
def bridged():
    made = BridgedHosts()
    yield made
    made.close()


def test_pings_and_a_flow_go_on_while_a_guest_moves_to_another_host(bridged, tmp_path):
    """A TAP on the same L2 network waits on the other host. The flow is UDP with numbers, sent again until answered,
    for the probe guest has no TCP."""
    words = f"mode=net,ram ip={GUEST} ram.mb=16 ram.rate=20"
    source, destination = guest_and_destination(bridged, tmp_path, words, "--net", f"tap={TAP},mac={MAC}")
    with source, destination:
        source.expect("net open")
        source.wait_api()
        pings, flow = watch(bridged, lambda: moves(bridged, source, destination), 30)
        destination.expect(r"net ok .* announced=1 ")
    print(f"silence of the guest's network: {figures(pings, flow)}")
    assert pings.answered > 0 and flow.answered > 0


# Faults at random ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(FAULTS))
def test_random_faults_end_with_the_guest_whole_on_one_of_the_hosts(tmp_path, seed):
    """FLOTILLA_REMOTE_FAULTS=30 runs as many. RAM and disk are verified by the guest all the time."""
    faults = Faults.at_random(random.Random(seed))
    hosts = FaultyHosts(faults, seed)
    try:
        (tmp_path / "disk.raw").write_bytes(os.urandom(8 << 20))
        words = "mode=blkload,ram blkload.depth=2 ram.mb=4 ram.rate=2 report_ms=100"
        source, destination = guest_and_destination(hosts, tmp_path, words, "--disk", f"path={tmp_path}/disk.raw")
        with source, destination:
            outcome = move_over(hosts, source, destination)
            assert b"BAD" not in source.output + destination.output
    finally:
        hosts.close()
    print(f"seed {seed}: {outcome}; {faults}; {hosts.said()}")


def move_over(hosts: FaultyHosts, source: Vmm, destination: Vmm) -> str:
    """How it ended, once that is verified."""
    source.expect("blk ok ")
    source.expect("ram ok ")
    source.wait_api()
    receiver = receive(hosts, destination)
    hosts.begin()
    words = "destination_url=tcp:10.99.0.2:7000,downtime_ms=1000,timeout_s=30"
    sent = source.remote("send-migration", words, timeout=150)
    if "in doubt" in sent.stderr:
        arrived = receiver.process.wait(60) == 0
        if arrived:
            source.ask("migration-resolve", "--there")
        else:  # refused as long as the destination might still go on, by the source's clock
            poll(lambda: source.remote("migration-resolve", "--here").returncode == 0, 90)
        outcome = "in doubt, settled"
    else:
        arrived = sent.returncode == 0
        outcome = "moved" if arrived else f"stayed: {sent.stderr.strip()[-160:]}"
    code, errors = receiver.end()
    assert (code == 0) == arrived, f"{sent.stderr}{errors}"
    here = destination if arrived else source
    here.more("ram ok ")
    here.more("blk ok ")
    assert here.ask("info")["state"] == "Running"
    if arrived:
        assert source.wait() == 0
    else:
        assert sent.returncode == 1 and not destination.output
    return outcome
