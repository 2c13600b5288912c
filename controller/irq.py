"""Interrupt routing of a split irqchip: MSI routes on GSIs, and eventfds that inject them (irqfds).

The LAPICs are in KVM; everything that interrupts a guest is an MSI: MSI-X vectors and the pins of the user-space
IOAPIC alike. GSIs 0 to 23 stay empty (they are reserved for the IOAPIC's pins when the irqchip is split), routes
begin at 24, as in Cloud Hypervisor. KVM replaces its table as a whole, so changes are collected and `commit()`
sends them in one ioctl.

Sources: Documentation/virt/kvm/api.rst 4.52 (KVM_SET_GSI_ROUTING), 4.75 (KVM_IRQFD); arch/x86/kvm (x2APIC message
format).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from shared.errors import HostError
from shared.records import NamedTuple
from shared.typed import Protocol

FIRST_GSI = 24
MAX_GSIS = 4096  # KVM_MAX_IRQ_ROUTES

_EXT_DEST_ID = 0xFE0  # bits 11:5 of the address; bit 4 set would mean the remappable format
_REMAPPABLE = 0x10


class MsiRoute(NamedTuple):
    """One entry of KVM's routing table."""

    gsi: int
    address_lo: int
    address_hi: int
    data: int


class KvmVm(Protocol):
    """The four VM ioctls of the device model. Raise OSError (or its KvmError) when KVM refuses."""

    def set_gsi_routing(self, routes: Iterable[tuple[int, int, int, int]]) -> None: ...

    def irqfd(self, fd: int, gsi: int, *, deassign: bool = False) -> None: ...

    def ioeventfd(self, fd: int, address: int, *, deassign: bool = False) -> None:
        """An MMIO ioeventfd without data match that takes an access of any length."""


def translate_destination(address_lo: int, address_hi: int) -> tuple[int, int]:
    """A guest's MSI address as KVM wants it.

    The guest was offered KVM_FEATURE_MSI_EXT_DEST_ID: bits 11:5 of the address carry bits 14:8 of the
    destination. KVM expects them in bits 31:8 of the high word. KVM refuses the whole table over one entry with
    bits 7:0 of the high word set, so these, which mean nothing to it, are dropped: a guest's bad entry must cost
    no other device its interrupts.
    """
    address_hi &= 0xFFFF_FF00
    extended = address_lo & _EXT_DEST_ID
    if extended and not address_hi and not address_lo & _REMAPPABLE:
        return address_lo & ~_EXT_DEST_ID & 0xFFFF_FFFF, extended << 3
    return address_lo & 0xFFFF_FFFF, address_hi


class IrqRouting:
    """The routing table of one VM."""

    __slots__ = ("_dirty", "_free", "_next", "_routes", "_vm")

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._routes: dict[int, MsiRoute] = {}
        self._free: list[int] = []
        self._next = FIRST_GSI
        self._dirty = False

    def allocate_gsi(self) -> int:
        """The lowest free GSI. Raises HostError when KVM's table is full."""
        if self._free:
            return heapq.heappop(self._free)
        if self._next >= MAX_GSIS:
            raise HostError(
                f"KVM has no more than {MAX_GSIS} interrupt routes", "give the VM fewer devices or queues"
            )
        self._next += 1
        return self._next - 1

    def free_gsi(self, gsi: int) -> None:
        """Give a GSI back; its route goes, and its irqfds must be gone."""
        self.clear(gsi)
        heapq.heappush(self._free, gsi)

    def set_msi(self, gsi: int, address_lo: int, address_hi: int, data: int) -> None:
        """Route a GSI to the message that the guest programmed. In force after commit()."""
        route = MsiRoute(gsi, *translate_destination(address_lo, address_hi), data & 0xFFFF_FFFF)
        if self._routes.get(gsi) != route:
            self._routes[gsi] = route
            self._dirty = True

    def clear(self, gsi: int) -> None:
        """Remove a route, if there is one. In force after commit()."""
        if self._routes.pop(gsi, None) is not None:
            self._dirty = True

    def commit(self) -> None:
        """Give KVM the whole table in one ioctl, if anything has changed."""
        if self._dirty:
            self._vm.set_gsi_routing(self._routes.values())
            self._dirty = False

    def assign_irqfd(self, gsi: int, fd: int) -> None:
        """Let the eventfd inject the GSI's message. A count that the eventfd already holds is injected at once.

        The table goes first: an irqfd whose GSI has no route yet would lose that count.
        """
        self.commit()
        self._vm.irqfd(fd, gsi)

    def deassign_irqfd(self, gsi: int, fd: int) -> None:
        """From now on the eventfd only counts. What it was signalled before has been injected when this returns."""
        self._vm.irqfd(fd, gsi, deassign=True)
