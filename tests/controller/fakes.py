"""Stand-ins for what the device model talks to: KVM's VM ioctls, and a virtio device with real eventfds."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from controller.bus import Bus
from controller.irq import IrqRouting
from controller.machine.layout import PciSegment as SegmentWindows
from controller.machine.layout import Range
from controller.pci.host import ConfigPorts, PciSegment
from controller.pci.virtio import Virtqueue
from controller.pci.virtio_pci import VirtioPci
from shared.errors import BadGuestAddress, FlotillaError
from vcpu_worker.layout import PciPage

MIB = 1 << 20
RAM_SIZE = 16 * MIB
ECAM = 0xE800_0000
# 46 physical address bits, RAM below 3 GiB.
WINDOWS = SegmentWindows(
    0,
    Range(ECAM, MIB),
    Range(0xC000_0000, 640 * MIB),
    Range(0x1_0000_0000, 0x3FFF_FFEF_0000 - 0x1_0000_0000),
)

NET, BLOCK, CONSOLE, RNG, BALLOON, RTC, VSOCK, MEM, FS, PMEM, WATCHDOG = (
    1,
    2,
    3,
    4,
    5,
    17,
    19,
    24,
    26,
    27,
    35,
)


class RecordingVm:
    """KvmVm that keeps what KVM would hold, and refuses what KVM refuses."""

    def __init__(self) -> None:
        self.routes: dict[int, tuple[int, int, int]] = {}
        self.commits = 0
        self.irqfds: set[tuple[int, int]] = set()
        self.ioeventfds: set[tuple[int, int]] = set()

    def set_gsi_routing(self, routes: Iterable[tuple[int, int, int, int]]) -> None:
        self.commits += 1
        self.routes = {gsi: (low, high, data) for gsi, low, high, data in routes}

    def irqfd(self, fd: int, gsi: int, *, deassign: bool = False) -> None:
        if deassign:
            self.irqfds.remove((fd, gsi))
        else:
            assert fd not in {known for known, _ in self.irqfds}, "EBUSY"
            assert gsi in self.routes, "a route comes before its irqfd"
            self.irqfds.add((fd, gsi))

    def ioeventfd(self, fd: int, address: int, *, deassign: bool = False) -> None:
        if deassign:
            self.ioeventfds.remove((fd, address))
        else:
            assert address not in {known for _, known in self.ioeventfds}, "EEXIST"
            self.ioeventfds.add((fd, address))


class Ram:
    """RingMemory: `RAM_SIZE` bytes from 0."""

    def host_address(self, gpa: int, size: int) -> int:
        if gpa + size > RAM_SIZE:
            raise BadGuestAddress(f"{gpa:#x} is not RAM")
        return 0x7000_0000_0000 + gpa


@dataclass
class FakeDevice:
    """VirtioDevice that remembers what it was told. `fail` is raised by the next activation or reset."""

    device_id: str = "_disk0"
    virtio_type: int = BLOCK
    queue_sizes: tuple[int, ...] = (128,)
    features: int = 0x1_3000_6E44
    has_config: bool = True
    config: bytearray = field(default_factory=lambda: bytearray(range(60)))
    fail: FlotillaError | None = None
    acked: int | None = None
    queues: tuple[Virtqueue, ...] = ()
    log: list[str] = field(default_factory=list)
    loaded: dict[str, object] | None = None

    def read_config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> Coroutine[Any, Any, None] | None:
        if offset + size <= len(self.config):
            self.config[offset : offset + size] = value.to_bytes(size, "little")
        return None

    async def activate(self, acked_features: int, queues: tuple[Virtqueue, ...]) -> None:
        self._fail_once()
        self.log.append("activate")
        self.acked, self.queues = acked_features, queues

    async def reset(self) -> None:
        self._fail_once()
        self.log.append("reset")
        self.queues = ()

    def _fail_once(self) -> None:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error

    def save(self) -> dict[str, object]:
        return {"avail_features": self.features, "acked_features": 0}

    def load(self, state: dict[str, object]) -> None:
        self.loaded = state


def finish(effect: Coroutine[Any, Any, None] | None) -> None:
    """Run an effect that never has to wait for anything."""
    if effect is not None:
        try:
            effect.send(None)
        except StopIteration:
            return
        raise AssertionError("the effect waits")


class Machine:
    """A segment with its buses, on a KvmVm."""

    def __init__(self, vm: Any = None) -> None:
        self.vm = RecordingVm() if vm is None else vm
        self.routing = IrqRouting(self.vm)
        self.mmio = Bus("mmio")
        self.page = PciPage()
        self.segment = PciSegment(WINDOWS, self.page, self.mmio)
        self.ports = ConfigPorts(self.segment, self.page)

    def transport(self, device: FakeDevice | None = None) -> VirtioPci:
        return VirtioPci(device or FakeDevice(), self.vm, self.routing, Ram())

    def config_address(self, slot: int, offset: int = 0) -> int:
        return ECAM | slot << 15 | offset

    def close(self) -> None:
        for function in self.segment.functions:
            function.close()


@contextmanager
def machine(vm: Any = None) -> Iterator[Machine]:
    made = Machine(vm)
    try:
        yield made
    finally:
        made.close()


class Driver:
    """The part of a virtio driver that the transport sees, through BAR 0."""

    def __init__(self, transport: VirtioPci) -> None:
        self.transport = transport

    def read(self, offset: int, size: int) -> int:
        value = self.transport.read(offset, size)
        assert value is not None
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        finish(self.transport.write(offset, size, value))

    def negotiate(self, features: int) -> None:
        self.write(0x14, 1, 0)
        self.write(0x14, 1, 1)
        self.write(0x14, 1, 3)
        for select in (0, 1):
            self.write(0x08, 4, select)
            self.write(0x0C, 4, features >> 32 * select & 0xFFFF_FFFF)
        self.write(0x14, 1, 11)

    def set_up_queue(self, index: int, base: int, vector: int = 0xFFFF) -> None:
        self.write(0x16, 2, index)
        self.write(0x20, 8, base)
        self.write(0x28, 8, base + 0x10000)
        self.write(0x30, 8, base + 0x20000)
        self.write(0x1A, 2, vector)
        self.write(0x1C, 2, 1)

    def enable_msix(self, control: int = 0x8000) -> None:
        """Write the message control word as a driver does, 16 bits."""
        dword = self.transport.config.msix_dword
        assert dword is not None
        finish(self.transport.write_config(dword * 4 + 2, 2, control | self.transport.msix.vectors - 1))

    def program_vector(
        self, vector: int, data: int, address: int = 0xFEE0_0000, *, masked: bool = False
    ) -> None:
        entry = 0x8000 + 16 * vector
        self.write(entry, 4, address)
        self.write(entry + 4, 4, 0)
        self.write(entry + 8, 4, data)
        self.write(entry + 12, 4, int(masked))

    def start(self, features: int = 1 << 32) -> None:
        """Everything from reset to DRIVER_OK, vector n + 1 for queue n, all vectors unmasked."""
        self.negotiate(features)
        self.enable_msix()
        for vector in range(self.transport.msix.vectors):
            self.program_vector(vector, 0x40 + vector)
        self.write(0x10, 2, 0)
        for index in range(len(self.transport.common.queues)):
            self.set_up_queue(index, 0x10_0000 * (index + 1), index + 1)
        self.write(0x14, 1, 15)
