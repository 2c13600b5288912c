"""controller.config.validate and .identity: what makes no sense is refused by name; ids and PCI slots."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.config.identity import PCI_SLOTS, assign_ids, pci_slots
from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    DiskConfig,
    DiskLock,
    ImageType,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from controller.config.validate import validate
from controller.machine.topology import Topology
from shared.errors import ConfigError, DuplicateIdError
from shared.records import replace

BASE = VmConfig(payload=PayloadConfig(kernel="/k"), console=ConsoleConfig(ConsoleMode.OFF))
DISK = DiskConfig(path="/d")


def with_disk(**changes: Any) -> VmConfig:
    return replace(BASE, cpus=CpusConfig(2, 2), disks=(replace(DISK, **changes),))


def with_cpus(*arguments: Any, **named: Any) -> VmConfig:
    return replace(BASE, cpus=CpusConfig(*arguments, **named))


def with_memory(**changes: Any) -> VmConfig:
    return replace(BASE, memory=MemoryConfig(**changes))


def with_disks(*disks: DiskConfig, **changes: Any) -> VmConfig:
    return replace(BASE, disks=disks, **changes)


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        with_cpus(8, 8),
        with_cpus(1, 8),
        with_cpus(2, 4, Topology(2, 2, 1, 1)),
        with_memory(size=4096),
        with_memory(size=1 << 40, shared=True, thp=False),
        with_disk(num_queues=2, queue_size=4, serial="x" * 20, id="a", pci_device_id=31),
        with_disks(DiskConfig(vhost_user=True, vhost_socket="/s")),
        replace(BASE, rng=RngConfig(id="__rng"), console=ConsoleConfig(ConsoleMode.PTY, id="__console")),
        replace(BASE, payload=PayloadConfig("/k", "x" * 65535)),
        with_disks(*[DISK] * 30),
    ],
)
def test_sensible_configurations_pass(config: VmConfig) -> None:
    validate(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(BASE, payload=PayloadConfig()), "No bootitem provided"),
        (replace(BASE, payload=PayloadConfig("")), "No bootitem provided"),
        (replace(BASE, payload=PayloadConfig("/k", "x" * 65536)), "--cmdline"),
        (with_cpus(0, 1), "boot=) is 0"),
        (with_cpus(2, 1), "Max CPUs lower than boot CPUs"),
        (with_cpus(9, 9), "1 to 8"),
        (with_cpus(1, 9), "1 to 8"),
        (with_cpus(1, 1, None, 64), "max_phys_bits"),
        (with_cpus(4, 4, Topology(2, 1, 1, 1)), "topology=) is 2:1:1:1 (its product"),
        (with_cpus(4, 4, Topology(4, 1, 1, 1)), "at most 2 threads"),
        (with_cpus(4, 4, Topology(0, 4, 1, 1)), "can be 0"),
        (with_memory(size=0), "size=) is 0"),
        (with_memory(size=4097), "multiple of 4096"),
        (with_memory(size=1 << 50), "46 physical address bits"),
        (with_memory(shared=True, mergeable=True), "shared and mergeable at once"),
        (with_memory(mergeable=True), "mergeable=on) is not available"),
        (with_disk(path=None), "the path is missing"),
        (with_disk(path=""), "the path is missing"),
        (with_disk(vhost_user=True, path=None), "vhost_user needs a socket"),
        (with_disk(vhost_socket="/s"), "a socket without vhost_user"),
        (with_disk(vhost_user=True, vhost_socket="/s"), "path has no meaning with vhost_user"),
        (with_disk(vhost_user=True, vhost_socket="/s", path=None, readonly=True), "readonly has no meaning"),
        (
            with_disk(vhost_user=True, vhost_socket="/s", path=None, lock=DiskLock.SHARED),
            "lock has no meaning",
        ),
        (with_disk(num_queues=0), "num_queues is 0"),
        (with_disk(num_queues=3), "num_queues is 3"),
        (with_disk(queue_size=0), "queue_size is 0"),
        (with_disk(queue_size=2), "queue_size is 2"),
        (with_disk(queue_size=100), "queue_size is 100"),
        (with_disk(queue_size=65536), "queue_size is 65536"),
        (with_disk(serial="x" * 21), "too long"),
        (with_disk(serial="ä" * 11), "too long"),
        (with_disk(image_type=ImageType.QCOW2), "image_type Qcow2 is not available yet"),
        (with_disk(id="__disk"), "disks[0].id is __disk"),
        (with_disk(id="__rng"), "disks[0].id is __rng"),
        (with_disk(id=""), "disks[0].id is ''"),
        (with_disk(id="../x"), "disks[0].id is '../x'"),
        (with_disk(id="a\nb"), "disks[0].id is"),
        (with_disk(pci_device_id=0), "disks[0].pci_device_id is 0"),
        (with_disk(pci_device_id=32), "disks[0].pci_device_id is 32"),
        (with_disks(*[replace(DISK, pci_device_id=3)] * 2), "disks[0] has that slot already"),
        (with_disks(*[DISK] * 31), "32 PCI devices"),
        (
            replace(BASE, serial=SerialConfig(ConsoleMode.FILE)),
            "serial (--serial): mode File without a file",
        ),
        (
            replace(BASE, console=ConsoleConfig(ConsoleMode.SOCKET)),
            "console (--console): mode Socket without",
        ),
        (replace(BASE, rng=RngConfig(src="")), "rng.src"),
    ],
)
def test_nonsense_is_refused_by_name(config: VmConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert message in str(caught.value)
    assert not isinstance(caught.value, DuplicateIdError)


@pytest.mark.parametrize(
    "config",
    [
        with_disks(replace(DISK, id="a"), replace(DISK, id="a")),
        with_disks(replace(DISK, id="a"), rng=RngConfig(id="a")),
        with_disks(replace(DISK, id="a"), console=ConsoleConfig(id="a")),
    ],
)
def test_an_id_used_twice_is_a_conflict(config: VmConfig) -> None:
    with pytest.raises(DuplicateIdError, match="Identifier a is not unique"):
        validate(config)


def ids(config: VmConfig) -> list[str | None]:
    return [disk.id for disk in assign_ids(config).disks]


def test_disks_are_numbered_in_order() -> None:
    assert ids(with_disks(DISK, DISK, DISK)) == ["_disk0", "_disk1", "_disk2"]


def test_an_id_of_ones_own_uses_no_number() -> None:
    assert ids(with_disks(DISK, replace(DISK, id="root"), DISK)) == ["_disk0", "root", "_disk1"]


def test_a_number_in_use_is_skipped() -> None:
    assert ids(with_disks(DISK, replace(DISK, id="_disk0"), DISK)) == ["_disk1", "_disk0", "_disk2"]


def test_assigning_ids_again_changes_nothing() -> None:
    once = assign_ids(with_disks(DISK, DISK))
    assert assign_ids(once) == once


TTY = ConsoleConfig(ConsoleMode.TTY)
SLOTS = [
    (BASE, {"__rng": 1}),
    (replace(BASE, console=TTY), {"__console": 1, "__rng": 2}),
    (replace(BASE, console=ConsoleConfig(ConsoleMode.NULL)), {"__console": 1, "__rng": 2}),
    (with_disks(DISK, DISK, DISK), {"_disk0": 1, "_disk1": 2, "_disk2": 3, "__rng": 4}),
    (with_disks(DISK, DISK, console=TTY), {"__console": 1, "_disk0": 2, "_disk1": 3, "__rng": 4}),
    (with_disks(replace(DISK, id="root", pci_device_id=5), DISK), {"root": 5, "_disk0": 1, "__rng": 2}),
    (with_disks(DISK, DISK, rng=RngConfig(id="r", pci_device_id=1)), {"_disk0": 2, "_disk1": 3, "r": 1}),
]


@pytest.mark.parametrize(("config", "slots"), SLOTS)
def test_pci_slots_as_cloud_hypervisor_hands_them_out(config: VmConfig, slots: dict[str, int]) -> None:
    assert list(pci_slots(assign_ids(config)).items()) == list(slots.items())


@given(st.lists(st.none() | st.integers(1, 31), max_size=29))
def test_pci_slots_are_unique_and_honour_wishes(wishes: list[int | None]) -> None:
    config = with_disks(*(replace(DISK, pci_device_id=wish) for wish in wishes), console=TTY)
    try:
        validate(config)
    except ConfigError:
        asked = [wish for wish in wishes if wish is not None]
        assert len(set(asked)) < len(asked)
        return
    slots = pci_slots(assign_ids(config))
    assert len(slots) == len(wishes) + 2 == len(set(slots.values())) and set(slots.values()) <= set(
        PCI_SLOTS
    )
    assert all(wish is None or slots[f"_disk{index}"] == wish for index, wish in enumerate(wishes))
