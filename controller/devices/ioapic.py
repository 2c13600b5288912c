"""The I/O APIC, 24 pins, each an MSI route with an eventfd as irqfd.

A pin is pulsed by writing its eventfd, which any process can do (the vCPU loops do it for COM1). A pulse of a
masked pin waits in the eventfd and is delivered when the guest unmasks the pin, as in Cloud Hypervisor; its state
does not carry such a pulse, ours does.

Sources: Intel 82093AA data sheet; the reference's cloud-hypervisor-machine page, section 6. Offsets in bytes from
0xFEC00000.
"""

from __future__ import annotations

import os

from controller.devices.misuse import Misuse
from controller.devices.state import PRIVATE, Fields, State
from controller.irq import IrqRouting
from controller.machine.layout import APIC_START, IOAPIC_PINS
from shared.typed import Final

PINS: Final = IOAPIC_PINS

IOREGSEL: Final = 0x00
IOWIN: Final = 0x10
_ID: Final = 0x00
_VERSION: Final = 0x01
_ARBITRATION: Final = 0x02
_REDIRECTION: Final = 0x10  # registers 0x10 to 0x3f, low word first
_VERSION_VALUE: Final = 0x0017_0011

_MASKED: Final = 1 << 16
_LEVEL: Final = 1 << 15
_REMOTE_IRR: Final = 1 << 14
_READ_ONLY: Final = 0x5000  # delivery status and remote IRR
_POWER_ON: Final = _MASKED


def msi_message(entry: int) -> tuple[int, int]:
    """(address, data) of a redirection entry. The redirection hint is always set, as Cloud Hypervisor does."""
    address = APIC_START | (entry >> 56 & 0xFF) << 12 | 1 << 3 | (entry >> 11 & 1) << 2
    address |= (entry >> 49 & 0x7F) << 5  # destination bits 14:8, used by guests with more than 255 CPUs
    data = entry & 0xFF | (entry >> 8 & 7) << 8 | entry & _REMOTE_IRR | entry & _LEVEL
    return address, data


