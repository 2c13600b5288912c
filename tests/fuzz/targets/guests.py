"""What a guest does to registers, and what is loaded in the name of one: PCI, the platform's devices, saved states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from controller.bus import Bus
from controller.devices.acpi import AcpiShutdown, Ged, PmTimer
from controller.devices.cmos import Cmos
from controller.devices.debug_port import DebugPort, firmware_debug_port
from controller.devices.hotplug import CpuHotplug, PciHotplug
from controller.devices.i8042 import I8042
from controller.devices.ioapic import Ioapic
from controller.devices.serial import Serial
from controller.irq import IrqRouting
from controller.machine import layout as lo
from controller.vm_state import checked
from net_worker.settings import Settings
from shared.errors import ProtocolError, WorkerError
from shared.state_versions import KINDS, VM
from shared.virtio_blk import BlkConfig
from tests.controller.fakes import FakeDevice, Machine, RecordingVm, finish
from tests.fuzz.choices import Choices
from tests.fuzz.engine import Target
from tests.golden_states import read
from vcpu_worker.layout import TimerPage, UartPage

SIZES = (1, 2, 4, 8)
BAR_PLACES = (0x14, 0x16, 0x18, 0x1A, 0x1C, 0x20, 0x28, 0x30, 0x00, 0x08, 0x0C, 0x2000, 0x4000, 0x4FFF, 0x6000, 0x6004,
              0x8000, 0x800C, 0x48000, 0x487FC, 0x7FFFC)  # fmt: skip
STATUS = (0, 1, 3, 11, 15, 0x80, 0xFF)


# PCI -------------------------------------------------------------------------------------------------------------


class PciRig:
    """A segment with two virtio functions; the second is left alone, and must not notice."""

    def __init__(self, failing: bool) -> None:
        self.machine = Machine()
        device = FakeDevice(queue_sizes=(128, 128), fail=WorkerError("back end") if failing else None)
        self.transport, self.neighbour = self.machine.transport(device), self.machine.transport(FakeDevice("_disk1"))
        self.machine.segment.add(self.transport, wide=False)
        self.machine.segment.add(self.neighbour, wide=False)

    def step(self, choices: Choices) -> None:
        size, kind = choices.one_of(SIZES), choices.below(8)
        assert self.transport.bar is not None
        if kind < 3:
            address = self.transport.bar.base + (choices.one_of(BAR_PLACES) if choices.flag() else choices.number(19))
            bus = self.machine.mmio
        elif kind < 6:
            address = self.machine.config_address(choices.one_of((0, 1, 1, 1, 3, 31)), choices.below(0x1000))
            bus = self.machine.mmio
        elif kind == 6:
            # CF8 may name the neighbour; it must be the guest's intention then.
            latch = choices.one_of((0x8000_0000, 0x8000_0800, 0, 0x8001_0000))
            self.machine.page.set_address(latch | choices.below(256))
            offset, size = choices.below(8), min(size, 4)
            value = choices.number(8 * size)
            self.machine.ports.read(offset, size)
            if offset >= 4 or size < 2:
                self.machine.page.set_address(self.machine.ports.latch & ~0xF800 | 0x800)
                finish(self.machine.ports.write(4 | offset & 3, size, value))
            return
        else:
            self.start(choices)
            return
        value = choices.one_of(STATUS) if size == 1 and choices.flag() else choices.number(8 * size)
        read = bus.read(address, size)
        assert read is None or 0 <= read < 1 << 8 * size
        finish(bus.write(address, size, value & (1 << 8 * size) - 1))

    def start(self, choices: Choices) -> None:
        for status in (0, 1, 3):
            finish(self.transport.write(0x14, 1, status))
        for queue in range(2):
            finish(self.transport.write(0x16, 2, queue))
            for place in (0x20, 0x28, 0x30):
                finish(self.transport.write(place, 8, choices.number(64)))
            finish(self.transport.write(0x1A, 2, choices.number(16)))
            finish(self.transport.write(0x1C, 2, 1))
        finish(self.transport.write(0x14, 1, 15))

    def check(self) -> None:
        place = self.neighbour.bar
        assert place is not None
        assert self.machine.mmio.read(place.base + 0x12, 2) == 1
        assert self.machine.mmio.read(self.machine.config_address(2), 4) == 0x1042_1AF4


def pci() -> Iterator[Callable[[bytes], None]]:
    def run(data: bytes) -> None:
        choices = Choices(data)
        rig = PciRig(choices.flag())
        try:
            while choices.left:
                rig.step(choices)
            rig.check()
            _loads_elsewhere(rig)
        finally:
            rig.machine.close()

    yield run


def _loads_elsewhere(rig: PciRig) -> None:
    """Whatever state it is in can be saved, and a fresh transport takes it."""
    state, device_state = rig.transport.save(), rig.transport.save_device()
    other = Machine()
    try:
        copy = other.transport(FakeDevice(queue_sizes=(128, 128)))
        other.segment.add(copy, 1, rig.transport.bar)
        copy.load(state, device_state)
        again = copy.save()
        for key in ("msix_config", "virtio_pci_common_config", "pci_configuration"):
            assert again[key] == state[key], key  # type: ignore[index]
    finally:
        other.close()


# The platform's devices ------------------------------------------------------------------------------------------


class PlatformRig:
    """The devices that platform.py wires, at the places where it wires them, on a recording KVM."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.printed = bytearray()
        self.deferred: list[Callable[[], None]] = []
        self.vm = RecordingVm()
        self.ioapic = Ioapic(IrqRouting(self.vm))
        self.ged = Ged(lambda: self.ioapic.pulse(lo.GED_GSI))
        self.timer = PmTimer(TimerPage())
        self.cmos = Cmos(1 << 30, 1 << 32, self.events.append)
        self.pci_hotplug = PciHotplug(1, lambda segment, slot: self.events.append((segment, slot)))
        self.cpu_hotplug = CpuHotplug(1, 4, self.events.append)
        self.serial = Serial(
            UartPage(), self.ioapic.eventfd(lo.COM1_GSI), self.printed.extend,
            lambda _seconds, callback: self.deferred.append(callback),
        )  # fmt: skip
        self.pio, self.mmio = Bus("port"), Bus("memory")
        self.places: list[tuple[Bus, int, int]] = []
        for bus, base, size, device in (
            (self.pio, lo.COM1_PORT, lo.COM1_SIZE, self.serial),
            (self.pio, lo.I8042_PORT, lo.I8042_SIZE, I8042(self.events.append)),
            (self.pio, lo.CMOS_PORT, lo.CMOS_SIZE, self.cmos),
            (self.pio, lo.POST_PORT, 1, DebugPort()),
            (self.pio, lo.FIRMWARE_DEBUG_PORT, 1, firmware_debug_port(self.printed.extend)),
            (self.pio, lo.ACPI_SHUTDOWN_PORT, lo.ACPI_SHUTDOWN_SIZE, AcpiShutdown(self.events.append)),
            (self.pio, lo.ACPI_PM_TIMER_PORT, lo.ACPI_PM_TIMER_SIZE, self.timer),
            (self.mmio, lo.IOAPIC_START, lo.IOAPIC_SIZE, self.ioapic),
            (self.mmio, 0x1000, 1, self.ged),
            (self.mmio, 0x2000, 16, self.pci_hotplug),
            (self.mmio, 0x3000, 12, self.cpu_hotplug),
        ):
            bus.register(base, size, device)  # type: ignore[arg-type]
            self.places.append((bus, base, size))

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "ioapic": self.ioapic, "ged": self.ged, "timer": self.timer, "cmos": self.cmos, "serial": self.serial,
            "pci_hotplug": self.pci_hotplug, "cpu_hotplug": self.cpu_hotplug,
        }  # fmt: skip

    def step(self, choices: Choices) -> None:
        bus, base, length = choices.one_of(self.places)
        size = choices.one_of(SIZES if bus is self.mmio else SIZES[:3])
        address = base + choices.below(length)
        match choices.below(8):
            case 0 | 1 | 2:
                value = bus.read(address, size)
                assert value is None or 0 <= value < 1 << 8 * size, (hex(address), size, value)
            case 7:
                self.host_acts(choices)
            case _:
                finish(bus.write(address, size, choices.number(8 * size)))

    def host_acts(self, choices: Choices) -> None:
        match choices.below(5):
            case 0:
                self.ged.press_power_button()
            case 1:
                self.serial.push_input(choices.bytes(choices.below(100)))
            case 2:
                self.cpu_hotplug.mark_removing(choices.below(4))
            case 3:
                self.ioapic.end_of_interrupt(choices.below(256))
            case _:
                waiting, self.deferred = self.deferred, []
                for callback in waiting:
                    callback()

    def close(self) -> None:
        self.serial.close()
        self.ioapic.close()
        assert not self.vm.irqfds


