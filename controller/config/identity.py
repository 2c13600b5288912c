"""Which device is called what and sits where: automatic ids and PCI slots, as Cloud Hypervisor hands them
out.
"""

from __future__ import annotations

import os

from controller.config.model import ConsoleMode, DiskConfig, NetConfig, VmConfig
from shared.records import NamedTuple, replace
from shared.typed import TypeVar

# Device 0 is the host bridge.
PCI_SLOTS = range(1, 32)
CONSOLE_ID = "__console"
RNG_ID = "__rng"

DEFAULT_MASK = "255.255.255.0"
RANDOM_MAC_BYTE = "2e:"  # locally administered, and Cloud Hypervisor's

Numbered = TypeVar("Numbered", DiskConfig, NetConfig)


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
    for index, net in enumerate(config.net):
        devices.append(PciDevice(f"net[{index}]", net.id, net.pci_device_id, ""))
    devices.append(PciDevice("rng", rng.id, rng.pci_device_id, RNG_ID))
    return devices


def assign_ids(config: VmConfig) -> VmConfig:
    """The same VM with an id for every disk and network device (`_disk0`, `_net1`, …), and what else the latter lack.

    One counter serves all kinds of devices; a device with an id of its own uses no number, a name in use is
    skipped. console and rng have fixed ids, which are not written into the configuration. Idempotent: a guest keeps
    its MACs over a reboot or migration.
    """
    taken = {device.given_id for device in pci_devices(config)}
    counter = 0

    def named(device: Numbered, kind: str) -> Numbered:
        nonlocal counter
        if device.id is not None:
            return device
        while f"_{kind}{counter}" in taken:
            counter += 1
        counter += 1
        return replace(device, id=f"_{kind}{counter - 1}")

    disks = tuple(named(disk, "disk") for disk in config.disks)
    nets = tuple(named(_addressed(net), "net") for net in config.net)
    return replace(config, disks=disks, net=nets)


def _addressed(net: NetConfig) -> NetConfig:
    """With the guest's MAC, and with the mask of old for an ip without one, as the live-migration document has it."""
    mac = net.mac or RANDOM_MAC_BYTE + os.urandom(5).hex(":")
    return replace(net, mac=mac, mask=net.mask or (DEFAULT_MASK if net.ip else None))


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
