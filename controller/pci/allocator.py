"""Guest physical addresses for BARs, handed out from the top of a window downwards, as Cloud Hypervisor does.

The order of allocation therefore decides every address, and a guest that moves between the two VMMs keeps them.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from shared.errors import HostError


class AddressAllocator:
    """The window [start, end). Addresses and sizes in bytes."""

    __slots__ = ("_taken", "end", "name", "start")

    def __init__(self, name: str, start: int, end: int) -> None:
        self.name = name
        self.start = start
        self.end = end
        self._taken: list[tuple[int, int]] = []  # (start, end) in ascending order

    def allocate(self, size: int, align: int) -> int:
        """The highest address at which `size` bytes fit, in the first gap from the top that is large enough.

        Raises HostError when no gap is.
        """
        top = self.end
        for start, end in reversed([(self.start, self.start), *self._taken]):
            address = top - size & -align
            if address >= end:
                insort(self._taken, (address, address + size))
                return address
            top = start
        raise HostError(f"no room for {size:#x} bytes in the {self.name} window of PCI addresses")

    def claim(self, address: int, size: int, align: int = 4) -> None:
        """Take one particular range. Raises HostError when it is outside the window, unaligned or taken."""
        if address < self.start or address + size > self.end or address % align:
            raise HostError(
                f"{address:#x}+{size:#x} is not in the {self.name} window, or not aligned to {align:#x}"
            )
        at = bisect_left(self._taken, (address, 0))
        for start, end in self._taken[max(at - 1, 0) : at + 1]:
            if start < address + size and address < end:
                raise HostError(
                    f"{address:#x}+{size:#x} in the {self.name} window is taken ({start:#x} to {end:#x})"
                )
        insort(self._taken, (address, address + size))

    def free(self, address: int, size: int) -> None:
        """Raises HostError unless exactly this range was given out."""
        try:
            self._taken.remove((address, address + size))
        except ValueError:
            raise HostError(f"{address:#x}+{size:#x} of the {self.name} window was not allocated") from None
