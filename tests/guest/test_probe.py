"""The probe guest on QEMU: every mode does its work, and finds the damage it is there to find."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from guest import lines, pattern
from tests.guest.conftest import Boot, disk

RNG = ("-device", "virtio-rng-pci,disable-legacy=on")


def of(events: list[lines.Event], kind: type[lines.Line]) -> list[lines.Line]:
    return [event for event in events if isinstance(event, kind)]


def assert_clean(events: list[lines.Event]) -> None:
    done = of(events, lines.Done)
    assert not of(events, lines.Bad)
    assert not of(events, lines.Error)
    assert [line.bad for line in done if isinstance(line, lines.Done)] == [0]


def test_boot_mark_comes_first_and_off_ends_the_machine(boot: Boot) -> None:
    events = boot("off").finish()
    assert isinstance(events[0], lines.Mark)
    assert isinstance(events[1], lines.Up)
    assert_clean(events)


@pytest.mark.parametrize("words", ["", "poll=1", "indirect=0 event_idx=0", "seg=512 bs=16k depth=9", "ring=16"])
def test_equal_is_the_crc_of_the_image(boot: Boot, image: Path, words: str) -> None:
    events = boot(f"mode=equal passes=3 off {words}", *disk(image)).finish()
    passes = [event for event in events if isinstance(event, lines.Equal)]
    assert [line.number for line in passes] == [1, 2, 3]
    assert {line.crc32 for line in passes} == {zlib.crc32(image.read_bytes())}
    assert_clean(events)


def test_equal_notices_a_changed_byte(boot_emulated: Boot, image: Path) -> None:
    machine = boot_emulated("mode=equal", *disk(image))
    machine.line(lines.Equal)
    with open(image, "r+b") as file:
        file.seek(777_777)
        byte = file.read(1)
        file.seek(777_777)
        file.write(bytes([byte[0] ^ 1]))
    wrong = machine.line(lines.NotEqual)
    assert isinstance(wrong, lines.NotEqual)
    assert wrong.offset <= 777_777 < wrong.offset + (256 << 10)


@pytest.mark.parametrize("words", ["depth=8", "depth=32 queues=2 bs=1k", "depth=4 indirect=0", "poll=1 event_idx=0"])
def test_blkload_verifies_and_leaves_a_whole_image(boot: Boot, blank: Path, words: str) -> None:
    machine = boot(f"mode=blkload passes=2 off {words}", *disk(blank, device=",num-queues=2"), *("-smp", "2"))
    load = machine.line(lines.BlkLoad)
    events = machine.finish()
    ok = of(events, lines.BlkOk)[-1]
    assert isinstance(ok, lines.BlkOk)
    assert isinstance(load, lines.BlkLoad)
    assert ok.verified > load.blocks
    assert ok.flushed
    assert ok.trimmed
    assert_clean(events)
    assert list(pattern.damage(blank, load.bs, load.first)) == []


@pytest.mark.parametrize("kind", ["stale", "torn", "misplaced", "corrupt", "zero"])
def test_blkload_names_the_damage(boot_emulated: Boot, blank: Path, kind: str) -> None:
    """The host damages every block behind the guest's back; what the guest meets first must be called by its name."""
    machine = boot_emulated("mode=blkload trim=0 depth=1 span=256k report_ms=0", *disk(blank))
    machine.until(lambda event: isinstance(event, lines.BlkOk) and event.scans >= 2, "two scans")
    with open(blank, "r+b") as file:
        for sector in range(8, 8 + 512):
            os.pwrite(file.fileno(), damaged(kind, sector), sector * pattern.SECTOR)
    machine.until(lambda event: isinstance(event, lines.Bad) and f"BAD {kind}" in event.text, f"blk BAD {kind}")


