"""What the probe guest says on COM1, as dataclasses.

`Stream.feed(bytes)` takes serial output in any pieces and returns events in order: `Mark` for the very first byte,
`Beat` for a heartbeat byte of `mode=tick`, and a `Line` (one of its subclasses where the line is known) per line.
A word of a line is a bare value (by position) or `key=value`; unknown keys are ignored, so that a newer guest can
be read by an older parser.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias


@dataclass(frozen=True, slots=True)
class Mark:
    """The byte 'P': the guest's first instruction has run."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat byte; `value` is 0 to 127 and counts up modulo 128."""

    value: int


@dataclass(frozen=True, slots=True)
class Line:
    """Any line. `cpu` comes from its `cpuN:` tag (0 without one), `text` is what follows the tag."""

    PREFIX: ClassVar[str] = ""
    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    HEX: ClassVar[frozenset[str]] = frozenset()

    cpu: int
    text: str


@dataclass(frozen=True, slots=True)
class Up(Line):
    """64-bit mode, ring 3, tables read. `tsc` at entry; `ns` by `clock`; `cpus` enabled in the MADT."""

    PREFIX = "probe: up"
    tsc: int = 0
    ns: int = 0
    clock: str = ""
    cpus: int = 0
    kvm: int = 0


@dataclass(frozen=True, slots=True)
class Ready(Line):
    """Every task of every CPU has started."""

    PREFIX = "probe: ready"
    tasks: int = 0
    cpus: int = 0


@dataclass(frozen=True, slots=True)
class Done(Line):
    """All tasks have made their passes; `bad` counts the BAD lines of all CPUs, those not printed included."""

    PREFIX = "probe: done"
    bad: int = 0


@dataclass(frozen=True, slots=True)
class Error(Line):
    """The CPU has stopped: a fault, a missing device, a wrong word."""

    PREFIX = "probe: error"


@dataclass(frozen=True, slots=True)
class Bad(Line):
    """Something the VMM did wrong; `text` says what. `kind` is the part that noticed: blk, ram, exits, irq, …"""

    kind: str = ""


@dataclass(frozen=True, slots=True)
class Equal(Line):
    """One pass over the disk; `crc32` is zlib's of the `bytes` read."""

    PREFIX = "equal"
    POSITIONAL = ("number",)
    HEX = frozenset({"crc32"})
    number: int = 0
    crc32: int = 0
    bytes: int = 0
    ms: int = 0


@dataclass(frozen=True, slots=True)
class NotEqual(Bad):
    """A pass that differs from the first; `offset` is where, in bytes, to one chunk."""

    PREFIX = "not equal"
    POSITIONAL = ("number",)
    HEX = frozenset({"crc32", "want"})
    number: int = 0
    crc32: int = 0
    want: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class BlkOpen(Line):
    PREFIX = "blk open"
    disk: int = 0
    slot: int = 0
    sectors: int = 0
    features: int = 0
    queues: int = 0
    size: int = 0
    irq: int = 0


@dataclass(frozen=True, slots=True)
class BlkLoad(Line):
    """Where `mode=blkload` writes: `blocks` of `bs` bytes from sector `first`."""

    PREFIX = "blk load"
    disk: int = 0
    first: int = 0
    blocks: int = 0
    bs: int = 0
    depth: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BlkOk(Line):
    """Blocks read back and found right so far, and what else was done meanwhile. The longest that a request took: since
    the start, and of those answered since the last such line."""

    PREFIX = "blk ok"
    POSITIONAL = ("verified",)
    verified: int = 0
    written: int = 0
    flushed: int = 0
    trimmed: int = 0
    ops: int = 0
    scans: int = 0
    longest_us: int = 0
    recent_us: int = 0
    kicks: int = 0
    irqs: int = 0


@dataclass(frozen=True, slots=True)
class BlkLate(Line):
    """A request that had been called lost was answered after all."""

    PREFIX = "blk late"
    disk: int = 0
    op: str = ""
    sector: int = 0


@dataclass(frozen=True, slots=True)
class RamOpen(Line):
    """The working set of `mode=ram`, at guest physical address `addr`."""

    PREFIX = "ram open"
    addr: int = 0
    mb: int = 0
    rate: int = 0


@dataclass(frozen=True, slots=True)
class RamOk(Line):
    """Passes over the working set."""

    PREFIX = "ram ok"
    POSITIONAL = ("passes",)
    passes: int = 0
    mb: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class ExitsOk(Line):
    """Rounds of all checks of `mode=exits`; `seq` is the number of the next `seq` line."""

    PREFIX = "exits ok"
    POSITIONAL = ("rounds",)
    rounds: int = 0
    seq: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class Seq(Line):
    PREFIX = "seq"
    POSITIONAL = ("number", "check")
    HEX = frozenset({"number", "check"})
    number: int = 0
    check: int = 0


