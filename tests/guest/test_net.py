"""The probe guest's network modes on QEMU, over a TAP in a network namespace of the test's own."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from guest.lines import Bad, Done, NetFlood, NetLoad, NetOk, NetOpen
from guest.payload import Payload, decode, encode
from tests.guest.conftest import Boot, Machine
from tests.netns import ip, network_namespace
from tests.netpeer import DISCARD, ECHO, Echo, Sink, ping

HOST, GUEST = "192.168.249.1", "192.168.249.2"
MAC = "525400000001"


@pytest.fixture
def network() -> Iterator[None]:
    with network_namespace():
        yield


def nic(options: str = "", queues: int = 1) -> tuple[str, ...]:
    """A TAP, and QEMU's words for a modern virtio-net function on it."""
    ip("tuntap", "add", "probe0", "mode", "tap", *(["multi_queue"] if queues > 1 else []))
    ip("address", "add", f"{HOST}/24", "dev", "probe0")
    ip("link", "set", "probe0", "up")
    mac = ":".join(MAC[i : i + 2] for i in range(0, 12, 2))
    backend = "tap,id=n,ifname=probe0,script=no,downscript=no" + (f",queues={queues}" if queues > 1 else "")
    device = f"virtio-net-pci,disable-legacy=on,netdev=n,mac={mac},romfile="
    return ("-netdev", backend, "-device", f"{device},{options}" if options else device)


def bad(machine: Machine) -> list[str]:
    return [event.text for event in machine.events if isinstance(event, Bad)]


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ("", ""),
        ("csum=0 event_idx=0", ""),
        ("poll=1 indirect=0", ""),
        ("pairs=2", "mq=on,vectors=6"),
        ("", "ctrl_vq=off"),
        ("", "host_mtu=1400"),
    ],
)  # fmt: skip
def test_ping_and_echo_are_answered(boot: Boot, network: None, words: str, device: str) -> None:
    machine = boot(f"mode=net {words} report_ms=50", *nic(device, 2 if "mq" in device else 1), *("-smp", "2"))
    opened = machine.line(NetOpen)
    assert isinstance(opened, NetOpen)
    assert opened.mac == MAC and opened.link == 1 and opened.mtu == (1400 if "mtu" in device else 1500)
    ping(GUEST)
    with Echo(GUEST) as echo:
        echo.until_answered(50)
    machine.until(lambda event: isinstance(event, NetOk) and event.verified >= 50 and event.pings >= 1, "50 echoes")
    assert not bad(machine)


def test_a_damaged_payload_is_bad_and_not_echoed(boot: Boot, network: None) -> None:
    machine = boot("mode=net passes=2 off report_ms=0", *nic())
    machine.line(NetOpen)
    ping(GUEST)
    damaged = bytearray(encode(Payload(3, 4), 200))
    damaged[150] ^= 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.sendto(damaged, (GUEST, ECHO))
        sock.sendto(b"somebody else's", (GUEST, ECHO))
        assert sock.recv(2000) == b"somebody else's"
    events = machine.finish()
    assert "net BAD corrupt stream=3 number=4 length=200" in bad(machine)
    (done,) = [event for event in events if isinstance(event, Done)]
    assert done.bad == 1


def test_missing_datagrams_are_counted(boot: Boot, network: None) -> None:
    machine = boot("mode=net report_ms=0", *nic())
    machine.line(NetOpen)
    ping(GUEST)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in (0, 1, 4, 5, 9):
            sock.sendto(encode(Payload(1, number), 500), (GUEST, DISCARD))
    seen = machine.until(lambda event: isinstance(event, NetOk) and event.sunk == 5, "5 datagrams")
    assert isinstance(seen, NetOk) and seen.missing == 5 and seen.verified == 5