class Ioapic:
    """Memory window of 0x20 bytes at 0xFEC00000. Only 4-byte accesses count."""

    def __init__(self, routing: IrqRouting) -> None:
        self._routing = routing
        self._id = 0
        self._select = 0
        self._entries = [_POWER_ON] * PINS
        self._used = [False] * PINS
        self._gsis = [-1] * PINS
        self._assigned = [False] * PINS
        self._eventfds = [-1] * PINS
        self._misuse = Misuse("IOAPIC")

    def eventfd(self, pin: int) -> int:
        """The eventfd that pulses a pin (0 to 23). It is ours and stays open as long as the IOAPIC."""
        if self._eventfds[pin] < 0:
            self._eventfds[pin] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._eventfds[pin]

    def pulse(self, pin: int) -> None:
        """An edge on a pin."""
        os.eventfd_write(self.eventfd(pin), 1)
        if self._entries[pin] & _LEVEL:
            self._entries[pin] |= _REMOTE_IRR

    def end_of_interrupt(self, vector: int) -> None:
        """KVM saw an EOI for a level-triggered vector (KVM_EXIT_IOAPIC_EOI)."""
        for pin, entry in enumerate(self._entries):
            if entry & _LEVEL and entry & 0xFF == vector:
                self._entries[pin] = entry & ~_REMOTE_IRR

    def read(self, offset: int, size: int) -> int | None:
        if size != 4:
            self._misuse.report(f"read of {size} bytes")
            return None
        if offset == IOREGSEL:
            return self._select
        if offset == IOWIN:
            return self._read_register(self._select & 0xFF)
        self._misuse.report(f"read at {offset:#x}")
        return None

    def _read_register(self, register: int) -> int:
        if _REDIRECTION <= register < _REDIRECTION + 2 * PINS:
            entry = self._entries[register - _REDIRECTION >> 1]
            return entry >> 32 if register & 1 else entry & 0xFFFF_FFFF
        if register == _VERSION:
            return _VERSION_VALUE
        if register in (_ID, _ARBITRATION):
            return self._id << 24
        self._misuse.report(f"read of register {register:#x}")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            self._misuse.report(f"write of {size} bytes")
        elif offset == IOREGSEL:
            self._select = value
        elif offset == IOWIN:
            self._write_register(self._select & 0xFF, value)
        else:
            self._misuse.report(f"write at {offset:#x}")

    def _write_register(self, register: int, value: int) -> None:
        if _REDIRECTION <= register < _REDIRECTION + 2 * PINS:
            pin = register - _REDIRECTION >> 1
            entry = self._entries[pin]
            if register & 1:
                entry = entry & 0xFFFF_FFFF | value << 32
            else:
                entry = (
                    entry & 0xFFFF_FFFF_0000_0000 | entry & _READ_ONLY | value & ~_READ_ONLY & 0xFFFF_FFFF
                )
            self._entries[pin] = entry
            self._used[pin] = True
            self._apply(pin)
        elif register == _ID:
            self._id = value >> 24 & 0xF
        elif register != _VERSION or value:  # Windows writes 0 to the version register
            self._misuse.report(f"write of register {register:#x}")

    def _route(self, pin: int) -> None:
        if self._gsis[pin] < 0:
            self._gsis[pin] = self._routing.allocate_gsi()
        address, data = msi_message(self._entries[pin])
        self._routing.set_msi(self._gsis[pin], address, 0, data)

    def _apply(self, pin: int) -> None:
        """Bring KVM in line with an entry."""
        if self._entries[pin] & _MASKED:
            if self._assigned[pin]:
                self._routing.deassign_irqfd(self._gsis[pin], self._eventfds[pin])
                self._assigned[pin] = False
            return
        self._route(pin)
        self._routing.commit()
        if not self._assigned[pin]:
            self._routing.assign_irqfd(self._gsis[pin], self.eventfd(pin))
            self._assigned[pin] = True

    def save(self) -> State:
        """Keys of Cloud Hypervisor's `__ioapic`. To be called when nothing pulses a pin any more."""
        pending = [self._take_pending(pin) for pin in range(PINS)]
        return {
            "id_reg": self._id,
            "reg_sel": self._select,
            "reg_entries": list(self._entries),
            "used_entries": list(self._used),
            "apic_address": APIC_START,
            PRIVATE: {"pending": pending},
        }

    def _take_pending(self, pin: int) -> bool:
        """Whether a masked pin has a pulse waiting. The pulse stays: a VM whose migration fails goes on."""
        fd = self._eventfds[pin]
        if fd < 0 or self._assigned[pin]:
            return False
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return False
        os.eventfd_write(fd, 1)
        return True

    def load(self, state: object) -> None:
        """Restore registers, routes and irqfds. Raises ProtocolError; nothing has changed then."""
        fields = Fields("__ioapic", state)
        id_reg = fields.integer("id_reg", 4)
        select = fields.integer("reg_sel", 32)
        entries = fields.integers("reg_entries", 64, PINS)
        used = fields.flags("used_entries", PINS)
        private = fields.private()
        pending = private.flags("pending", PINS) if "pending" in private else [False] * PINS

        self._id, self._select = id_reg, select
        self._entries, self._used = entries, used
        for pin in range(PINS):
            if used[pin] and not entries[pin] & _MASKED:
                self._route(pin)
        self._routing.commit()  # one table for all pins, before the first irqfd
        for pin in range(PINS):
            if used[pin]:
                self._apply(pin)
            if pending[pin]:
                os.eventfd_write(self.eventfd(pin), 1)

    def close(self) -> None:
        """Take the irqfds away and close the eventfds."""
        for pin in range(PINS):
            if self._assigned[pin]:
                self._routing.deassign_irqfd(self._gsis[pin], self._eventfds[pin])
                self._assigned[pin] = False
            if self._gsis[pin] >= 0:
                self._routing.free_gsi(self._gsis[pin])
                self._gsis[pin] = -1
            if self._eventfds[pin] >= 0:
                os.close(self._eventfds[pin])
                self._eventfds[pin] = -1
