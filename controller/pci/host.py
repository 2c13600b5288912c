"""PCI segments: slots, configuration accesses, and where BARs answer.

The vCPU loops read the configuration space of segment 0 themselves (vcpu_worker/layout.py, PciPage); what comes
here are writes, reads of dwords that have to be computed, and the other segments. A slot without a function reads
as all ones.

Sources: PCI Local Bus 3.0, section 3.2.2.3.2 (configuration mechanism 1); PCI Express 3.0, section 7.2.2 (ECAM); the
reference's cloud-hypervisor-machine page, sections 1.6, 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from controller.bus import Bus, Effect
from controller.devices.misuse import Misuse
from controller.devices.state import Fields, State
from controller.machine.layout import PCI_SLOTS
from controller.machine.layout import PciSegment as SegmentWindows
from controller.pci.allocator import AddressAllocator
from controller.pci.config_space import RESOURCE_TYPES, BarMove, BarType, Header
from controller.pci.function import BarPlace, Bdf, PciFunction
from shared.errors import ConfigError, HostError, ProtocolError
from shared.records import Record
from shared.typed import Final
from vcpu_worker.layout import PciPage

_HOST_BRIDGE: Final = Header(vendor=0x8086, device=0x0D57, class_code=0x060000)

# The order in which a VM's functions get their slots and BARs at boot.
KINDS: Final = (
    *("console", "disk", "net", "rng", "generic-vhost-user", "fs", "pmem", "vsock", "virtio-mem", "balloon"),
    *("watchdog", "vdpa", "rtc", "vfio", "vfio-user", "iommu", "pvpanic"),
)


class PciSegment:
    """One bus of 32 slots, the host bridge in the first."""

    def __init__(self, windows: SegmentWindows, page: PciPage, mmio: Bus) -> None:
        """Registers the segment's ECAM window. `page` is the shared one for segment 0, a private one for others."""
        self.number = windows.id
        self.mmio32 = AddressAllocator("32-bit", windows.mmio32.start, windows.mmio32.end)
        self.mmio64 = AddressAllocator("64-bit", windows.mmio64.start, windows.mmio64.end)
        self._page = page
        self._mmio = mmio
        self._functions: list[PciFunction | None] = [None] * PCI_SLOTS
        self._reserved: set[int] = set()
        self._dynamic: set[tuple[int, int]] = set()
        self._misuse = Misuse(f"PCI segment {self.number}")
        mmio.register(windows.mmconfig.start, windows.mmconfig.size, EcamWindow(self))
        self._plug(PciFunction("host bridge", _HOST_BRIDGE), 0)
        page.ecam_base, page.ecam_size = windows.mmconfig.start, windows.mmconfig.size
        page.enabled = 1

    # Slots ------------------------------------------------------------------------------------------------------

    def reserve_slot(self, slot: int) -> None:
        """Keep a slot for the function that asked for it (`pci_device_id`). Raises ConfigError."""
        if not 0 < slot < PCI_SLOTS:
            raise ConfigError(f"pci_device_id={slot}: 1 to {PCI_SLOTS - 1} are possible")
        if slot in self._reserved or self._functions[slot] is not None:
            raise ConfigError(f"pci_device_id={slot}: slot {slot} of PCI segment {self.number} is taken")
        self._reserved.add(slot)

    def _free_slot(self) -> int:
        for slot, function in enumerate(self._functions):
            if function is None and slot not in self._reserved:
                return slot
        raise ConfigError(
            f"PCI segment {self.number} has no free slot", "remove a device, or use another pci_segment"
        )

    def function(self, slot: int) -> PciFunction | None:
        return self._functions[slot]

    @property
    def functions(self) -> list[PciFunction]:
        """In slot order, without the host bridge."""
        return [function for function in self._functions[1:] if function is not None]

    def add(
        self,
        function: PciFunction,
        slot: int | None = None,
        bar: BarPlace | None = None,
        *,
        wide: bool = True,
    ) -> Bdf:
        """Put a function into a slot (the lowest free one by default) and give its BAR an address.

        `bar` claims the place that a restored function had. Otherwise the address is allocated, as a 64-bit BAR when
        `wide`. Raises ConfigError or HostError; the segment is unchanged then.
        """
        if slot is None:
            slot = self._free_slot()
        elif self._functions[slot] is not None:
            raise ConfigError(f"slot {slot} of PCI segment {self.number} is taken")
        self._place_bar(function, bar, wide)
        self._reserved.discard(slot)
        return self._plug(function, slot)

    def _place_bar(self, function: PciFunction, place: BarPlace | None, wide: bool) -> None:
        spec = function.bar_spec
        if spec is None:
            return
        if place is not None:
            allocator = self._allocator(place.type)
            allocator.claim(place.base, spec.size)
        else:
            kind = BarType.MEMORY_64 if wide else BarType.MEMORY_32
            allocator = self._allocator(kind)
            align = spec.align64 if wide else spec.align32
            place = BarPlace(allocator.allocate(spec.size, align), kind)
        try:
            self._mmio.register(place.base, spec.size, function)
        except HostError:
            allocator.free(place.base, spec.size)
            raise
        function.config.add_bar(0, place.base, spec.size, place.type)
        function.bar = BarPlace(place.base, place.type)

    def _plug(self, function: PciFunction, slot: int) -> Bdf:
        function.bdf = Bdf(self.number, slot)
        function.relocate = self._relocate
        function.config.publish(self._page.config_view(slot))
        self._functions[slot] = function
        for dword in function.dynamic_dwords:
            self._dynamic.add((slot, dword))
            self._page.set_dynamic(slot, dword)
        self._page.present |= 1 << slot
        return function.bdf

    def remove(self, slot: int) -> PciFunction:
        """Take a function out; closing it is the caller's. Raises HostError when the slot is empty."""
        function = self._functions[slot]
        if function is None or slot == 0:
            raise HostError(f"slot {slot} of PCI segment {self.number} holds no device")
        self._page.present &= ~(1 << slot)
        for dword in function.dynamic_dwords:
            self._dynamic.discard((slot, dword))
            self._page.set_dynamic(slot, dword, False)
        function.config.withdraw()
        if function.bar is not None and function.bar_spec is not None:
            self._mmio.unregister(function.bar.base)
            self._allocator(function.bar.type).free(function.bar.base, function.bar_spec.size)
        self._functions[slot] = None
        return function

    # BARs -------------------------------------------------------------------------------------------------------

    def _allocator(self, kind: BarType) -> AddressAllocator:
        return self.mmio64 if kind is BarType.MEMORY_64 else self.mmio32

    def _relocate(self, function: PciFunction, move: BarMove) -> None:
        """Carry out a guest's BAR move; one that is not possible is undone in the registers."""
        place, spec = function.bar, function.bar_spec
        if place is None or spec is None or place.base == move.new_base:
            return
        old, allocator = place.base, self._allocator(place.type)
        allocator.free(old, spec.size)
        try:
            allocator.claim(move.new_base, spec.size, spec.size)
        except HostError as error:
            self._undo(function, move, old, error)
            return
        try:
            self._mmio.move(old, move.new_base)
        except HostError as error:
            allocator.free(move.new_base, spec.size)
            self._undo(function, move, old, error)
            return
        place.base = move.new_base
        function.bar_moved(old)

    def _undo(self, function: PciFunction, move: BarMove, base: int, error: HostError) -> None:
        assert function.bar is not None and function.bar_spec is not None
        self._allocator(function.bar.type).claim(base, function.bar_spec.size)
        function.config.revert(BarMove(base, move.new_base, move.size, move.type))
        self._misuse.report(f"{function.id}: BAR 0 stays at {base:#x}: {error}")

    # Configuration accesses -------------------------------------------------------------------------------------

    def read_config(self, slot: int, offset: int, size: int) -> int:
        function = self._functions[slot]
        low = offset & 3
        if function is None or low + size > 4:
            return (1 << 8 * size) - 1
        dword = offset >> 2
        value = (
            function.read_config(dword)
            if (slot, dword) in self._dynamic
            else function.config.registers[dword]
        )
        return value >> 8 * low & (1 << 8 * size) - 1

    def write_config(self, slot: int, offset: int, size: int, value: int) -> Effect | None:
        function = self._functions[slot]
        if function is None or (offset & 3) + size > 4:
            return None
        return function.write_config(offset, size, value)

    def device_tree(self) -> dict[str, State]:
        """Nodes of all functions and of the devices behind them."""
        return {id: node for function in self.functions for id, node in function.device_tree().items()}


