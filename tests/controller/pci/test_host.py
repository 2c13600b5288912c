from __future__ import annotations

import pytest

from controller.bus import Bus
from controller.irq import IrqRouting
from controller.machine.layout import compute
from controller.pci.config_space import BarType
from controller.pci.function import BarPlace, Bdf, PciFunction
from controller.pci.host import PciSegment, Plan, build
from controller.pci.pvpanic import PvPanic
from controller.pci.virtio_pci import VirtioPci
from shared.errors import ConfigError, HostError, ProtocolError
from tests.controller import fakes
from tests.controller.fakes import FakeDevice, Machine, finish, machine
from vcpu_worker.layout import PciPage

TYPES = {
    "console": fakes.CONSOLE,
    "disk": fakes.BLOCK,
    "net": fakes.NET,
    "rng": fakes.RNG,
    "fs": fakes.FS,
    "pmem": fakes.PMEM,
    "vsock": fakes.VSOCK,
    "virtio-mem": fakes.MEM,
    "balloon": fakes.BALLOON,
    "watchdog": fakes.WATCHDOG,
    "rtc": fakes.RTC,
}


def plans(made: Machine, words: str) -> list[Plan]:
    """`disk:root@5 net` is a disk with id root in slot 5 and a NIC."""
    result = []
    for number, word in enumerate(words.split()):
        name, _, slot = word.partition("@")
        kind, _, id = name.partition(":")
        function: PciFunction
        if kind == "pvpanic":
            function = PvPanic(lambda event: None)
        else:
            function = made.transport(FakeDevice(id or f"_{kind}{number}", TYPES[kind], (128,)))
        result.append(Plan(kind, function, 0, int(slot) if slot else None))
    return result


def placed(made: Machine) -> list[str]:
    """`slot kind-or-id address` in slot order."""
    lines = []
    for function in made.segment.functions:
        assert function.bdf is not None and function.bar is not None
        name = function.id.removeprefix("_virtio-pci-").strip("_").rstrip("0123456789")
        lines.append(f"{function.bdf.slot:02x} {name} {function.bar.base:x}")
    return lines


# The table of the reference's section 2.2.
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rng", ["01 rng 3fffff800000"]),
        ("rng console", ["01 console 3fffff800000", "02 rng 3fffff000000"]),
        (
            "disk disk disk net rng",
            [
                "01 disk e7f80000",
                "02 disk e7f00000",
                "03 disk e7e80000",
                "04 net 3fffff800000",
                "05 rng 3fffff000000",
            ],
        ),
        (
            "console disk disk disk net rng",
            [
                "01 console 3fffff800000",
                "02 disk e7f80000",
                "03 disk e7f00000",
                "04 disk e7e80000",
                "05 net 3fffff000000",
                "06 rng 3ffffe800000",
            ],
        ),
        (
            "pvpanic watchdog balloon vsock pmem fs rng net net disk disk console",
            [
                "01 console 3fffff800000",
                "02 disk e7f80000",
                "03 disk e7f00000",
                "04 net 3fffff000000",
                "05 net 3ffffe800000",
                "06 rng 3ffffe000000",
                "07 fs 3ffffd800000",
                "08 pmem 3ffffd000000",
                "09 vsock 3ffffc800000",
                "0a balloon 3ffffc000000",
                "0b watchdog 3ffffb800000",
                "0c pvpanic e7effff0",
            ],
        ),
        (
            "disk:root@5 disk net rng watchdog",
            [
                "01 disk e7f00000",
                "02 net 3fffff800000",
                "03 rng 3fffff000000",
                "04 watchdog 3ffffe800000",
                "05 root e7f80000",
            ],
        ),
        ("rng virtio-mem", ["01 rng 3fffff800000", "02 virtio-mem 3fffff000000"]),
        ("rtc rng", ["01 rng 3fffff800000", "02 rtc 3fffff000000"]),
    ],
)
def test_slots_and_bars_at_boot(words: str, expected: list[str]) -> None:
    with machine() as made:
        build([made.segment], plans(made, words))
        assert placed(made) == expected


