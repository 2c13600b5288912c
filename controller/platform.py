"""The machine: KVM VM, guest RAM, buses and every device that is not a worker's, wired as Cloud Hypervisor wires them.

Made by `Platform(config, …)`, at boot and for a VM that arrives alike; `save()` and `load()` carry everything but vCPUs
and virtio devices (vm.py does those). Nothing here waits. What has been made goes onto a stack of things to close, so
that a machine that could not be finished leaves as little behind as one that was closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controller.bus import Bus
from controller.config.model import ConsoleMode, VmConfig
from controller.devices.acpi import AcpiShutdown, Ged, PmTimer
from controller.devices.cmos import Cmos
from controller.devices.debug_port import DebugPort, firmware_debug_port
from controller.devices.events import GuestEvent
from controller.devices.hotplug import CpuHotplug, PciHotplug
from controller.devices.i8042 import I8042
from controller.devices.ioapic import Ioapic
from controller.devices.serial import Serial
from controller.irq import IrqRouting
from controller.machine import layout as lo
from controller.machine.cpuid import CpuidEntry, common_cpuid, phys_bits
from controller.machine.hostcpu import host_phys_bits
from controller.machine.topology import Topology, x2apic_id
from controller.pci.host import ConfigPorts, PciSegment
from shared import kvm, log
from shared.chardev import CharDev, HostEnd
from shared.errors import HostError
from shared.memory import LOW_RAM_END, GuestMemory
from shared.reactor import Reactor
from shared.state_pages import allocate
from shared.typed import Any
from shared.undo import Undo
from vcpu_worker.layout import StatePages, state_size


class Platform:
    """`cpuid` is the common list of a VM that arrives; None takes the host's. `memory` belongs to the platform once
    it is made. Raises KvmError, HostError, ConfigError; nothing that was made here is left then.
    """

    def __init__(
        self,
        reactor: Reactor,
        config: VmConfig,
        on_event: Callable[[GuestEvent], None],
        serial_end: HostEnd | None,
        memory: GuestMemory | None = None,
        cpuid: Sequence[CpuidEntry] | None = None,
    ) -> None:
        self.config = config
        self.stopped = False  # the guest has ended itself: none of its vCPUs goes on
        self._reactor = reactor
        self._tell = on_event
        self._open = Undo()
        try:
            self._make(memory, cpuid, serial_end)
        except BaseException:
            self._open.close()
            raise

    def _make(
        self, memory: GuestMemory | None, cpuid: Sequence[CpuidEntry] | None, serial_end: HostEnd | None
    ) -> None:
        config = self.config
        self.kvm = kvm.Kvm()
        self._open.add(self.kvm.close)
        self.kvm_vm = self.kvm.create_vm()
        self._open.add(self.kvm_vm.close)
        bits = host_phys_bits() if cpuid is None else phys_bits(cpuid) or lo.DEFAULT_MAX_PHYS_BITS
        self.layout = lo.compute(config.memory.size, bits, config.cpus.max_phys_bits)
        self.cpuid = list(cpuid) if cpuid is not None else self.host_cpuid()
        self.memory = memory if memory is not None else GuestMemory.create(config.memory.size)
        self._open.add(self.memory.close)
        self._set_up_kvm()
        self._pages_map = allocate(state_size(config.cpus.boot_vcpus))
        self.pages = StatePages(self._pages_map, config.cpus.boot_vcpus)
        self.routing = IrqRouting(self.kvm_vm)
        self.ioapic = Ioapic(self.routing)
        self._open.add(self.ioapic.close)
        self.pio, self.mmio = Bus("port"), Bus("memory")
        self.serial: Serial | None = None
        self.chardev: CharDev | None = None
        self._add_legacy(serial_end)
        self._add_acpi()
        self.segment = PciSegment(self.layout.segments[0], self.pages.pci, self.mmio)
        self.config_ports = ConfigPorts(self.segment, self.pages.pci)
        self.pio.register(lo.PCI_CONFIG_PORT, lo.PCI_CONFIG_SIZE, self.config_ports)

    def host_cpuid(self) -> list[CpuidEntry]:
        """The common list of a guest that was born here."""
        supported = [
            CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in self.kvm.supported_cpuid()
        ]
        return common_cpuid(supported, self.layout.phys_bits)

    def _set_up_kvm(self) -> None:
        try:
            # TSS and identity map before the first vCPU: on Intel KVM puts them into the VMCS.
            self.kvm_vm.set_identity_map_address(lo.KVM_IDENTITY_MAP_START)
            self.kvm_vm.set_tss_address(lo.KVM_TSS_START)
            self.kvm_vm.enable_split_irqchip(lo.IOAPIC_PINS)
            for region in self.memory.regions:
                self.kvm_vm.set_memory(region.slot, region.gpa, region.size, region.address)
        except OSError as error:
            raise HostError("KVM refused the machine") from error

    def _add_legacy(self, serial_end: HostEnd | None) -> None:
        low = min(self.config.memory.size, LOW_RAM_END)
        self.cmos = Cmos(low, self.config.memory.size - low, self._on_event)
        self.pio.register(lo.I8042_PORT, lo.I8042_SIZE, I8042(self._on_event))
        self.pio.register(lo.CMOS_PORT, lo.CMOS_SIZE, self.cmos)
        self.pio.register(lo.POST_PORT, 1, DebugPort())
        self.pio.register(lo.FIRMWARE_DEBUG_PORT, 1, firmware_debug_port(lambda data: log.debug(f"firmware: {data!r}")))
        self.mmio.register(lo.IOAPIC_START, lo.IOAPIC_SIZE, self.ioapic)
        if self.config.serial.mode is ConsoleMode.OFF or serial_end is None:
            return
        chardev = CharDev(self._reactor, serial_end)
        self._open.add(chardev.close)
        serial = Serial(
            self.pages.uart,
            self.ioapic.eventfd(lo.COM1_GSI),
            chardev.write,
            self._reactor.call_later,
            is_full=lambda: chardev.full,
            hold_input=chardev.pause_input,
        )
        self._open.add(serial.close)
        chardev.on_input = serial.push_input
        chardev.on_drain = serial.output_drained
        self._reactor.add_reader(serial.tx_fd, serial.on_tx)
        self._open.add(self._reactor.remove_reader, serial.tx_fd)
        self.pio.register(lo.COM1_PORT, lo.COM1_SIZE, serial)
        self.serial, self.chardev = serial, chardev

    def _add_acpi(self) -> None:
        self.pm_timer = PmTimer(self.pages.timer)
        self.ged = Ged(lambda: self.ioapic.pulse(lo.GED_GSI))
        self.pci_hotplug = PciHotplug(1, lambda _segment, _slot: None)
        cpus = self.config.cpus
        self.cpu_hotplug = CpuHotplug(cpus.boot_vcpus, cpus.max_vcpus, lambda _cpu: None)
        self.pio.register(lo.ACPI_SHUTDOWN_PORT, lo.ACPI_SHUTDOWN_SIZE, AcpiShutdown(self._on_event))
        self.pio.register(lo.ACPI_PM_TIMER_PORT, lo.ACPI_PM_TIMER_SIZE, self.pm_timer)
        self.mmio.register(self.layout.ged.start, self.layout.ged.size, self.ged)
        self.mmio.register(self.layout.pci_hotplug.start, self.layout.pci_hotplug.size, self.pci_hotplug)
        self.mmio.register(self.layout.cpu_hotplug.start, self.layout.cpu_hotplug.size, self.cpu_hotplug)

    @property
    def apic_ids(self) -> list[int]:
        return [x2apic_id(n, self.config.cpus.topology) for n in range(self.config.cpus.boot_vcpus)]

    @property
    def topology(self) -> Topology:
        return self.config.cpus.topology or Topology.flat(self.config.cpus.boot_vcpus)

    def _on_event(self, event: GuestEvent) -> None:
        self.stopped = self.stopped or event in (GuestEvent.RESET, GuestEvent.POWER_OFF)
        self._tell(event)

    def hold_serial(self) -> None:
        """vCPUs are parked: what the guest has printed goes out, and nothing is read that a saved state would miss."""
        if self.serial is not None and self.chardev is not None:
            self.serial.flush()
            self.chardev.hold()

    def release_serial(self) -> None:
        """The guest is about to go on, here or at last here."""
        if self.serial is not None and self.chardev is not None:
            self.chardev.release()
            self.serial.signal()

    # What an exit can mean for the VM as a whole (controller.vcpus.Machine) --------------------------------------

    def end_of_interrupt(self, vector: int) -> None:
        self.ioapic.end_of_interrupt(vector)

    def triple_fault(self) -> None:
        self._on_event(GuestEvent.RESET)

    def guest_shutdown(self) -> None:
        self._on_event(GuestEvent.POWER_OFF)

    def vcpu_failed(self, name: str, why: str) -> None:
        log.error(f"{name}: {why}; the guest can't go on and is reset")
        self._on_event(GuestEvent.RESET)

    # State -------------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        """Everything with save() and load(), by its key; the IOAPIC last of all (restore order, DESIGN section 5)."""
        parts: dict[str, Any] = {
            "pm_timer": self.pm_timer,
            "cmos": self.cmos,
            "ged": self.ged,
            "pci_hotplug": self.pci_hotplug,
            "cpu_hotplug": self.cpu_hotplug,
            "cf8": self.config_ports,
        }
        if self.serial is not None:
            parts["__serial"] = self.serial
        return parts

    def save(self) -> dict[str, Any]:
        """The platform's devices. vCPUs are parked."""
        state = {key: part.save() for key, part in self._parts().items()}
        state["__ioapic"] = self.ioapic.save()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """All but the IOAPIC. Raises ProtocolError for a missing or malformed part."""
        for key, part in self._parts().items():
            part.load(state.get(key))

    def load_ioapic(self, state: dict[str, Any]) -> None:
        """After the vCPUs' LAPICs: a pin that is pending is injected at once, into a LAPIC that must be there."""
        self.ioapic.load(state.get("__ioapic"))

    def close(self) -> None:
        """vCPUs and workers are gone. Idempotent."""
        self._open.close()
