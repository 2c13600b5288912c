"""pvpanic: the guest's kernel tells that it has panicked by writing one byte to BAR 0.

Sources: QEMU docs/specs/pvpanic.rst; the reference's cloud-hypervisor-machine page, section 2.6.
"""

from __future__ import annotations

from controller.bus import Effect
from controller.devices.events import GuestEvent, OnEvent
from controller.devices.state import Fields, State
from controller.pci.config_space import Header
from controller.pci.function import BarSpec, PciFunction
from shared.typed import Final

PVPANIC_ID: Final = "__pvpanic"
_PANICKED: Final = 1
_CRASH_LOADED: Final = 2
_HEADER: Final = Header(vendor=0x1B36, device=0x0011, class_code=0x088000, revision=1, command=0x0103)


class PvPanic(PciFunction):
    bar_spec = BarSpec(size=2, align32=16, align64=16)

    def __init__(self, on_event: OnEvent) -> None:
        super().__init__(PVPANIC_ID, _HEADER)
        self._on_event = on_event
        self._events = _PANICKED | _CRASH_LOADED  # what the device understands

    def read(self, offset: int, size: int) -> int | None:
        return self._events

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        event = value & 0xFF
        if event == _PANICKED:
            self._on_event(GuestEvent.PANIC)
        elif event == _CRASH_LOADED:
            self._on_event(GuestEvent.CRASH_LOADED)
        return None

    def save(self) -> State:
        return {"events": self._events, "pci_configuration": self.config.save()}

    def load(self, state: object) -> None:
        fields = Fields(self.id, state)
        events = fields.integer("events", 8)
        self.config.load(fields.section("pci_configuration"))
        self._events = events