@pytest.mark.parametrize(
    "words", ["", "csum=0 bytes=64", "pairs=2 bytes=1473 tx_bytes=2000", "bytes=40000 tx_bytes=64k"], ids=str
)  # fmt: skip
def test_load_arrives_whole_and_in_order(boot: Boot, network: None, words: str) -> None:
    with Sink(DISCARD) as sink:
        device = nic("mq=on,vectors=6", 2) if "pairs" in words else nic()
        machine = boot(f"mode=netload passes=200 off {words}", *device, *("-smp", "2"))
        numbers = [sink.take()[0].number for _ in range(100)]
    assert len(set(numbers)) == 100 and max(numbers) < 200
    assert "pairs" in words or numbers == sorted(numbers)
    machine.finish()
    assert not bad(machine)


def test_round_trips_are_measured_and_verified(boot: Boot, network: None) -> None:
    with Sink(ECHO) as sink:
        machine = boot("mode=netload wait=1 lost_ticks=600 bytes=100 passes=50 off", *nic())
        assert [sink.take(echo=True)[0].number for _ in range(50)] == list(range(50))
    loads = [event for event in machine.finish() if isinstance(event, NetLoad)]
    assert loads[-1].answered == 50 and loads[-1].lost == 0
    assert 0 < loads[-1].best_us <= loads[-1].mean_us <= loads[-1].worst_us


def test_an_echo_that_is_not_ours_is_bad(boot: Boot, network: None) -> None:
    device = nic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind((HOST, ECHO))
        machine = boot("mode=netload wait=1 lost_ticks=600 bytes=100", *device)
        data, address = sock.recvfrom(2000)
        sock.sendto(data[:50] + bytes(50), address)
        line = machine.line(Bad)
    assert line.text == "net BAD echo corrupt number=0 length=100"


@pytest.mark.parametrize("length", [32, 39, 40, 1000])
def test_payloads_tell_damage(length: int) -> None:
    data = encode(Payload(7, 8), length)
    assert len(data) == length and decode(data) == Payload(7, 8)
    for at in range(length):
        damaged = bytearray(data)
        damaged[at] ^= 0x80
        with pytest.raises(ValueError):
            decode(bytes(damaged))


def frames_from_the_guest() -> int:
    with open("/proc/thread-self/net/dev") as file:
        (line,) = [line for line in file if line.strip().startswith("probe0:")]
    return int(line.split()[2])


@pytest.mark.parametrize(("words", "device"), [("", ""), ("pairs=2 bytes=22", "mq=on,vectors=6")])
def test_flood_counts_what_has_gone_out(boot: Boot, network: None, words: str, device: str) -> None:
    nics = nic(device, 2 if "mq" in device else 1)
    machine = boot(f"mode=netflood report_ms=50 {words}", *nics, *("-smp", "2"))
    line = machine.until(lambda event: isinstance(event, NetFlood) and event.gone > 1000, "1000 frames")
    assert isinstance(line, NetFlood)
    counted = frames_from_the_guest()
    later = machine.until(lambda event: isinstance(event, NetFlood) and event.gone > line.sent, "further frames")
    assert isinstance(later, NetFlood) and not bad(machine)
    assert line.gone <= line.sent and line.gone <= counted


def test_pings_by_the_guest_are_answered(boot: Boot, network: None) -> None:
    machine = boot("mode=netflood ping=1 report_ms=50", *nic())
    line = machine.until(lambda event: isinstance(event, NetFlood) and event.answered >= 50, "50 answers")
    assert isinstance(line, NetFlood)
    assert 0 < line.p50_us <= line.p99_us and line.rx >= 50 and not bad(machine)


def test_flood_receives_without_answering(boot: Boot, network: None) -> None:
    machine = boot("mode=netflood tx=0 report_ms=50", *nic())
    mac = ":".join(MAC[i : i + 2] for i in range(0, 12, 2))
    ip("neigh", "replace", GUEST, "lladdr", mac, "dev", "probe0")  # few frames wait for an answer to ARP
    machine.line(NetFlood)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

        def came(event: object) -> bool:
            """Whether 100 have; another ten with each line, because nobody keeps what finds no room."""
            for _ in range(10):
                sock.sendto(bytes(958), (GUEST, 9))
            return isinstance(event, NetFlood) and event.rx_bytes >= 100_000

        line = machine.until(came, "100 frames")
    assert isinstance(line, NetFlood) and line.rx >= 100 and line.answered == 0
