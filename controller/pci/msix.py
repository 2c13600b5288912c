"""MSI-X of one function: the vector table, the pending bits, and the eventfds that back ends signal.

Each vector has an eventfd. While the guest would take the interrupt (MSI-X enabled, neither the function nor the
vector masked) it is an irqfd, and KVM injects without us. Otherwise it only counts, and what it counted is
drained into the pending bit array when that is read or saved; unmasking injects what is pending.

What a guest sees at power-on contradicts itself, as in Cloud Hypervisor: the control word reads Enable=1, Mask=0, but
the function behaves as disabled and masked until the control word is written.

Sources: PCI Local Bus 3.0, section 6.8.2; the reference's cloud-hypervisor-machine page, sections 2.3 to 2.5.
"""

from __future__ import annotations

import os

from controller.devices.state import Fields, State
from controller.irq import IrqRouting
from shared.errors import ProtocolError
from shared.reactor import drain_eventfd
from shared.typed import Final

MAX_VECTORS: Final = 2048
ENABLE: Final = 1 << 15
FUNCTION_MASK: Final = 1 << 14
NO_VECTOR: Final = 0xFFFF

_ENTRY_KEYS: Final = ("msg_addr_lo", "msg_addr_hi", "msg_data", "vector_ctl")
_CONTROL: Final = 3  # word of an entry
_MASKED: Final = 1


