"""Does a VmConfig make sense? Nothing here looks at the host (`hostfiles` does).

Cloud Hypervisor validates at vm.create and again for a configuration that a migration brought; so do we.
Messages name the JSON key, which is also that of the command line wherever the two differ in the flag only.
"""

from __future__ import annotations

import os
from math import prod

from controller.config.identity import PCI_SLOTS, PciDevice, pci_devices
from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    DiskConfig,
    ImageType,
    MemoryConfig,
    SerialConfig,
    VmConfig,
)
from controller.config.validate_net import validate_nets
from shared.errors import ConfigError, DuplicateIdError

MAX_VCPUS = 8
MAX_THREADS_PER_CORE = 2
MIN_PHYS_BITS, MAX_PHYS_BITS = 36, 52
PAGE_SIZE = 4096
# The command line's place in guest RAM, with its terminating NUL.
MAX_CMDLINE = 64 << 10
MAX_QUEUE_SIZE = 1 << 15
# VIRTIO_BLK_ID_BYTES.
MAX_SERIAL = 20
MAX_ID = 64
RESERVED_PREFIX = "__"


def validate(config: VmConfig) -> None:
    """Raises ConfigError (HTTP 400) for what can't be carried out, DuplicateIdError (HTTP 409) for an id
    used twice.
    """
    if not config.payload.kernel:
        raise ConfigError(
            "No bootitem provided: neither firmware nor kernel", "give --kernel, or payload.kernel"
        )
    if len(os.fsencode(config.payload.cmdline or "")) >= MAX_CMDLINE:
        raise ConfigError(
            "payload.cmdline (--cmdline) is too long", f"it must be shorter than {MAX_CMDLINE} bytes"
        )
    _cpus(config.cpus)
    _memory(config.memory, config.cpus.max_phys_bits)
    for index, disk in enumerate(config.disks):
        _disk(
            f"disks[{index}] (--disk {disk.path or disk.vhost_socket or ''})", disk, config.cpus.boot_vcpus
        )
    validate_nets(config.net, config.cpus.boot_vcpus)
    _destination("serial (--serial)", config.serial)
    _destination("console (--console)", config.console)
    if not config.rng.src:
        raise ConfigError("rng.src (--rng src=) is empty", "give a file such as /dev/urandom")
    devices = pci_devices(config)
    _ids(devices)
    _pci_device_ids(devices)


def _cpus(cpus: CpusConfig) -> None:
    if cpus.boot_vcpus < 1:
        raise ConfigError("cpus.boot_vcpus (--cpus boot=) is 0", "a VM needs at least one vCPU")
    if cpus.max_vcpus < cpus.boot_vcpus:
        raise ConfigError(
            "Max CPUs lower than boot CPUs",
            f"--cpus boot={cpus.boot_vcpus},max={cpus.max_vcpus}: max is at least boot",
        )
    if cpus.max_vcpus > MAX_VCPUS:
        raise ConfigError(
            f"{cpus.max_vcpus} vCPUs (--cpus boot={cpus.boot_vcpus},max={cpus.max_vcpus})",
            f"this version of Flotilla runs 1 to {MAX_VCPUS}",
        )
    _topology(cpus)
    if not MIN_PHYS_BITS <= cpus.max_phys_bits <= MAX_PHYS_BITS:
        raise ConfigError(
            f"cpus.max_phys_bits (--cpus max_phys_bits=) is {cpus.max_phys_bits}",
            f"{MIN_PHYS_BITS} to {MAX_PHYS_BITS}",
        )


def _topology(cpus: CpusConfig) -> None:
    topology = cpus.topology
    if topology is None:
        return
    counts = (
        topology.threads_per_core,
        topology.cores_per_die,
        topology.dies_per_package,
        topology.packages,
    )
    what = f"cpus.topology (--cpus topology=) is {':'.join(map(str, counts))}"
    if 0 in counts:
        raise ConfigError(what, "no part of it can be 0")
    if topology.threads_per_core > MAX_THREADS_PER_CORE:
        raise ConfigError(what, f"a core has at most {MAX_THREADS_PER_CORE} threads")
    if prod(counts) != cpus.max_vcpus:
        raise ConfigError(what, f"its product must be the number of vCPUs, max={cpus.max_vcpus}")


