"""A PCI function as the host bridge sees it: configuration space, one memory BAR, and where they are.

Every function of this machine is number 0 of its slot and has at most one BAR, number 0.
"""

from __future__ import annotations

from collections.abc import Callable

from controller.bus import Effect
from controller.devices.state import State
from controller.pci.config_space import RESOURCE_NAMES, BarMove, BarType, ConfigSpace, Header
from shared.records import Record


class Bdf(Record):
    """Where a function is; bus and function number are always 0."""

    segment: int
    slot: int

    def __str__(self) -> str:
        return f"{self.segment:04x}:00:{self.slot:02x}.0"

    @classmethod
    def parse(cls, text: str) -> Bdf:
        """Raises ValueError for what is not a function 0 on a bus 0."""
        segment, bus, rest = text.split(":")
        slot, _, number = rest.partition(".")
        if (
            int(bus, 16)
            or int(number, 16)
            or not 0 <= int(slot, 16) < 32
            or not 0 <= int(segment, 16) <= 0xFFFF
        ):
            raise ValueError(f"{text}: not function 0 of a slot on bus 0")
        return cls(int(segment, 16), int(slot, 16))


class BarSpec(Record):
    """BAR 0: its size, and its alignment where it is allocated as a 32-bit or a 64-bit BAR. Bytes, powers of two."""

    size: int
    align32: int
    align64: int


class BarPlace(Record, frozen=False):
    """Where BAR 0 answers now. It follows the guest's writes once memory decoding is on."""

    base: int
    type: BarType


class PciFunction:
    """Base of every function. A subclass with a BAR is the BusDevice that answers there."""

    bar_spec: BarSpec | None = None
    dynamic_dwords: tuple[int, ...] = ()  # those whose reads have to be computed (read_config)

    def __init__(self, id: str, header: Header) -> None:
        self.id = id
        self.config = ConfigSpace(header)
        self.bdf: Bdf | None = None
        self.bar: BarPlace | None = None
        self.relocate: Callable[[PciFunction, BarMove], None] = lambda function, move: (
            function.config.revert(move)
        )

    def read_config(self, dword: int) -> int:
        """One dword of the configuration space, as it is now."""
        return self.config.registers[dword]

    def write_config(self, offset: int, size: int, value: int) -> Effect | None:
        """A guest's write to the configuration space."""
        for move in self.config.write(offset, size, value):
            self.relocate(self, move)
        return None

    def bar_moved(self, old_base: int) -> None:
        """`bar` has a new base, and the bus has it already."""

    def read(self, offset: int, size: int) -> int | None:
        return None

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        return None

    def close(self) -> None:
        """Give back what the function holds in KVM and in the process."""

    def device_tree(self) -> dict[str, State]:
        """Nodes for vm.info and for the migration state: id -> node, without keys that are unset."""
        return {self.id: self.node()}

    def node(self, children: tuple[str, ...] = ()) -> State:
        resources: list[State] = []
        if self.bar is not None and self.bar_spec is not None:
            bar = {
                "index": 0,
                "base": self.bar.base,
                "size": self.bar_spec.size,
                "type_": RESOURCE_NAMES[self.bar.type],
                "prefetchable": False,
            }
            resources.append({"PciBar": bar})
        return {"id": self.id, "resources": resources, "children": list(children), "pci_bdf": str(self.bdf)}