def test_hot_plugged_devices_have_64_bit_bars_in_the_next_slots() -> None:
    with machine() as made:
        build([made.segment], plans(made, "disk net rng"))
        for plan in plans(made, "disk:hot net:hotnet"):
            made.segment.add(plan.function)
        assert placed(made)[3:] == ["04 hot 3ffffe800000", "05 hotnet 3ffffe000000"]


def test_a_restored_vm_gets_slots_and_bars_from_the_tree() -> None:
    with machine() as made:
        build([made.segment], plans(made, "console disk net rng pvpanic"))
        made.segment.remove(2).close()
        hot = plans(made, "disk:_disk9")
        made.segment.add(hot[0].function)
        tree, before = made.segment.device_tree(), placed(made)
    with machine() as other:
        again = plans(other, "console net:_net2 rng:_rng3 pvpanic disk:_disk9")
        build([other.segment], again, tree)
        assert placed(other) == before
        assert other.segment.device_tree() == tree
        # What was free there is free here.
        assert other.segment.add(plans(other, "disk:x")[0].function, wide=False) == Bdf(0, 6)
        assert placed(other)[-1] == "06 x e7f80000"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"_virtio-pci-_disk0": None}, "expected an object"),
        ({}, "_virtio-pci-_disk0 is missing"),
        ({"_virtio-pci-_disk0": {"pci_bdf": "0000:01:02.0", "resources": []}}, "pci_bdf"),
        ({"_virtio-pci-_disk0": {"pci_bdf": "nonsense", "resources": []}}, "pci_bdf"),
        ({"_virtio-pci-_disk0": {"pci_bdf": "0007:00:02.0", "resources": []}}, "BAR 0 is missing"),
        (
            {
                "_virtio-pci-_disk0": {
                    "pci_bdf": "0000:00:02.0",
                    "resources": [{"PciBar": {"index": 0, "base": 0, "size": 4096, "type_": "Mmio32"}}],
                }
            },
            "another type or size",
        ),
        (
            {
                "_virtio-pci-_disk0": {
                    "pci_bdf": "0007:00:02.0",
                    "resources": [
                        {"PciBar": {"index": 0, "base": 0xE7F8_0000, "size": 524288, "type_": "Mmio32"}}
                    ],
                }
            },
            "PCI segment 7 does not exist",
        ),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(change: dict[str, object], complaint: str) -> None:
    with machine() as made, pytest.raises(ProtocolError, match=complaint):
        wanted = plans(made, "disk")
        build([made.segment], wanted, change)


def test_explicit_slots_are_checked() -> None:
    with machine() as made:
        for slot in (0, 32):
            with pytest.raises(ConfigError, match="pci_device_id"):
                made.segment.reserve_slot(slot)
        made.segment.reserve_slot(3)
        with pytest.raises(ConfigError, match="slot 3 of PCI segment 0 is taken"):
            made.segment.reserve_slot(3)


def test_a_bus_has_31_free_slots() -> None:
    with machine() as made:
        for number in range(31):
            assert made.segment.add(made.transport(FakeDevice(f"_d{number}"))) == Bdf(0, number + 1)
        with pytest.raises(ConfigError, match="no free slot"):
            made.segment.add(made.transport(FakeDevice("_more")))


def test_a_bar_address_that_is_taken_is_refused_and_leaves_no_trace() -> None:
    with machine() as made:
        made.segment.add(made.transport(), wide=False)
        with pytest.raises(HostError):
            made.segment.add(made.transport(), 2, BarPlace(0xE7F8_0000, BarType.MEMORY_32))
        assert made.segment.function(2) is None
        made.segment.add(made.transport(), 2, BarPlace(0xE7F0_0000, BarType.MEMORY_32))


# Configuration accesses -------------------------------------------------------------------------------------------


