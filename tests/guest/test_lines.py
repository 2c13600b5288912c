"""The parser of the probe guest's lines."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from guest import lines

SAMPLE = (
    b"Pprobe: up tsc=123 ns=456 clock=kvmclock cpus=2 kvm=0x1007afb\n"
    b"equal 1 crc32=0badcafe bytes=1048576 ms=4\x81\x82\n"
    b"cpu1: seq 0000000a 0579\n"
    b"not equal 2 crc32=00000001 want=0badcafe offset=65536\n"
    b"cpu1: blk BAD stale disk=1 sector=9 want_gen=3\n"
    b"tick 981 gap_us=5629 worst_us=5630 gap_tsc=14615236 back_us=7 ns=5697520241\n"
    b"pci 00:01.0 id=1af4:1042 rev=01 code=018000 hdr=00 cmd=0007 status=0010 subsys=1af4:1042\n"
    b"pci 00:01.0 bar0=0xe7f80000 size=0x80000 kind=mem32\n"
    b"pci 00:01.0 cfg 40 09501001000000000000000038000000\n"
    b"virtio 00:01.0 type=2 features=0x130006e44 status=0x00 vectors=2 queues=128,64 config=0002\n"
    b"acpi FACP addr=0xa1253 len=276 rev=6 sum=ok\n"
    b"echo bytes=12 irqs=3 text=a  spaced=text\n"
    b"net open slot=4 mac=1234567890ab mtu=1400 features=0x120200023 pairs=2 size=256 link=1 irq=1\n"
    b"net ok 9 tx=8 arp=1 pings=2 echoed=3 sunk=4 verified=5 missing=6 dropped=7 announced=1 ns=10\n"
    b"net load 5 bytes=500 answered=4 lost=1 best_us=38 mean_us=89 worst_us=219 ns=11\n"
    b"net flood 6 gone=5 rx=4 rx_bytes=300 answered=3 lost=2 p50_us=1 p99_us=7 ns=12\n"
    b"probe: done bad=2\n"
)


def test_every_field_is_read() -> None:
    events = lines.Stream().feed(SAMPLE)
    assert events[0] == lines.Mark()
    assert [event for event in events if isinstance(event, lines.Beat)] == [lines.Beat(1), lines.Beat(2)]
    found = [event for event in events if isinstance(event, lines.Line)]
    text = [line.text for line in found]
    assert found == [
        lines.Up(0, text[0], tsc=123, ns=456, clock="kvmclock", cpus=2, kvm=0x1007AFB),
        lines.Equal(0, text[1], number=1, crc32=0x0BADCAFE, bytes=1 << 20, ms=4),
        lines.Seq(1, text[2], number=10, check=0x0579),
        lines.NotEqual(0, text[3], kind="not equal", number=2, crc32=1, want=0x0BADCAFE, offset=65536),
        lines.Bad(1, text[4], kind="blk"),
        lines.Tick(0, text[5], 981, gap_us=5629, worst_us=5630, gap_tsc=14615236, back_us=7, ns=5697520241),
        lines.PciFunction(0, text[6], "00:01.0", "1af4:1042", 1, 0x018000, 0, 7, 0x10, "1af4:1042"),
        lines.PciBar(0, text[7], "00:01.0", 0, 0xE7F80000, 0x80000, "mem32"),
        lines.PciConfig(0, text[8], "00:01.0", 0x40, bytes.fromhex("09501001000000000000000038000000")),
        lines.Virtio(0, text[9], "00:01.0", 2, 0x130006E44, 0, 2, (128, 64), b"\0\2"),
        lines.AcpiTable(0, text[10], "FACP", 0xA1253, 276, 6, "ok"),
        lines.Echo(0, text[11], bytes=12, irqs=3, said="a  spaced=text"),
        lines.NetOpen(0, text[12], 4, "1234567890ab", 1400, 0x120200023, pairs=2, size=256, link=1, irq=1),
        lines.NetOk(0, text[13], 9, 8, 1, 2, 3, 4, verified=5, missing=6, dropped=7, announced=1, ns=10),
        lines.NetLoad(0, text[14], 5, 500, 4, 1, best_us=38, mean_us=89, worst_us=219, ns=11),
        lines.NetFlood(0, text[15], 6, gone=5, rx=4, rx_bytes=300, answered=3, lost=2, p50_us=1, p99_us=7, ns=12),
        lines.Done(0, text[16], bad=2),
    ]
    assert all(type(line) is not lines.Line for line in found)


@given(st.lists(st.integers(0, len(SAMPLE)), max_size=8))
def test_pieces_do_not_matter(cuts: list[int]) -> None:
    stream = lines.Stream()
    edges = [0, *sorted(cuts), len(SAMPLE)]
    events = [event for a, b in itertools.pairwise(edges) for event in stream.feed(SAMPLE[a:b])]
    assert events == lines.Stream().feed(SAMPLE)


@given(st.binary())
def test_no_bytes_break_the_parser(data: bytes) -> None:
    ends = data.count(b"\n")
    assert sum(isinstance(event, lines.Line) for event in lines.Stream().feed(data)) == ends


@given(st.sampled_from([line + " " for line in SAMPLE.decode("latin1").split("\n")]), st.text())
def test_a_cut_or_strange_tail_breaks_no_line(line: str, tail: str) -> None:
    for cut in range(len(line)):
        assert isinstance(lines.parse(line[:cut] + tail), lines.Line)


def seq(number: int, cpu: int = 0) -> str:
    tag = f"cpu{cpu}: " if cpu else ""
    return f"{tag}seq {number:08x} {lines.mix64(number) & 0xFFFF:04x}"


def test_seq_check_tells_lost_doubled_and_damaged_lines() -> None:
    def wrong(*texts: str) -> list[str]:
        check = lines.SeqCheck()
        return [complaint for text in texts if (complaint := check.feed(lines.parse(text)))]

    assert wrong(seq(0), seq(1), seq(0, cpu=1), seq(2), seq(1, cpu=1)) == []
    assert wrong(seq(0), "probe: up tsc=1", seq(0)) == []
    assert wrong(seq(0), seq(2), seq(3)) == ["cpu0: seq 00000002 where 00000001 was due"]
    assert wrong(seq(0), seq(0)) == ["cpu0: seq 00000000 where 00000001 was due"]
    doubled_byte = seq(1)[:6] + seq(1)[5:]
    assert len(wrong(seq(0), doubled_byte)) == 1
    lost_byte = seq(1)[:7] + seq(1)[8:]
    assert len(wrong(seq(0), lost_byte)) == 1
    assert len(wrong(seq(0), seq(1)[:-1])) == 1