@dataclass(frozen=True, slots=True)
class Tick(Line):
    """`gap_us` and `gap_tsc`: largest gap between two looks at the clock since the last such line; `worst_us`: since
    the start; `back_us`: the furthest the clock went back; `ns`: the guest's clock."""

    PREFIX = "tick"
    POSITIONAL = ("count",)
    count: int = 0
    gap_us: int = 0
    worst_us: int = 0
    gap_tsc: int = 0
    back_us: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class RngOk(Line):
    PREFIX = "rng ok"
    POSITIONAL = ("requests",)
    requests: int = 0
    bytes: int = 0
    sample: str = ""


@dataclass(frozen=True, slots=True)
class ConsoleOk(Line):
    """Lines printed on virtio-console; bytes received (and echoed) and sent there."""

    PREFIX = "console ok"
    POSITIONAL = ("lines",)
    lines: int = 0
    rx: int = 0
    tx: int = 0


@dataclass(frozen=True, slots=True)
class Echo(Line):
    """One line of COM1 input: what it `said`, bytes received and receive interrupts so far."""

    PREFIX = "echo bytes"
    bytes: int = 0
    irqs: int = 0
    said: str = ""


@dataclass(frozen=True, slots=True)
class NetOpen(Line):
    """`mac` as 12 hexadecimal digits; `link` is 1 when the device says that it is up."""

    PREFIX = "net open"
    slot: int = 0
    mac: str = ""
    mtu: int = 0
    features: int = 0
    pairs: int = 0
    size: int = 0
    link: int = 0
    irq: int = 0


@dataclass(frozen=True, slots=True)
class NetOk(Line):
    """`mode=net`: frames in and out, what was answered, datagrams to the discard port and how many of them are missing,
    payloads verified, answers that no transmit frame was free for, announcements after a migration."""

    PREFIX = "net ok"
    POSITIONAL = ("rx",)
    rx: int = 0
    tx: int = 0
    arp: int = 0
    pings: int = 0
    echoed: int = 0
    sunk: int = 0
    verified: int = 0
    missing: int = 0
    dropped: int = 0
    announced: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class NetLoad(Line):
    """`mode=netload`: datagrams sent and their payloads' bytes; with `wait`, round trips of the answered ones."""

    PREFIX = "net load"
    POSITIONAL = ("sent",)
    sent: int = 0
    bytes: int = 0
    answered: int = 0
    lost: int = 0
    best_us: int = 0
    mean_us: int = 0
    worst_us: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class NetFlood(Line):
    """`mode=netflood`: frames sent and, of these, taken by the device; frames that came and their bytes; echo requests
    answered and lost, and quantiles of the round trips."""

    PREFIX = "net flood"
    POSITIONAL = ("sent",)
    sent: int = 0
    gone: int = 0
    rx: int = 0
    rx_bytes: int = 0
    answered: int = 0
    lost: int = 0
    p50_us: int = 0
    p99_us: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class Ged(Line):
    """An ACPI GED interrupt: the event byte, and the byte when read again (0 when reading clears it)."""

    PREFIX = "ged"
    events: int = 0
    again: int = 0


@dataclass(frozen=True, slots=True)
class PowerButton(Line):
    PREFIX = "power button"


@dataclass(frozen=True, slots=True)
class PciFunction(Line):
    """`where` is like 00:01.0, `id` and `subsys` like 1af4:1042; `code` is the class, subclass and interface."""

    HEX = frozenset({"rev", "code", "hdr", "cmd", "status"})
    where: str = ""
    id: str = ""
    rev: int = 0
    code: int = 0
    hdr: int = 0
    cmd: int = 0
    status: int = 0
    subsys: str = ""


@dataclass(frozen=True, slots=True)
class PciBar(Line):
    where: str = ""
    index: int = 0
    address: int = 0
    size: int = 0
    kind: str = ""


@dataclass(frozen=True, slots=True)
class PciConfig(Line):
    """16 bytes of configuration space."""

    where: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Virtio(Line):
    """`features` as offered; `queues` are the sizes; `config` the first bytes of the device configuration."""

    where: str = ""
    type: int = 0
    features: int = 0
    status: int = 0
    vectors: int = 0
    queues: tuple[int, ...] = ()
    config: bytes = b""


@dataclass(frozen=True, slots=True)
class AcpiTable(Line):
    signature: str = ""
    addr: int = 0
    len: int = 0
    rev: int = 0
    sum: str = ""


@dataclass(frozen=True, slots=True)
class Memory(Line):
    PREFIX = "mem"
    addr: int = 0
    size: int = 0
    type: int = 0


@dataclass(frozen=True, slots=True)
class CommandLine(Line):
    """`text` without the first word is the command line."""

    PREFIX = "cmdline"


Event: TypeAlias = Mark | Beat | Line