def damaged(kind: str, sector: int) -> bytes:
    if kind == "zero":
        return bytes(pattern.SECTOR)
    if kind == "corrupt":
        return pattern.encode(pattern.Sector(sector, 1, 1))[:-1] + b"\xee"
    if kind == "misplaced":
        return pattern.encode(pattern.Sector(sector + 8, 1, 1))
    # stale: the first generation again; torn: in half of the sectors
    if kind == "torn" and sector % 8 >= 4:
        return pattern.encode(pattern.Sector(sector, 0xFFFF, 1))
    return pattern.encode(pattern.Sector(sector, 0, 1))


def test_blkload_misses_an_answer(boot_emulated: Boot, blank: Path) -> None:
    """600 timer ticks, here of a millisecond, are the deadline; two requests a second cannot meet it at depth 4."""
    machine = boot_emulated("mode=blkload hz=1000 depth=4 span=256k", *disk(blank, ",throttling.iops-total=2"))
    machine.until(lambda event: isinstance(event, lines.Bad) and "BAD lost" in event.text, "blk BAD lost")
    assert isinstance(machine.line(lines.BlkLate), lines.BlkLate)


@pytest.mark.parametrize("words", ["", "event_idx=0"])
def test_a_lost_interrupt_is_noticed_and_nothing_hangs(boot: Boot, image: Path, words: str) -> None:
    """A masked vector stands for one that the VMM drops; the timer tick still carries the workload on."""
    machine = boot(f"mode=equal depth=1 hz=100 irq_mask=1 {words}", *disk(image))
    machine.until(lambda event: isinstance(event, lines.Bad) and "irq BAD lost" in event.text, "irq BAD lost")
    machine.line(lines.Equal)


@pytest.mark.parametrize(("words", "lost"), [("", True), ("lost_irq_ticks=4", True), ("lost_irq_ticks=100000", False)])
def test_an_interrupt_is_lost_after_as_many_ticks_as_the_word_says(
    boot_emulated: Boot, image: Path, words: str, lost: bool
) -> None:
    """The guest has to wait for each request: every answer is found by a tick, after the first more than thirty."""
    slow = disk(image, ",throttling.iops-total=20")
    events = boot_emulated(f"mode=equal depth=1 hz=100 irq_mask=1 passes=2 off {words}", *slow).finish()
    assert any("irq BAD lost" in line.text for line in of(events, lines.Bad) if isinstance(line, lines.Bad)) is lost
    if not lost:
        assert_clean(events)