class Msix:
    """Table and PBA of `vectors` vectors. GSIs and eventfds are taken when a vector is first used."""

    __slots__ = (
        "_assigned",
        "_eventfds",
        "_gsis",
        "_pba",
        "_routing",
        "_words",
        "enabled",
        "masked",
        "vectors",
    )

    def __init__(self, vectors: int, routing: IrqRouting) -> None:
        assert 0 < vectors <= MAX_VECTORS
        self.vectors = vectors
        self.enabled = False
        self.masked = True
        self._routing = routing
        self._words = [0, 0, 0, _MASKED] * vectors  # address low, address high, data, control
        self._pba = [0] * (vectors // 64 + 1)
        self._gsis = [-1] * vectors
        self._eventfds = [-1] * vectors
        self._assigned = [False] * vectors

    # What the device side uses ----------------------------------------------------------------------------------

    def eventfd(self, vector: int) -> int:
        """The eventfd that raises a vector. It stays the same and open until close()."""
        fd = self._eventfds[vector]
        if fd < 0:
            fd = self._eventfds[vector] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return fd

    def signal(self, vector: int) -> None:
        """Raise a vector, or make it pending. NO_VECTOR and what is past the table raise nothing."""
        if vector < self.vectors:
            os.eventfd_write(self.eventfd(vector), 1)

    # Guest accesses ---------------------------------------------------------------------------------------------

    def set_control(self, control: int) -> None:
        """The guest has written the message control word."""
        self.masked = bool(control & FUNCTION_MASK)
        self.enabled = bool(control & ENABLE)
        self._apply_all()

    def read_table(self, offset: int, size: int) -> int:
        """`offset` in bytes from the table's start. All ones past the last entry and for sizes but 4 and 8."""
        word = offset >> 2
        if size not in (4, 8) or word >= len(self._words):
            return (1 << 8 * size) - 1
        if offset % size:
            return 0
        if size == 4:
            return self._words[word]
        return self._words[word + 1] << 32 | self._words[word]

    def write_table(self, offset: int, size: int, value: int) -> None:
        word = offset >> 2
        if size not in (4, 8) or word >= len(self._words) or offset % size:
            return
        before = self._words[word : word + 2]
        self._words[word] = value & 0xFFFF_FFFF
        if size == 8:
            self._words[word + 1] = value >> 32
        if self._words[word : word + 2] != before:
            vector = word >> 2
            if self._deliverable(vector):
                self._route(vector)
                self._routing.commit()
            self._apply(vector)

    def read_pba(self, offset: int, size: int) -> int:
        word = offset >> 3
        if size not in (4, 8) or word >= len(self._pba):
            return (1 << 8 * size) - 1
        if offset % size:
            return 0
        self._collect()
        return self._pba[word] >> 8 * (offset & 7) & (1 << 8 * size) - 1

    # Masking ----------------------------------------------------------------------------------------------------

    def _deliverable(self, vector: int) -> bool:
        return self.enabled and not self.masked and not self._words[4 * vector + _CONTROL] & _MASKED

    def _route(self, vector: int) -> None:
        if self._gsis[vector] < 0:
            self._gsis[vector] = self._routing.allocate_gsi()
        low, high, data = self._words[4 * vector : 4 * vector + 3]
        self._routing.set_msi(self._gsis[vector], low, high, data)

    def _apply_all(self) -> None:
        for vector in range(self.vectors):
            if self._deliverable(vector):
                self._route(vector)
        self._routing.commit()
        for vector in range(self.vectors):
            self._apply(vector)

    def _apply(self, vector: int) -> None:
        """Make the vector's eventfd an irqfd, or no longer one. Its route is in force already."""
        deliverable = self._deliverable(vector)
        if deliverable == self._assigned[vector]:
            return
        fd = self.eventfd(vector)
        if not deliverable:
            self._routing.deassign_irqfd(self._gsis[vector], fd)
            self._assigned[vector] = False
            return
        if self._take_pending(vector):
            os.eventfd_write(fd, 1)  # injected by the assignment: KVM looks at the count then
        self._routing.assign_irqfd(self._gsis[vector], fd)
        self._assigned[vector] = True

    def _take_pending(self, vector: int) -> bool:
        word, bit = divmod(vector, 64)
        pending = self._pba[word] >> bit & 1
        self._pba[word] &= ~(1 << bit)
        return bool(pending)

    def _collect(self) -> None:
        """Move what undelivered eventfds have counted into the pending bits."""
        for vector, fd in enumerate(self._eventfds):
            if fd >= 0 and not self._assigned[vector] and drain_eventfd(fd):
                self._pba[vector >> 6] |= 1 << (vector & 63)

    # State ------------------------------------------------------------------------------------------------------

    def save(self) -> State:
        """Keys of Cloud Hypervisor's `msix_config`. Back ends are quiet: nothing is signalled afterwards."""
        self._collect()
        entries = (self._words[i : i + 4] for i in range(0, len(self._words), 4))
        return {
            "table_entries": [dict(zip(_ENTRY_KEYS, entry, strict=True)) for entry in entries],
            "pba_entries": list(self._pba),
            "masked": self.masked,
            "enabled": self.enabled,
        }

    def load(self, fields: Fields) -> None:
        """Take the state and set routes, which the next commit sends; attach() follows.

        Raises ProtocolError; nothing has changed then.
        """
        entries = fields.sections("table_entries")
        if len(entries) != self.vectors:
            raise ProtocolError(
                f"state of {fields.where}: {len(entries)} vectors, but the device has {self.vectors}"
            )
        words = [entry.integer(key, 32) for entry in entries for key in _ENTRY_KEYS]
        pba = fields.integers("pba_entries", 64, len(self._pba))
        masked, enabled = fields.flag("masked"), fields.flag("enabled")
        self._words, self._pba, self.masked, self.enabled = words, pba, masked, enabled
        for vector in range(self.vectors):
            if self._deliverable(vector):
                self._route(vector)

    def attach(self) -> None:
        """Assign the irqfds of a restored function."""
        for vector in range(self.vectors):
            self._apply(vector)

    def close(self) -> None:
        """Give back irqfds, GSIs and eventfds; nothing may signal the eventfds any more."""
        for vector in range(self.vectors):
            fd, gsi = self._eventfds[vector], self._gsis[vector]
            if self._assigned[vector]:
                self._routing.deassign_irqfd(gsi, fd)
                self._assigned[vector] = False
            if gsi >= 0:
                self._routing.free_gsi(gsi)
                self._gsis[vector] = -1
            if fd >= 0:
                os.close(fd)
                self._eventfds[vector] = -1