def devices() -> Iterator[Callable[[bytes], None]]:
    def run(data: bytes) -> None:
        choices = Choices(data)
        rig, other = PlatformRig(), PlatformRig()
        try:
            while choices.left:
                rig.step(choices)
            for name, part in rig.parts.items():
                state = part.save()
                other.parts[name].load(state)
                if name != "timer":
                    assert other.parts[name].save() == state, name
        finally:
            rig.close()
            other.close()

    yield run


# Saved states ----------------------------------------------------------------------------------------------------


def states() -> Iterator[Callable[[bytes], None]]:
    """A device that refuses a state is as it was before; one that takes it works and can be saved."""

    def run(data: bytes) -> None:
        choices = Choices(data)
        rig = PlatformRig()
        try:
            for _ in range(choices.below(8)):
                rig.step(choices)
            name = choices.one_of(list(rig.parts))
            part = rig.parts[name]
            before = part.save()
            try:
                part.load(choices.damage(before))
            except ProtocolError:
                assert name == "timer" or part.save() == before
            for _ in range(20):
                rig.step(choices)
            for part in rig.parts.values():
                part.save()
        finally:
            rig.close()

    yield run


def transport_states() -> Iterator[Callable[[bytes], None]]:
    """The state of a virtio-pci function."""

    def run(data: bytes) -> None:
        choices = Choices(data)
        rig, other = PciRig(False), PciRig(False)
        try:
            for _ in range(choices.below(6)):
                rig.step(choices)
            both = _map(choices.damage({"transport": rig.transport.save(), "device": rig.transport.save_device()}))
            with contextlib.suppress(ProtocolError):
                other.transport.load(both.get("transport"), _map(both.get("device")))
                finish(other.transport.restore_activate())
                other.transport.signal_all()
            for _ in range(10):
                other.step(choices)
            other.transport.save()
            other.check()
        finally:
            rig.machine.close()
            other.machine.close()

    yield run


