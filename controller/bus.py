"""Address decoding on the exit path: which device answers a port or a guest physical address.

One Bus for ports, one for MMIO. A lookup is one bisection in a sorted list, about a microsecond in Python, which
is what an exit can afford. An access belongs to the device that holds its first byte, as in Cloud Hypervisor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Coroutine

from shared.errors import HostError
from shared.typed import Any, Protocol

Effect = Coroutine[Any, Any, None]


class BusDevice(Protocol):
    def read(self, offset: int, size: int) -> int | None:
        """The value, little-endian in `size` bytes (1, 2, 4 or 8); None leaves the data of kvm_run untouched."""

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Carry out a write. A coroutine is an effect that the writing vCPU has to wait for (a device's
        activation)."""


class Bus:
    """Non-overlapping [base, base + size) ranges, each with its device."""

    __slots__ = ("_bases", "_ranges", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._bases: list[int] = []
        self._ranges: list[tuple[int, int, BusDevice]] = []  # (base, end, device), in the order of _bases

    def register(self, base: int, size: int, device: BusDevice) -> None:
        """Raises HostError when the range is empty or overlaps one that is taken."""
        if size <= 0 or base < 0:
            raise HostError(f"{self.name} bus: empty range at {base:#x}")
        at = bisect_right(self._bases, base)
        for start, end, _ in self._ranges[max(at - 1, 0) : at + 1]:
            if start < base + size and base < end:
                raise HostError(f"{self.name} bus: {base:#x}+{size:#x} overlaps {start:#x}+{end - start:#x}")
        self._bases.insert(at, base)
        self._ranges.insert(at, (base, base + size, device))

    def unregister(self, base: int) -> None:
        """Raises HostError when no range begins there."""
        at = bisect_right(self._bases, base) - 1
        if at < 0 or self._bases[at] != base:
            raise HostError(f"{self.name} bus: nothing is registered at {base:#x}")
        del self._bases[at], self._ranges[at]

    def move(self, base: int, new_base: int) -> None:
        """Move a range; it stays where it was when the new place is taken (HostError)."""
        at = bisect_right(self._bases, base) - 1
        if at < 0 or self._bases[at] != base:
            raise HostError(f"{self.name} bus: nothing is registered at {base:#x}")
        start, end, device = self._ranges[at]
        self.unregister(base)
        try:
            self.register(new_base, end - start, device)
        except HostError:
            self.register(base, end - start, device)
            raise

    def find(self, address: int) -> tuple[BusDevice, int] | None:
        """The device at an address and the offset in its range."""
        at = bisect_right(self._bases, address) - 1
        if at < 0:
            return None
        base, end, device = self._ranges[at]
        return (device, address - base) if address < end else None

    def read(self, address: int, size: int) -> int | None:
        at = bisect_right(self._bases, address) - 1
        if at < 0:
            return None
        base, end, device = self._ranges[at]
        return device.read(address - base, size) if address < end else None

    def write(self, address: int, size: int, value: int) -> Effect | None:
        at = bisect_right(self._bases, address) - 1
        if at < 0:
            return None
        base, end, device = self._ranges[at]
        return device.write(address - base, size, value) if address < end else None

    def ranges(self) -> list[tuple[int, int, BusDevice]]:
        """(base, size, device) in ascending order, for diagnosis."""
        return [(base, end - base, device) for base, end, device in self._ranges]
