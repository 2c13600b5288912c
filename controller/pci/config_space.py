"""A PCI function's configuration space: header, BARs, capabilities, and which bits a guest can change.

The 1024 dwords live in a buffer of 4096 bytes. That is a page of the table that the vCPU loops read themselves
once the function is in a slot, so every change is one aligned 4-byte store, and a read never needs us.

Sources: PCI Local Bus 3.0, chapter 6; the reference's cloud-hypervisor-machine page, sections 2.3 and 7.7 (state).
"""

from __future__ import annotations

from enum import IntEnum

from controller.devices.state import Fields, State
from shared.errors import ProtocolError
from shared.records import Record
from shared.typed import Final

CONFIG_SIZE: Final = 4096
DWORDS: Final = CONFIG_SIZE // 4
BARS: Final = 6

COMMAND_DWORD: Final = 1
BAR0_DWORD: Final = 4
MEMORY_SPACE: Final = 0x2
_CACHE_LINE_DWORD: Final = 3
_SUBSYSTEM_DWORD: Final = 11
_CAPABILITIES_DWORD: Final = 13
_INTERRUPT_DWORD: Final = 15
_FIRST_CAPABILITY: Final = 0x40
_CAPABILITIES_END: Final = 0xC0
_STATUS_CAPABILITIES: Final = 0x10 << 16

_BAR_ADDRESS: Final = 0xFFFF_FFF0
_ONES: Final = 0xFFFF_FFFF
_MSIX_WRITABLE: Final = 0xC000_0000

CAP_VENDOR: Final = 0x09
CAP_MSIX: Final = 0x11


class BarType(IntEnum):
    """Low bits of a memory BAR. None of ours is prefetchable."""

    MEMORY_32 = 0x0
    MEMORY_64 = 0x4


# How the state names a type, and how the device tree does.
_REGION_NAMES: Final = {BarType.MEMORY_32: "Memory32BitRegion", BarType.MEMORY_64: "Memory64BitRegion"}
_REGION_TYPES: Final = {name: kind for kind, name in _REGION_NAMES.items()}
RESOURCE_NAMES: Final = {BarType.MEMORY_32: "Mmio32", BarType.MEMORY_64: "Mmio64"}
RESOURCE_TYPES: Final = {name: kind for kind, name in RESOURCE_NAMES.items()}