def test_ecam_and_ports_show_the_same_space_and_absent_slots_read_all_ones() -> None:
    with machine() as made:
        made.segment.add(made.transport())
        for slot, expected in ((0, 0x0D57_8086), (1, 0x1042_1AF4), (2, 0xFFFF_FFFF), (31, 0xFFFF_FFFF)):
            assert made.mmio.read(made.config_address(slot), 4) == expected
            made.ports.write(0, 4, 0x8000_0000 | slot << 11)
            assert made.ports.read(4, 4) == expected
            assert made.ports.read(6, 2) == expected >> 16
        assert made.mmio.read(made.config_address(1) | 1 << 12, 4) == 0xFFFF_FFFF, "function 1"
        assert made.mmio.read(made.config_address(1, 2), 4) == 0xFFFF_FFFF, "across a dword"
        assert made.mmio.read(made.config_address(1), 8) == 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.parametrize("latch", [0, 0x0000_0800, 0x8001_0800, 0x8000_0900])
def test_the_data_port_needs_a_valid_address(latch: int) -> None:
    with machine() as made:
        made.segment.add(made.transport())
        made.ports.write(0, 4, latch | 4)
        assert made.ports.read(4, 4) == 0xFFFF_FFFF
        made.ports.write(4, 4, 0x6)
        assert made.mmio.read(made.config_address(1, 4), 2) == 0


def test_the_address_latch_can_be_written_in_parts() -> None:
    with machine() as made:
        made.ports.write(0, 4, 0x8000_0000)
        made.ports.write(1, 1, 0x08)
        made.ports.write(0, 2, 0x0804)
        assert made.ports.read(0, 4) == 0x8000_0804
        assert made.ports.read(3, 1) == 0x80
        made.ports.write(2, 4, 0)
        assert made.ports.latch == 0x8000_0804
        state = made.ports.save()
    with machine() as other:
        other.ports.load(state)
        assert other.page.latch & 0xFFFF_FFFF == 0x8000_0804
        other.ports.load({})


def test_writes_through_both_mechanisms() -> None:
    with machine() as made:
        made.segment.add(made.transport())
        made.ports.write(0, 4, 0x8000_0804)
        finish(made.ports.write(4, 2, 0x0406))
        assert made.mmio.read(made.config_address(1, 4), 4) == 0x0010_0406
        finish(made.mmio.write(made.config_address(1, 0x3C), 1, 11))
        finish(made.mmio.write(made.config_address(1, 0x3C) | 1 << 12, 1, 12))
        finish(made.mmio.write(made.config_address(1, 0x3C), 8, 12))
        assert made.mmio.read(made.config_address(1, 0x3C), 4) == 11


def test_what_the_vcpu_loops_are_told() -> None:
    with machine() as made:
        made.segment.add(made.transport())
        made.segment.add(made.transport(FakeDevice("_d2")))
        assert (made.page.present, made.page.enabled) == (0b111, 1)
        assert (made.page.ecam_base, made.page.ecam_size) == (fakes.ECAM, 1 << 20)
        assert made.page.config_view(1)[0] == 0x1042_1AF4
        assert sum(made.page.dynamic[1]) > 0
        made.segment.remove(1).close()
        assert made.page.present == 0b101
        assert sum(made.page.dynamic[1]) == 0
        assert made.mmio.read(made.config_address(1), 4) == 0xFFFF_FFFF
        assert made.mmio.read(0x3FFF_FF80_0000, 2) is None
        with pytest.raises(HostError, match="holds no device"):
            made.segment.remove(1)
        with pytest.raises(HostError):
            made.segment.remove(0)
        assert made.segment.add(made.transport(FakeDevice("_d3"))) == Bdf(0, 1)
        assert made.mmio.read(0x3FFF_FF80_0012, 2) == 1