def test_ram_notices_a_lost_page(boot_emulated: Boot, tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    backing = f"memory-backend-file,id=ram,size=64M,share=on,mem-path={ram}"
    devices = ("-object", backing, "-machine", "memory-backend=ram")
    machine = boot_emulated("mode=ram mb=16 report_ms=0", *devices, memory="64M")
    opened = machine.line(lines.RamOpen)
    assert isinstance(opened, lines.RamOpen)
    machine.line(lines.RamOk)
    with open(ram, "r+b") as file:  # it is at one place: what it has verified and is about to rewrite nobody sees
        for mib in (5, 15):
            os.pwrite(file.fileno(), bytes(4096), opened.addr + (mib << 20))
    machine.until(lambda event: isinstance(event, lines.Bad) and event.kind == "ram", "ram BAD")


def test_ram_keeps_its_rate(boot_emulated: Boot) -> None:
    """From before its clock starts: a pass that is late is made up for by those after it."""
    events = boot_emulated("mode=ram mb=8 rate=64 passes=8 report_ms=0 hz=100 off").finish()
    (up,) = [event for event in events if isinstance(event, lines.Up)]
    passes = [event for event in events if isinstance(event, lines.RamOk)]
    assert len(passes) == 8 and 8 * 8 / ((passes[-1].ns - up.ns) / 1e9) <= 64 * 1.1
    assert_clean(events)


def test_exits_are_exact_and_numbered(boot: Boot) -> None:
    events = boot("mode=exits passes=40 seq_every=1 off", *RNG).finish()
    check = lines.SeqCheck()
    assert [wrong for event in events if (wrong := check.feed(event))] == []
    assert [line.number for line in events if isinstance(line, lines.Seq)] == list(range(40))
    assert_clean(events)


def test_tick_counts_and_measures(boot: Boot) -> None:
    events = boot("mode=tick tick_us=500 passes=300 off").finish()
    beats = [event.value for event in events if isinstance(event, lines.Beat)]
    assert beats == [n & 0x7F for n in range(1, 301)]
    last = of(events, lines.Tick)[-1]
    assert isinstance(last, lines.Tick)
    assert last.count == 300
    assert last.back_us == 0
    assert last.worst_us > 0


def test_second_cpu_has_its_own_tasks(boot: Boot, image: Path, blank: Path) -> None:
    words = "cpus=2 mode=equal ap=blkload,exits,ram ap.passes=2 ap.mb=4 equal.passes=4 off"
    events = boot(words, *disk(image), *disk(blank), *RNG, "-smp", "2").finish()
    assert_clean(events)
    for kind, cpu in ((lines.Equal, 0), (lines.BlkOk, 1), (lines.ExitsOk, 1), (lines.RamOk, 1)):
        assert {line.cpu for line in of(events, kind)} == {cpu}


def test_rng_and_console(boot: Boot, tmp_path: Path) -> None:
    output = tmp_path / "console"
    console = ("-device", "virtio-serial-pci,disable-legacy=on", "-device", "virtconsole,chardev=c")
    words = "mode=rng,console rng.passes=50 console.passes=3 console.report_ms=10 off"
    events = boot(words, *RNG, *console, "-chardev", f"file,id=c,path={output}").finish()
    assert_clean(events)
    requests = of(events, lines.RngOk)[-1]
    assert isinstance(requests, lines.RngOk)
    assert requests.requests == 50
    assert output.read_bytes().split(b"\r\n")[:2] == [b"console line 00000000", b"console line 00000001"]


def test_serial_input_comes_by_interrupt(boot: Boot) -> None:
    machine = boot("mode=echo")
    machine.line(lines.Ready)
    machine.send(b"hello there\n")
    heard = machine.line(lines.Echo)
    assert isinstance(heard, lines.Echo)
    assert (heard.said, heard.bytes) == ("hello there", 12)
    assert heard.irqs >= 1


def test_tables_and_functions_are_told(boot: Boot, image: Path) -> None:
    events = boot("mode=acpi,pci off", *disk(image)).finish()
    tables = {line.signature: line.sum for line in events if isinstance(line, lines.AcpiTable)}
    assert {"RSDP", "XSDT", "FACP", "DSDT", "APIC"} <= set(tables)
    assert set(tables.values()) == {"ok"}
    functions = {line.where: line.id for line in events if isinstance(line, lines.PciFunction)}
    assert functions["00:01.0"] == "1af4:1042"
    config = [line for line in events if isinstance(line, lines.PciConfig) and line.where == "00:01.0"]
    assert [line.offset for line in config] == list(range(0, 256, 16))
    assert config[0].data[:4] == bytes.fromhex("f41a4210")
    bars = [line for line in events if isinstance(line, lines.PciBar) and line.where == "00:01.0"]
    assert all(bar.address % bar.size == 0 for bar in bars)
    blk = of(events, lines.Virtio)[0]
    assert isinstance(blk, lines.Virtio)
    assert int.from_bytes(blk.config[:8], "little") == (1 << 20) // 512
    assert_clean(events)


@pytest.mark.parametrize("words", ["reset", "crash"])
def test_reset_and_triple_fault_end_a_machine_that_may_not_reboot(boot: Boot, words: str) -> None:
    assert_clean(boot(words).finish())


def test_wrong_words_are_named(boot_emulated: Boot) -> None:
    for words, complaint in (("mode=nonsense", "unknown mode=nonsense"), ("mode=equal disk=3", "disk=3")):
        error = boot_emulated(words).line(lines.Error)
        assert complaint in error.text