def _memory(memory: MemoryConfig, phys_bits: int) -> None:
    if memory.size == 0:
        raise ConfigError("memory.size (--memory size=) is 0", "give the guest's RAM, such as size=1G")
    if memory.size % PAGE_SIZE:
        raise ConfigError(
            f"memory.size (--memory size=) is {memory.size}", f"it must be a multiple of {PAGE_SIZE} bytes"
        )
    if memory.size > 1 << (phys_bits - 1):
        raise ConfigError(
            f"memory.size (--memory size=) is {memory.size}",
            f"that does not fit into {phys_bits} physical address bits",
        )
    if memory.mergeable and memory.shared:
        raise ConfigError("Memory can't be shared and mergeable at once", "drop mergeable=on from --memory")
    if memory.mergeable:
        raise ConfigError(
            "memory.mergeable (--memory mergeable=on) is not available",
            "guest RAM is always shared between Flotilla's processes, and KSM merges private pages only",
        )


def _disk(name: str, disk: DiskConfig, boot_vcpus: int) -> None:
    _disk_back_end(name, disk)
    if disk.image_type not in (ImageType.RAW, ImageType.UNKNOWN):
        raise ConfigError(
            f"{name}: image_type {disk.image_type.value} is not available yet in this version of Flotilla",
            "convert the image: qemu-img convert -O raw IMAGE IMAGE.raw",
        )
    if not 1 <= disk.num_queues <= boot_vcpus:
        raise ConfigError(
            f"{name}: num_queues is {disk.num_queues}",
            f"at least 1 and at most the number of vCPUs, {boot_vcpus}",
        )
    size = disk.queue_size
    if not 2 < size <= MAX_QUEUE_SIZE or size & (size - 1):
        raise ConfigError(f"{name}: queue_size is {size}", f"a power of two from 4 to {MAX_QUEUE_SIZE}")
    if len(os.fsencode(disk.serial or "")) > MAX_SERIAL:
        raise ConfigError(f"{name}: serial {disk.serial!r} is too long", f"at most {MAX_SERIAL} bytes")


def _disk_back_end(name: str, disk: DiskConfig) -> None:
    """An image of our own, or a vhost-user socket: what belongs to the other kind is refused, not ignored."""
    if not disk.vhost_user:
        if disk.vhost_socket is not None:
            raise ConfigError(f"{name}: a socket without vhost_user", "add vhost_user=on")
        if not disk.path:
            raise ConfigError(
                f"{name}: the path is missing", "give path=IMAGE, or vhost_user=on,socket=PATH"
            )
        return
    if not disk.vhost_socket:
        raise ConfigError(f"{name}: vhost_user needs a socket", "add socket=PATH")
    given = {
        "path": disk.path,
        "readonly": disk.readonly,
        "direct": disk.direct,
        "serial": disk.serial,
        "lock": disk.lock,
    }
    for key, value in given.items():
        if value:
            raise ConfigError(
                f"{name}: {key} has no meaning with vhost_user", "the back end decides; leave it out"
            )


def _destination(name: str, device: SerialConfig | ConsoleConfig) -> None:
    if device.mode is ConsoleMode.FILE and not device.file:
        raise ConfigError(f"{name}: mode File without a file", "give file=PATH")
    if device.mode is ConsoleMode.SOCKET and not device.socket:
        raise ConfigError(f"{name}: mode Socket without a socket", "give socket=PATH")


def _ids(devices: list[PciDevice]) -> None:
    owners: dict[str, str] = {}
    for device in devices:
        name = device.given_id
        if name is None:
            continue
        # Ids become names of processes and of files in the runtime directory.
        if not 0 < len(os.fsencode(name)) <= MAX_ID or "/" in name or not name.isprintable():
            raise ConfigError(
                f"{device.key}.id is {name!r}", f"1 to {MAX_ID} printable bytes without a slash"
            )
        # A configuration that was in use once may have a built-in device's own id filled in.
        if name.startswith(RESERVED_PREFIX) and name != device.fixed_id:
            raise ConfigError(
                f"{device.key}.id is {name}", f"names that start with {RESERVED_PREFIX} are reserved"
            )
        if name in owners:
            raise DuplicateIdError(
                f"Identifier {name} is not unique", f"{owners[name]}.id and {device.key}.id"
            )
        owners[name] = device.key


def _pci_device_ids(devices: list[PciDevice]) -> None:
    owners: dict[int, str] = {}
    for device in devices:
        slot = device.given_slot
        if slot is None:
            continue
        if slot not in PCI_SLOTS:
            raise ConfigError(f"{device.key}.pci_device_id is {slot}", f"{PCI_SLOTS[0]} to {PCI_SLOTS[-1]}")
        if slot in owners:
            raise ConfigError(
                f"{device.key}.pci_device_id is {slot}", f"{owners[slot]} has that slot already"
            )
        owners[slot] = device.key
    if len(devices) > len(PCI_SLOTS):
        raise ConfigError(f"{len(devices)} PCI devices", f"there is room for {len(PCI_SLOTS)}")
