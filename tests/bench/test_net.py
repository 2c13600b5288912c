"""Network benches measure what they say: host and guest count the same frames, and silence is what was silent."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from bench import net, net_debian, report, wire
from bench.errors import BenchError
from bench.flows import AGAIN_SECONDS, Flow, Pings
from guest.payload import decode
from net_worker.tap import open_tap
from tests.bench.test_bench import HAS_QEMU, SECONDS, bench, has_figures
from tests.netns import ip, network_namespace
from tests.vmm import poll

pytestmark = [pytest.mark.probe, pytest.mark.timeout(SECONDS + 30)]


@pytest.fixture
def network() -> Iterator[None]:
    with network_namespace():
        yield


def test_net():
    cases = ["tx 1514 x1", "tx 65549 x1", "rx 64 x4", "rtt 98 x1"]
    code, answer, _ = bench("net", "--runs", "1", "--seconds", "0.3", "--cases", *cases)
    assert code == 0 and answer["bench"] == "net"
    rows = {(row["peer"], row["case"]): row for row in answer["rows"]}
    for case in cases[:3]:
        own = rows["flotilla", case]
        has_figures(own, "kpps", "mb_per_s", "cpu_us")
        size = own["figures"]["mb_per_s"]["min"] / own["figures"]["kpps"]["min"] * 1000
        assert size == pytest.approx(int(case.split()[1]), rel=0.02)
    has_figures(rows["flotilla", "rtt 98 x1"], "p50_us", "p99_us", "pings")
    assert rows["flotilla", "rtt 98 x1"]["figures"]["p50_us"]["min"] > 0
    if HAS_QEMU:
        assert len(answer["ratios"]) == len(cases)
    if not os.path.exists(net.VHOST):
        assert net.VHOST in rows["qemu-vhost", "tx 1514 x1"]["missing"]


def test_migrate_net():
    code, _, rows = bench("migrate-net", "--runs", "1")
    assert code == 0
    names = ("ping_gap_ms", "ping_lost", "flow_gap_ms", "flow_again", "lost_connections", "own_downtime_ms")
    has_figures(rows["flotilla"], *names)
    own = rows["flotilla"]["figures"]
    assert own["ping_gap_ms"]["min"] > 0 and own["lost_connections"]["max"] == 0


def opened() -> int:
    """The TAP as its VMM has it, once the kernel sends by it."""
    (fd,) = open_tap(wire.NAME, 1)
    poll(lambda: '"operstate":"UP"' in ip("-json", "link", "show", "dev", wire.NAME))
    return fd


def drain(fd: int, frames: list[int], stop: threading.Event) -> None:
    while not stop.is_set() or select.select([fd], [], [], 0)[0]:
        if select.select([fd], [], [], 0.05)[0]:
            frames.append(len(os.read(fd, 70000)) - 10)  # the vnet header


def test_flood_drops_nothing_and_the_counters_are_those_of_the_reader(network):
    """The test is the VMM: it reads the TAP, slower than the flood could be."""
    frames, stop = [], threading.Event()
    with wire.Wire(1) as link:
        fd = opened()
        reader = threading.Thread(target=drain, args=(fd, frames, stop))
        reader.start()
        with wire.Flood(link, 64, 1) as flood:
            before = link.counters()
            while flood.sent <= 1000:
                flood.run(0.3)
            flood.drain(20)
            after = link.counters()
        stop.set()
        reader.join()
        os.close(fd)
    ours = [size for size in frames if size == 64]
    assert flood.sent == len(ours) and flood.dropped(after) == 0
    assert after.to_guest - before.to_guest == len(ours)
    assert after.to_guest_bytes - before.to_guest_bytes == 64 * len(ours)


def test_frames_that_nobody_takes_are_no_figure(network):
    with wire.Wire(1) as link:
        fd = opened()
        with wire.Flood(link, 1514, 1) as flood:
            while not flood.sent:
                flood.run(0.1)
            assert flood.sent <= wire.ON_THEIR_WAY
            with pytest.raises(BenchError, match=rf"{flood.sent} of {flood.sent} frames are still in the TAP's queue"):
                flood.drain(0.1)
        os.close(fd)


def test_what_comes_from_the_guest_is_counted_where_it_enters_the_host(network):
    with wire.Wire(1) as link:
        fd = opened()
        before = link.counters()
        for _ in range(70):
            os.write(fd, bytes(10 + 500))
        after = link.counters()
        os.close(fd)
    assert (after.from_guest - before.from_guest, after.from_guest_bytes - before.from_guest_bytes) == (70, 35000)


def test_frames_of_another_size_are_no_figure():
    before = wire.Counters(1.0, 0, 0, 0, 0, 0)
    after = wire.Counters(3.0, 0, 0, 4000, 4000 * 64, 0)
    small, bulk = (next(case for case in net.CASES if str(case) == name) for name in ("rx 64 x1", "rx 1514 x1"))
    found = net._figures(small, before, after, 4000, 4000 * 64, 0.5)
    assert found == {"kpps": 2.0, "mb_per_s": 0.128, "cpu_us": 125.0}
    with pytest.raises(BenchError, match="4000 frames have 256000 bytes, not 1514 each"):
        net._figures(bulk, before, after, 4000, 4000 * 64, 0.5)


def hard_of_hearing(peer: socket.socket) -> None:
    """Answers each number's second sending, until it is told nothing."""
    heard: Counter[int] = Counter()
    while True:
        data, address = peer.recvfrom(2000)
        if not data:
            return
        number = decode(data).number
        heard[number] += 1
        if heard[number] > 1:
            peer.sendto(data, address)


def test_a_flow_sends_again_until_it_is_answered_and_counts_that(network):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 7))
        thread = threading.Thread(target=hard_of_hearing, args=(peer,))
        thread.start()
        try:
            with Flow("127.0.0.1") as flow:
                flow.goes_on(5, 20)
        finally:
            peer.sendto(b"", peer.getsockname())
            thread.join()
    found = flow.silence()
    assert found.answered >= 5 and found.lost >= found.answered and found.gap_ms >= AGAIN_SECONDS * 1e3


def test_pings_that_are_answered_are_not_lost(network):
    with Pings("127.0.0.1") as pings:
        pings.goes_on(20, 20)
    found = pings.silence()
    assert found.lost == 0 and found.answered >= 20 and found.gap_ms > 0


def test_a_guest_that_falls_silent_is_a_lost_connection(network):
    with Pings("127.0.0.1") as pings:
        pings.goes_on(5, 20)
        wire.ip("link", "set", "lo", "down")
        with pytest.raises(BenchError, match="Pings: "):
            pings.goes_on(20, 0.5)


def test_net_with_debian_names_the_guest_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, answer, _ = bench("net", "--debian", "--runs", "1")
    assert code == 1
    for row in answer["rows"]:
        assert f"{tmp_path}/workloads/focal.raw: No such file" in row["missing"] and "deploy/lab.sh" in row["missing"]


def test_net_with_debian_compares_each_case_in_its_own_figure():
    rows = []
    for peer, times in (("flotilla", 2.0), ("qemu", 1.0)):
        for case in net_debian.CASES:
            rows.append(report.Row(peer, case.name, samples={case.figure: [times]}))
    ratios = net_debian.compare(rows)
    assert len(ratios) == len(net_debian.CASES) and set(ratios.values()) == {2.0}
    assert "qemu rtt p50_us (lower is better)" in ratios and "qemu rx udp 64 kpps (higher is better)" in ratios