class Header(Record):
    """What identifies a function. `class_code` is base class, subclass and programming interface, 24 bits."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0
    command: int = 0


class BarMove(Record):
    """The guest has given a BAR another address."""

    old_base: int
    new_base: int
    size: int
    type: BarType


class _Bar(Record, frozen=False):
    """One of the six registers, as the state has it: `addr` with the type bits, `size` as the mask that sizing
    shows."""

    addr: int = 0
    size: int = 0
    used: bool = False
    type: BarType | None = None


class ConfigSpace:
    """Built once from a header, BARs and capabilities; from then on the guest writes, everybody reads."""

    def __init__(self, header: Header) -> None:
        self.registers = memoryview(bytearray(CONFIG_SIZE)).cast("I")
        self._writable = [0] * DWORDS
        self._bars = [_Bar() for _ in range(BARS)]
        self._pending: list[BarMove] = []
        self._last_capability: tuple[int, int] | None = None
        self.msix_dword: int | None = None

        self.registers[0] = header.device << 16 | header.vendor
        self.registers[COMMAND_DWORD] = header.command
        self.registers[2] = header.class_code << 8 | header.revision
        self.registers[_SUBSYSTEM_DWORD] = header.subsystem << 16 | header.subsystem_vendor
        # Cloud Hypervisor lets a guest write the command register only; PCI would have status bits cleared by
        # writing 1.
        self._writable[COMMAND_DWORD] = 0x0000_FFFF
        self._writable[_CACHE_LINE_DWORD] = 0x0000_00FF
        self._writable[_INTERRUPT_DWORD] = 0x0000_00FF

    def publish(self, page: memoryview) -> None:
        """Move into `page` (1024 dwords, format "I"), which from now on is the space."""
        page[:] = self.registers
        self.registers = page

    def withdraw(self) -> None:
        """Leave the page; the contents go on in a buffer of our own."""
        self.registers = memoryview(bytearray(self.registers.cast("B"))).cast("I")

    def add_bar(self, index: int, base: int, size: int, kind: BarType) -> None:
        """`size` is a power of two; a 64-bit BAR takes `index` + 1, too."""
        bar, dword = self._bars[index], BAR0_DWORD + index
        mask = -size & (1 << 64) - 1
        bar.size, bar.used, bar.type = mask & _ONES, True, kind
        self._writable[dword] = _BAR_ADDRESS
        bar.addr = self.registers[dword] = base & _BAR_ADDRESS | kind
        if kind is BarType.MEMORY_64:
            high = self._bars[index + 1]
            high.size, high.used = mask >> 32, True
            self._writable[dword + 1] = _ONES
            high.addr = self.registers[dword + 1] = base >> 32

    def add_capability(self, capability: int, body: bytes) -> int:
        """Append to the list; `body` is what follows the id and the next pointer. Returns the capability's offset."""
        if self._last_capability is None:
            offset, pointer = _FIRST_CAPABILITY, _CAPABILITIES_DWORD * 4
        else:
            last, length = self._last_capability
            offset, pointer = last + length + 3 & ~3, last + 1
        assert offset + 2 + len(body) <= _CAPABILITIES_END, "capabilities do not fit"
        raw = self.registers.cast("B")
        self.registers[COMMAND_DWORD] |= _STATUS_CAPABILITIES
        raw[offset : offset + 2 + len(body)] = bytes((capability, 0)) + body
        raw[pointer] = offset
        # The state counts a capability without its two header bytes.
        self._last_capability = (offset, len(body))
        if capability == CAP_MSIX:
            self.msix_dword = offset // 4
            self._writable[self.msix_dword] = _MSIX_WRITABLE
        return offset

    def read(self, offset: int, size: int) -> int:
        """`size` bytes at `offset`; all ones for what crosses a dword."""
        low = offset & 3
        if low + size > 4:
            return (1 << 8 * size) - 1
        return self.registers[offset >> 2] >> 8 * low & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> list[BarMove]:
        """A guest's write. Returns the BARs that have to be moved now, which happens once memory decoding is on."""
        dword, low = offset >> 2, offset & 3
        if size not in (1, 2, 4) or offset % size:
            return []
        writable = self._writable[dword]
        if writable:
            lanes = (1 << 8 * size) - 1 << 8 * low
            bits = value << 8 * low
            if size == 4 and self._is_size_probe(dword, value):
                bits &= self._bars[dword - BAR0_DWORD].size
            mask = writable & lanes
            self.registers[dword] = self.registers[dword] & ~mask | bits & mask
            if size == 4 and BAR0_DWORD <= dword < BAR0_DWORD + BARS:
                self._detect_move(dword, value)
        if self._pending and self.registers[COMMAND_DWORD] & MEMORY_SPACE:
            moves, self._pending = self._pending, []
            return moves
        return []

    def _is_size_probe(self, dword: int, value: int) -> bool:
        if not BAR0_DWORD <= dword < BAR0_DWORD + BARS:
            return False
        if self._bars[dword - BAR0_DWORD].type is None:
            return value == _ONES
        return value & _BAR_ADDRESS == _BAR_ADDRESS

    def _detect_move(self, dword: int, value: int) -> None:
        """Remember a move. One of a 64-bit BAR is complete when its upper half is written, as every guest does
        last."""
        index = dword - BAR0_DWORD
        bar, mask = self._bars[index], self._writable[dword]
        if not bar.used or bar.type is BarType.MEMORY_64 or self._is_size_probe(dword, value):
            return
        if bar.type is BarType.MEMORY_32:
            if value & mask == bar.addr & mask:
                return
            old, new = bar.addr & mask, value & mask
            bar.addr = value & mask
            self._pending.append(BarMove(old, new, -bar.size & _ONES, BarType.MEMORY_32))
            return
        low = self._bars[index - 1]
        old = bar.addr << 32 | low.addr & _BAR_ADDRESS
        new = value << 32 | self.registers[dword - 1] & _BAR_ADDRESS
        if old == new:
            return
        bar.addr, low.addr = value, self.registers[dword - 1]
        size = -(bar.size << 32 | low.size) & (1 << 64) - 1
        self._pending.append(BarMove(old, new, size, BarType.MEMORY_64))

    def revert(self, move: BarMove) -> None:
        """A move that could not be carried out: the registers show the old address again."""
        for index, bar in enumerate(self._bars):
            if bar.type is move.type and self.bar_address(index) == move.new_base:
                self._set_address(index, move.old_base)
                return

    def _set_address(self, index: int, base: int) -> None:
        bar = self._bars[index]
        assert bar.type is not None
        bar.addr = self.registers[BAR0_DWORD + index] = base & _BAR_ADDRESS | bar.type
        if bar.type is BarType.MEMORY_64:
            self._bars[index + 1].addr = self.registers[BAR0_DWORD + index + 1] = base >> 32

    def bar_address(self, index: int) -> int:
        """Where the guest last put a BAR, ignoring a size probe under way."""
        bar = self._bars[index]
        base = bar.addr & _BAR_ADDRESS
        return self._bars[index + 1].addr << 32 | base if bar.type is BarType.MEMORY_64 else base

    def save(self) -> State:
        """Keys of Cloud Hypervisor's `pci_configuration`."""
        return {
            "registers": list(self.registers),
            "writable_bits": list(self._writable),
            "bars": [
                {
                    "addr": b.addr,
                    "size": b.size,
                    "used": b.used,
                    "type": _REGION_NAMES[b.type] if b.type is not None else None,
                }
                for b in self._bars
            ],
            "rom_bar_addr": 0,
            "rom_bar_size": 0,
            "rom_bar_used": False,
            "last_capability": list(self._last_capability) if self._last_capability else None,
            "msix_cap_reg_idx": self.msix_dword,
            "pending_bar_reprogram": [
                {
                    "old_base": m.old_base,
                    "new_base": m.new_base,
                    "len": m.size,
                    "region_type": _REGION_NAMES[m.type],
                }
                for m in self._pending
            ],
        }

    def load(self, fields: Fields) -> None:
        """Take the guest-writable bits, BAR addresses and pending moves from a state.

        What identifies the function and what a guest could never change must be equal to ours: a state with other
        capabilities or another BAR size belongs to another device. Raises ProtocolError; nothing has changed then.
        """
        registers = fields.integers("registers", 32, DWORDS)
        bars = fields.sections("bars", BARS)
        addresses = [bar.integer("addr", 32) for bar in bars]
        for index, (bar, own) in enumerate(zip(bars, self._bars, strict=True)):
            if bar.integer("size", 32) != own.size:
                raise ProtocolError(
                    f"state of {fields.where}: BAR {index} has another size than this device's"
                )
        for dword, (value, own_value) in enumerate(zip(registers, self.registers, strict=True)):
            if (value ^ own_value) & ~self._writable[dword] & _ONES:
                here = f"{value:#010x}, this device's is {own_value:#010x}"
                raise ProtocolError(f"state of {fields.where}: register {dword * 4:#x} is {here}")
        pending = [self._load_move(move) for move in fields.sections("pending_bar_reprogram", limit=64)]
        for dword, value in enumerate(registers):
            if self._writable[dword]:
                self.registers[dword] = value
        for own, addr in zip(self._bars, addresses, strict=True):
            own.addr = addr
        self._pending = pending

    @staticmethod
    def _load_move(fields: Fields) -> BarMove:
        kind = _REGION_TYPES.get(fields.text("region_type"))
        if kind is None:
            raise ProtocolError(
                f"state of {fields.where}: region_type: expected one of {', '.join(_REGION_TYPES)}"
            )
        return BarMove(
            fields.integer("old_base", 64), fields.integer("new_base", 64), fields.integer("len", 64), kind
        )