@pytest.mark.parametrize(
    "new",
    [
        0x3FFF_FF00_0000,  # the next function's
        0x3FFF_FFF0_0000,  # past the window
        0x0000_8000_0000,  # RAM
        0x2_4000_1000,  # not aligned
    ],
)
def test_a_bar_move_that_is_not_possible_leaves_everything_as_it_was(new: int) -> None:
    with machine() as made:
        first = made.transport()
        made.segment.add(first)
        made.segment.add(made.transport(FakeDevice("_d2")))
        at = made.config_address(1)
        made.mmio.write(at + 4, 2, 2)
        made.mmio.write(at + 0x10, 4, new & 0xFFFF_FFFF)
        made.mmio.write(at + 0x14, 4, new >> 32)
        assert first.bar == BarPlace(0x3FFF_FF80_0000, BarType.MEMORY_64)
        assert (made.mmio.read(at + 0x10, 4), made.mmio.read(at + 0x14, 4)) == (0xFF80_0004, 0x3FFF)
        assert made.mmio.read(0x3FFF_FF80_0012, 2) == 1
        assert made.mmio.read(0x3FFF_FF00_0012, 2) == 1
        # The old place is still ours: nobody else can have it, and it can move again.
        made.mmio.write(at + 0x10, 4, 0x4000_0000)
        made.mmio.write(at + 0x14, 4, 0x2)
        assert made.mmio.read(0x2_4000_0012, 2) == 1


def test_swapping_two_bars_by_way_of_a_third_address() -> None:
    with machine() as made:
        made.segment.add(made.transport(), wide=False)
        made.segment.add(made.transport(FakeDevice("_d2")), wide=False)

        def move(slot: int, base: int) -> None:
            at = made.config_address(slot)
            made.mmio.write(at + 4, 2, 0)
            made.mmio.write(at + 0x10, 4, base)
            made.mmio.write(at + 4, 2, 2)

        move(1, 0xD000_0000)
        move(2, 0xE7F8_0000)
        move(1, 0xE7F0_0000)
        assert placed(made) == ["01 disk e7f00000", "02 d e7f80000"]
        node = made.segment.device_tree()["_virtio-pci-_disk0"]["resources"]
        assert isinstance(node, list) and node[0]["PciBar"]["base"] == 0xE7F0_0000


def test_segments_have_windows_of_their_own() -> None:
    layout = compute(1 << 30, 46, mmio32_weights=(1, 1), mmio64_weights=(1, 1))
    mmio = Bus("mmio")
    segments = [PciSegment(windows, PciPage(), mmio) for windows in layout.segments]
    vm = fakes.RecordingVm()
    made = [VirtioPci(FakeDevice(f"_d{n}"), vm, IrqRouting(vm), fakes.Ram()) for n in range(2)]
    build(segments, [Plan("disk", made[0], 0), Plan("disk", made[1], 1)])
    assert made[0].bar == BarPlace(0xD3F8_0000, BarType.MEMORY_32)
    assert str(made[1].bdf) == "0001:00:01.0"
    assert made[1].bar is not None and made[1].bar.type is BarType.MEMORY_64
    assert mmio.read(fakes.ECAM + (1 << 20) + (1 << 15), 4) == 0x1042_1AF4


def test_pvpanic_reports_what_the_guest_writes() -> None:
    events: list[object] = []
    with machine() as made:
        panic = PvPanic(events.append)
        made.segment.add(panic, wide=False)
        assert made.mmio.read(0xE7FF_FFF0, 1) == 3
        for value in (1, 2, 3, 0):
            made.mmio.write(0xE7FF_FFF0, 1, value)
        state = panic.save()
        panic.load(state)
        assert state["events"] == 3
    assert [str(event) for event in events] == ["GuestEvent.PANIC", "GuestEvent.CRASH_LOADED"]


@pytest.mark.parametrize("text", ["0000:00:20.0", "0000:00:01.1", "0000:01:01.0", "x", "10000:00:01.0"])
def test_addresses_that_are_no_bdf(text: str) -> None:
    with pytest.raises(ValueError):
        Bdf.parse(text)


def test_bdf_round_trip() -> None:
    assert Bdf.parse("0001:00:1f.0") == Bdf(1, 31)
    assert str(Bdf(1, 31)) == "0001:00:1f.0"