def vm_states() -> Iterator[Callable[[bytes], None]]:
    """The whole of a VM's state, as tests/golden has one."""
    golden = read(VM, VM.version)["state"]
    checked(golden)

    def run(data: bytes) -> None:
        state = checked(Choices(data).damage(golden))
        assert state.keys() == golden.keys() - {"version"}
        for saved in [*state["net_workers"].values(), state["console_worker"]]:
            assert saved is None or saved.keys() == {"kind", "version", "state"}
        for function in state["functions"].values():
            assert function["transport"] is not None and function["device"] is not None

    yield run


def worker_states() -> Iterator[Callable[[bytes], None]]:
    blk = dict.fromkeys(BlkConfig._fields, 1) | {"geometry": {"cylinders": 1, "heads": 2, "sectors": 3}}
    net = {"pairs": 1, "offloads": 0, "announce": False}

    def run(data: bytes) -> None:
        choices = Choices(data)
        match choices.below(3):
            case 0:
                BlkConfig.load(_map(choices.damage(blk))).pack()
            case 1:
                assert 1 <= Settings.load(_map(choices.damage(net)), 4).pairs <= 4
            case _:
                kind = choices.one_of(list(KINDS.values()))
                kind.upgrade(choices.junk(), {"a": choices.junk()})

    yield run


def _map(value: Any) -> dict[str, Any]:
    """The control channel lets nothing else through as a state (shared/messages.py)."""
    return value if isinstance(value, dict) else {}


TARGETS = (
    Target("pci", pci, about="configuration space, BARs, MSI-X and virtio registers of one function beside another"),
    Target("devices", devices, about="serial port, CMOS, ACPI, hotplug, IOAPIC; their states in a second machine"),
    Target("states", states, about="damaged states of the platform's devices"),
    Target("transport_states", transport_states, about="damaged states of a virtio-pci function"),
    Target("vm_states", vm_states, about="the whole state of a VM, its parts left out"),
    Target("worker_states", worker_states, about="damaged states of device workers"),
)