class EcamWindow:
    """A segment's memory-mapped configuration space: 1 MiB, one bus."""

    __slots__ = ("_segment",)

    def __init__(self, segment: PciSegment) -> None:
        self._segment = segment

    def read(self, offset: int, size: int) -> int | None:
        if offset & 0x7000:  # functions 1 to 7
            return (1 << 8 * size) - 1
        return self._segment.read_config(offset >> 15 & 31, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        if offset & 0x7000:
            return None
        return self._segment.write_config(offset >> 15 & 31, offset & 0xFFF, size, value)


class ConfigPorts:
    """Configuration mechanism 1 for segment 0: 8 ports from 0xCF8. The address latch is in the shared page."""

    __slots__ = ("_page", "_segment")

    def __init__(self, segment: PciSegment, page: PciPage) -> None:
        self._segment = segment
        self._page = page

    @property
    def latch(self) -> int:
        return int(self._page.latch) & 0xFFFF_FFFF

    def _target(self) -> tuple[int, int] | None:
        """(slot, register) that the latch selects."""
        latch = self.latch
        if not latch >> 31 or latch & 0xFF_0700:  # disabled, another bus, another function
            return None
        return latch >> 11 & 31, latch & 0xFC

    def read(self, offset: int, size: int) -> int | None:
        low = offset & 3
        if low + size > 4:
            return (1 << 8 * size) - 1
        if offset < 4:
            return self.latch >> 8 * low & (1 << 8 * size) - 1
        target = self._target()
        if target is None:
            return (1 << 8 * size) - 1
        slot, register = target
        return self._segment.read_config(slot, register + low, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        low = offset & 3
        if low + size > 4:
            return None
        if offset < 4:
            mask = (1 << 8 * size) - 1 << 8 * low
            self._page.set_address(self.latch & ~mask | value << 8 * low & mask)
            return None
        target = self._target()
        return (
            None if target is None else self._segment.write_config(target[0], target[1] + low, size, value)
        )

    def save(self) -> State:
        """Ours alone: Cloud Hypervisor does not carry the latch."""
        return {"latch": self.latch}

    def load(self, state: object) -> None:
        fields = Fields("CF8", state)
        if "latch" in fields:
            self._page.set_address(fields.integer("latch", 32))


class Plan(Record):
    """A function that a VM is to have. `slot` is its `pci_device_id`, if it was given one."""

    kind: str
    function: PciFunction
    segment: int = 0
    slot: int | None = None


def build(
    segments: Sequence[PciSegment], plans: Iterable[Plan], tree: Mapping[str, object] | None = None
) -> None:
    """Put all functions into their slots.

    At boot in Cloud Hypervisor's order: slots that were asked for first, then kind by kind (KINDS), within a kind as
    given. With `tree`, a device tree from a state, every function goes where it was. Raises ConfigError,
    HostError, and ProtocolError for a tree that is not one or lacks a function.
    """
    plans = list(plans)
    if tree is not None:
        for plan in plans:
            bdf, place = _placed(tree, plan.function)
            if bdf.segment >= len(segments):
                raise ProtocolError(
                    f"device tree: {plan.function.id}: PCI segment {bdf.segment} does not exist"
                )
            segments[bdf.segment].add(plan.function, bdf.slot, place)
        return
    for plan in plans:
        if plan.slot is not None:
            segments[plan.segment].reserve_slot(plan.slot)
    for plan in sorted(plans, key=lambda plan: KINDS.index(plan.kind)):
        segments[plan.segment].add(plan.function, plan.slot, wide=is_wide(plan))


def is_wide(plan: Plan) -> bool:
    """Whether a function's BAR is a 64-bit one at boot. Firmware that knows 32 bits only can boot from a disk."""
    return plan.kind != "pvpanic" and not (plan.kind == "disk" and plan.segment == 0)


def _placed(tree: Mapping[str, object], function: PciFunction) -> tuple[Bdf, BarPlace | None]:
    """Where a device tree has a function."""
    if function.id not in tree:
        raise ProtocolError(f"device tree: {function.id} is missing")
    node = Fields(f"device tree.{function.id}", tree[function.id])
    try:
        bdf = Bdf.parse(node.text("pci_bdf"))
    except ValueError as error:
        raise ProtocolError(f"device tree: {function.id}: pci_bdf: {error}") from error
    if function.bar_spec is None:
        return bdf, None
    for resource in node.sections("resources", limit=64):
        if "PciBar" in resource and (bar := resource.section("PciBar")).integer("index", 8) == 0:
            kind = RESOURCE_TYPES.get(bar.text("type_"))
            if kind is None or bar.integer("size", 64) != function.bar_spec.size:
                raise ProtocolError(
                    f"device tree: {function.id}: BAR 0 has another type or size than this device's"
                )
            return bdf, BarPlace(bar.integer("base", 64), kind)
    raise ProtocolError(f"device tree: {function.id}: resources: BAR 0 is missing")
