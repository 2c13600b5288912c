"""Which device is called what and sits where: automatic ids and PCI slots, as Cloud Hypervisor hands them
out.
"""

from __future__ import annotations

from controller.config.model import ConsoleMode, VmConfig
from shared.records import NamedTuple, replace

# Device 0 is the host bridge.
PCI_SLOTS = range(1, 32)
CONSOLE_ID = "__console"
RNG_ID = "__rng"


class PciDevice(NamedTuple):
    """A device as configured. key: its place in the JSON. fixed_id: its id if none is given; "" for numbered
    kinds.
    """

    key: str
    given_id: str | None
    given_slot: int | None
    fixed_id: str


def pci_devices(config: VmConfig) -> list[PciDevice]:
    """All PCI devices in Cloud Hypervisor's order of creation."""
    console, rng = config.console, config.rng
    devices = []
    if console.mode is not ConsoleMode.OFF:
        devices.append(PciDevice("console", console.id, console.pci_device_id, CONSOLE_ID))
    for index, disk in enumerate(config.disks):
        devices.append(PciDevice(f"disks[{index}]", disk.id, disk.pci_device_id, ""))
    devices.append(PciDevice("rng", rng.id, rng.pci_device_id, RNG_ID))
    return devices


def assign_ids(config: VmConfig) -> VmConfig:
    """The same VM with an id for every disk: `_disk0`, `_disk1`, …

    One counter serves all kinds of devices; a device with an id of its own uses no number, a name in use is
    skipped. console and rng have fixed ids, which are not written into the configuration. Idempotent.
    """
    taken = {device.given_id for device in pci_devices(config)}
    counter = 0
    disks = []
    for disk in config.disks:
        if disk.id is None:
            while f"_disk{counter}" in taken:
                counter += 1
            disk = replace(disk, id=f"_disk{counter}")
            counter += 1
        disks.append(disk)
    return replace(config, disks=tuple(disks))


def pci_slots(config: VmConfig) -> dict[str, int]:
    """PCI device number by device id, in order of creation.

    Slots asked for by pci_device_id are set aside first; the others get the lowest free one, from 1. The
    configuration must have passed `validate` and `assign_ids`.
    """
    devices = pci_devices(config)
    reserved = {device.given_slot for device in devices}
    free = (slot for slot in PCI_SLOTS if slot not in reserved)
    slots = {}
    for device in devices:
        slots[device.given_id or device.fixed_id] = device.given_slot or next(free)
    return slots