_KINDS: Final[tuple[type[Line], ...]] = (
    *(Up, Ready, Done, Error, Equal, NotEqual, BlkOpen, BlkLoad, BlkOk, BlkLate, RamOpen, RamOk, ExitsOk, Seq),
    *(Tick, RngOk, ConsoleOk, NetOpen, NetOk, NetLoad, NetFlood, Ged, PowerButton, Memory, CommandLine),
)


def parse(text: str) -> Line:
    """One line, without its end. Never fails: a line that is not known, or is damaged, is a plain `Line`."""
    cpu = 0
    if text.startswith("cpu") and ":" in text[:6]:
        tag, _, rest = text.partition(": ")
        if tag[3:].isdigit():
            cpu, text = int(tag[3:]), rest
    try:
        return _parse(cpu, text)
    except (ValueError, LookupError):
        return Line(cpu, text)


def _parse(cpu: int, text: str) -> Line:
    words = text.split()
    if len(words) > 1 and words[1] == "BAD":
        return Bad(cpu, text, kind=words[0])
    if len(words) > 2 and words[0] in _DEVICE_KINDS:
        return _DEVICE_KINDS[words[0]](cpu, text, words)
    for kind in _KINDS:
        if text == kind.PREFIX or text.startswith(kind.PREFIX + " "):
            return _fill(kind, cpu, text, text[len(kind.PREFIX) :].split())
    return Line(cpu, text)


def _fill(kind: type[Line], cpu: int, text: str, words: list[str], **given: object) -> Line:
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    values = dict(given)
    position = 0
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            if position == len(kind.POSITIONAL):
                continue
            key, value = kind.POSITIONAL[position], word
            position += 1
        if key not in given and types.get(key) == "int":
            values[key] = int(value, 16 if key in kind.HEX else 0)
        elif key not in given and types.get(key) == "str":
            values[key] = value
    if issubclass(kind, Bad):
        values["kind"] = kind.PREFIX
    return kind(cpu, text, **values)


def _pci(cpu: int, text: str, words: list[str]) -> Line:
    where = words[1]
    if words[2].startswith("id="):
        return _fill(PciFunction, cpu, text, words[2:], where=where)
    if words[2].startswith("bar"):
        index, _, address = words[2][3:].partition("=")
        return _fill(PciBar, cpu, text, words[3:], where=where, index=int(index), address=int(address, 16))
    if words[2] == "cfg":
        return PciConfig(cpu, text, where, int(words[3], 16), bytes.fromhex(words[4]))
    return Line(cpu, text)


def _virtio(cpu: int, text: str, words: list[str]) -> Line:
    fields = dict(word.split("=", 1) for word in words[2:])
    queues = tuple(int(size) for size in fields["queues"].split(",") if size)
    config = bytes.fromhex(fields["config"])
    return _fill(Virtio, cpu, text, words[2:], where=words[1], queues=queues, config=config)


def _acpi(cpu: int, text: str, words: list[str]) -> Line:
    if words[-1].startswith("sum="):
        return _fill(AcpiTable, cpu, text, words[2:], signature=words[1])
    return Line(cpu, text)


def _echo(cpu: int, text: str, words: list[str]) -> Line:
    if not words[1].startswith("bytes="):
        return Line(cpu, text)
    return _fill(Echo, cpu, text, words[1:3], said=text.partition(" text=")[2])


_DEVICE_KINDS: Final = {"pci": _pci, "virtio": _virtio, "acpi": _acpi, "echo": _echo}


class Stream:
    """Cuts serial output into events, whatever the pieces it comes in."""

    def __init__(self) -> None:
        self._line = bytearray()

    def feed(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        for byte in data:
            if byte >= 0x80:
                events.append(Beat(byte & 0x7F))
            elif byte == 0x0A:
                events.append(parse(self._line.decode("ascii").rstrip("\r")))
                self._line.clear()
            elif byte == ord("P") and not self._line:
                events.append(Mark())  # no line begins with a capital letter
            else:
                self._line.append(byte)
        return events


class SeqCheck:
    """Finds `seq` lines that were lost, doubled or damaged. One object per serial port; `Up` starts anew."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def feed(self, event: Event) -> str:
        """What is wrong, or the empty string."""
        if isinstance(event, Up):
            self._next.clear()
        if not isinstance(event, Seq):
            if isinstance(event, Line) and event.text.startswith("seq"):
                return f"cpu{event.cpu}: damaged line {event.text!r}"
            return ""
        expected = self._next.get(event.cpu, 0)
        self._next[event.cpu] = event.number + 1
        if event.text != f"seq {event.number:08x} {mix64(event.number) & 0xFFFF:04x}":
            return f"cpu{event.cpu}: damaged line {event.text!r}"
        if event.number != expected:
            return f"cpu{event.cpu}: seq {event.number:08x} where {expected:08x} was due"
        return ""


_MASK: Final = (1 << 64) - 1


def mix64(x: int) -> int:
    """The finaliser of splitmix64, as guest/lib.c."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
