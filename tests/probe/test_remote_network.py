"""Remote migration between two network namespaces, over a network with delay, loss and a limit, and one that breaks."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from shared.linux import check, libc
from tests.probe.test_remote_migration import Receiver
from tests.vmm import Vmm, poll

pytestmark = [pytest.mark.probe, pytest.mark.timeout(180)]

CLONE_NEWNET = 0x4000_0000
FAULTS = int(os.environ.get("FLOTILLA_REMOTE_FAULTS", "1"))


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


class Network:
    """Two hosts on one wire, 10.99.0.1 and 10.99.0.2, each a namespace."""

    HOSTS = ("one", "two")

    def __init__(self) -> None:
        self.names = {host: f"fl{os.getpid()}{host}" for host in self.HOSTS}
        for name in self.names.values():
            run("ip", "netns", "add", name)
        one, two = self.names.values()
        run("ip", "-n", one, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", two)
        for number, name in enumerate(self.names.values(), 1):
            run("ip", "-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "wire")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "wire", "up")

    def shape(self, *qdisc: str) -> None:
        """For both directions. Skips where this kernel lacks the qdisc (netem is not everywhere)."""
        for name in self.names.values():
            words = ["ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "wire", "root", *qdisc]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if "qdisc kind is unknown" in done.stderr:
                pytest.skip(f"this kernel has no {qdisc[0]}")
            assert done.returncode == 0, done.stderr

    def cable(self, state: str) -> None:
        run("ip", "-n", self.names["one"], "link", "set", "wire", state)

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """What is started meanwhile lives on that host."""
        with open("/proc/self/ns/net") as ours, open(f"/run/netns/{self.names[host]}") as theirs:
            check(libc.setns(theirs.fileno(), CLONE_NEWNET), "setns")
            try:
                yield
            finally:
                check(libc.setns(ours.fileno(), CLONE_NEWNET), "setns")

    def close(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def network():
    made = Network()
    yield made
    made.close()


@pytest.fixture
def pair(network, tmp_path):
    with network.inside("one"):
        source = Vmm.guest(tmp_path, "mode=ram ram.mb=16 ram.rate=5", name="one")
    with network.inside("two"):
        destination = Vmm(tmp_path, name="two")
    with source, destination:
        source.expect("ram ok ")
        source.wait_api()
        yield source, destination


def receive(network: Network, destination: Vmm) -> Receiver:
    """/proc/net/tcp is that of whoever reads it."""
    destination.wait_api()
    with network.inside("two"):
        return Receiver(destination, "tcp:0.0.0.0:7000")


@pytest.mark.parametrize(
    "qdisc",
    [
        "netem delay 20ms 5ms",
        "netem delay 5ms loss 2%",
        "tbf rate 200mbit burst 64kb latency 200ms",
        "tbf rate 100mbit burst 16kb limit 20kb",
    ],
    ids=["delay", "delay and loss", "limit", "limit that drops"],
)
def test_guest_moves_over_a_bad_network(network, pair, qdisc):
    source, destination = pair
    network.shape(*qdisc.split())
    receiver = receive(network, destination)
    sent = source.remote("send-migration", "destination_url=tcp:10.99.0.2:7000,downtime_ms=1000", timeout=150)
    code, errors = receiver.end()
    assert (sent.returncode, code) == (0, 0), f"{sent.stderr}{errors}"
    destination.expect("ram ok ")
    assert source.wait() == 0 and b"BAD" not in source.output + destination.output


@pytest.mark.parametrize("attempt", range(FAULTS))
def test_a_network_that_fails_for_good_leaves_the_guest_at_the_source(network, pair, attempt):
    """The cable is pulled while RAM moves: both sides notice by the silence, within half a minute."""
    source, destination = pair
    network.shape("tbf", "rate", "20mbit", "burst", "32kb", "latency", "400ms")
    receiver = receive(network, destination)
    sender = subprocess.Popen(
        remote_command(source, "send-migration", "tcp:10.99.0.2:7000"), stderr=subprocess.PIPE, text=True
    )
    poll(lambda: source.ask("migration-progress").get("page_bytes", 0) > (attempt + 1) << 18)
    network.cable("down")
    _, errors = sender.communicate(timeout=100)
    assert sender.returncode == 1 and "the guest runs on here" in errors, errors
    code, why = receiver.end()
    assert code == 1 and why
    source.more("ram ok ")
    assert source.ask("info")["state"] == "Running"


def remote_command(vmm: Vmm, *words: str) -> list[str]:
    import sys

    from tests.vmm import REMOTE

    return [sys.executable, "-c", REMOTE, "--api-socket", str(vmm.api), *words]
