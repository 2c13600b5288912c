"""The ACPI hotplug controllers: PCI slots (PHPR, 16 bytes) and CPUs (PRES, 12 bytes), both MMIO.

They are register files between the DSDT's methods and whoever plugs: that one marks what has come or is to go and
raises the GED; the guest's methods read it, and eject. Source: the reference's cloud-hypervisor-machine page,
sections 4.6 and 4.7.
"""

from __future__ import annotations

from collections.abc import Callable

from controller.devices.misuse import Misuse
from controller.devices.state import PRIVATE, Fields, State
from shared.records import Record
from shared.typed import Final

_PCIU, _PCID, _B0EJ, _PSEG = 0x0, 0x4, 0x8, 0xC

_CSEL, _CPU_STATUS = 0x0, 0x4
_ENABLED: Final = 1 << 0
_INSERTING: Final = 1 << 1
_REMOVING: Final = 1 << 2
_EJECT: Final = 1 << 3


class PciHotplug:
    """PHPR: bitmaps of slots that came (PCIU) and that should go (PCID), per segment, cleared by reading."""

    def __init__(self, segments: int, on_eject: Callable[[int, int], None]) -> None:
        """`on_eject(segment, slot)`: the guest has let go of a slot."""
        self._up = [0] * segments
        self._down = [0] * segments
        self._segment = 0
        self._on_eject = on_eject
        self._misuse = Misuse("PCI hotplug controller")

    def mark_up(self, segment: int, slot: int) -> None:
        self._up[segment] |= 1 << slot

    def mark_down(self, segment: int, slot: int) -> None:
        self._down[segment] |= 1 << slot

    @property
    def pending(self) -> bool:
        """Whether the guest has not read an event yet; Cloud Hypervisor's state does not carry it."""
        return any(self._up) or any(self._down)

    def read(self, offset: int, size: int) -> int | None:
        if size != 4:
            self._misuse.report(f"read of {size} bytes")
            return None
        if offset == _PCIU:
            value, self._up[self._segment] = self._up[self._segment], 0
            return value
        if offset == _PCID:
            value, self._down[self._segment] = self._down[self._segment], 0
            return value
        if offset == _B0EJ:
            return 0
        return self._segment if offset == _PSEG else None

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            self._misuse.report(f"write of {size} bytes")
        elif offset == _B0EJ:
            for slot in range(32):
                if value >> slot & 1:
                    self._on_eject(self._segment, slot)
        elif offset == _PSEG and value < len(self._up):
            self._segment = value
        else:
            self._misuse.report(f"write of {value:#x} at {offset:#x}")

    def save(self) -> State:
        return {PRIVATE: {"up": list(self._up), "down": list(self._down), "segment": self._segment}}

    def load(self, state: object) -> None:
        private = Fields("PCI hotplug controller", state).private()
        if "up" not in private:
            return
        count = len(self._up)
        up, down = private.integers("up", 32, count), private.integers("down", 32, count)
        segment = private.integer("segment", 16)
        if segment < count:
            self._up, self._down, self._segment = up, down, segment


class CpuSlot(Record, frozen=False):
    """What the guest may see of one possible vCPU. `ejectable`: a removal was asked for and has not happened yet.

    The guest acknowledges `removing` as soon as it was told, long before it ejects, so the two are kept apart.
    """

    active: bool
    inserting: bool = False
    removing: bool = False
    ejectable: bool = False

    @property
    def status(self) -> int:
        return (
            (_ENABLED if self.active else 0)
            | (_INSERTING if self.inserting else 0)
            | (_REMOVING if self.removing else 0)
        )


class CpuHotplug:
    """PRES: a selector, and the status of the selected vCPU."""

    def __init__(self, boot_cpus: int, max_cpus: int, on_eject: Callable[[int], None]) -> None:
        """`on_eject(cpu)`: the guest has taken a vCPU offline that was marked for removal, and ejects it."""
        self.cpus = [CpuSlot(active=cpu < boot_cpus) for cpu in range(max_cpus)]
        self._selected = 0
        self._on_eject = on_eject
        self._misuse = Misuse("CPU hotplug controller")

    def mark_inserting(self, cpu: int) -> None:
        self.cpus[cpu].active = True
        self.cpus[cpu].inserting = True

    def mark_removing(self, cpu: int) -> None:
        self.cpus[cpu].removing = True
        self.cpus[cpu].ejectable = True

    @property
    def pending(self) -> bool:
        """Whether the guest has not acknowledged an insertion or removal yet."""
        return any(cpu.inserting or cpu.removing for cpu in self.cpus)

    def read(self, offset: int, size: int) -> int | None:
        if offset == _CSEL and size == 4:
            return self._selected
        if offset == _CPU_STATUS and size == 1 and self._selected < len(self.cpus):
            return self.cpus[self._selected].status
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _CSEL and size == 4:
            self._selected = value
        elif offset == _CPU_STATUS and size == 1 and self._selected < len(self.cpus):
            self._write_status(self.cpus[self._selected], value)
        else:
            self._misuse.report(f"write of {size} bytes at {offset:#x}, CPU {self._selected}")

    def _write_status(self, cpu: CpuSlot, value: int) -> None:
        if value & _INSERTING:
            cpu.inserting = False
        if value & _REMOVING:
            cpu.removing = False
        if value & _EJECT:
            # Only what was marked, and never the boot CPU: an ACPI interpreter gone wild must not end the VM.
            if cpu.ejectable and self._selected > 0:
                cpu.active = cpu.removing = cpu.ejectable = False
                self._on_eject(self._selected)
            else:
                self._misuse.report(f"eject of CPU {self._selected}, which nobody asked to remove")

    def save(self) -> State:
        return {
            PRIVATE: {
                "selected": self._selected,
                "active": [cpu.active for cpu in self.cpus],
                "inserting": [cpu.inserting for cpu in self.cpus],
                "removing": [cpu.removing for cpu in self.cpus],
                "ejectable": [cpu.ejectable for cpu in self.cpus],
            }
        }

    def load(self, state: object) -> None:
        private = Fields("CPU hotplug controller", state).private()
        if "selected" not in private:
            return
        count = len(self.cpus)
        selected = private.integer("selected", 32)
        flags = [private.flags(key, count) for key in ("active", "inserting", "removing", "ejectable")]
        self.cpus = [CpuSlot(*values) for values in zip(*flags, strict=True)]
        self._selected = selected
