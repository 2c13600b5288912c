"""A VM that could not be made leaves nothing behind in its VMM: neither a descriptor nor a mapping nor a process.

In this process, on /dev/kvm: what is left is counted in /proc/self/fd and /proc/self/maps.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.assembly import Assembly, VmContext
from controller.config.cli import Seccomp
from controller.config.codec import from_json
from controller.config.identity import assign_ids
from controller.config.model import VmConfig
from controller.events import EventMonitor
from controller.fleet import Fleet
from controller.leavings import Leavings
from controller.vm import Vm
from shared.errors import FlotillaError
from shared.linux import memfd
from shared.reactor import Reactor, sleep
from tests.controller.processes import SECONDS, running
from tests.vmm import poll, probe

pytestmark = pytest.mark.probe

RAM = 64 << 20
OURS = ("ch_ram", "kvm", "/dev/shm")


def held() -> tuple[list[str], list[str]]:
    """What this process has open, and what of a VM it has mapped."""
    gc.collect()  # the state pages' mapping goes with the last ctypes view of it
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0])
        except FileNotFoundError:
            pass  # the listing's own
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(names), sorted(words[5] for line in lines if any(o in line for o in OURS) and (words := line.split()))


def settles(rig: Rig, before: tuple[list[str], list[str]]) -> None:
    """A worker's control socket is closed by ZeroMQ's own thread, and other things at later turns of the reactor."""

    def settled() -> bool:
        rig.run(sleep(rig.reactor, 0.01))
        return held() == before

    with contextlib.suppress(AssertionError):
        poll(settled, 5)
    assert held() == before


class Rig:
    """What a VM needs around it, and a VM that runs: what it says of itself is what its destination is given."""

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        self.reactor = reactor
        self.folder = folder
        self.context = VmContext(reactor, fleet, EventMonitor(0.0), lambda _event: None, Seccomp.TRAP, Leavings())
        disk = folder / "disk.raw"
        disk.write_bytes(bytes(1 << 20))
        self.random = folder / "random"
        self.random.write_bytes(bytes(4096))
        body = {
            "payload": {"kernel": probe(), "cmdline": "mode=tick"},
            "memory": {"size": RAM},
            "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
            "disks": [{"path": str(disk)}],
            "rng": {"src": str(self.random)},
            "serial": {"mode": "File", "file": str(folder / "serial")},
            "console": {"mode": "File", "file": str(folder / "console")},
        }
        self.config: VmConfig = assign_ids(from_json(body, strict=True))
        self.source: Vm = self.run(Vm.boot(self.context, self.config))
        self.run(self.source.wait_serving())

    def run(self, awaitable: Any) -> Any:
        return self.reactor.run_until(awaitable, SECONDS)

    def incoming(self, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Vm:
        """Vm.build_incoming() with duplicates of the source's descriptors, as they come out of a stream."""
        parts, ram = self.source.memory_parts()
        arguments = {
            "config": self.source.config_json(),
            "parts": parts,
            "ram_fds": [os.dup(fd) for fd in ram],
            "images": {name: os.dup(fd) for name, fd in self.source.disk_fds().items()},
            "taps": {},
            "info": self.source.build_info(),
        }
        arguments["info"]["cpuid"] = [list(entry) for entry in arguments["info"]["cpuid"]]
        change(arguments)
        vm: Vm = self.run(Vm.build_incoming(self.context, **arguments))
        return vm


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(str(tmp_path)) as (reactor, fleet):
        made = Rig(reactor, fleet, tmp_path)
        yield made
        made.run(made.source.destroy())


def malformed_config(arguments: dict[str, Any]) -> None:
    arguments["config"]["cpus"]["boot_vcpus"] = 0


def malformed_cpuid(arguments: dict[str, Any]) -> None:
    arguments["info"]["cpuid"][3] = ["eax"]


def missing_tree(arguments: dict[str, Any]) -> None:
    del arguments["info"]["device_tree"]


def device_without_a_place(arguments: dict[str, Any]) -> None:
    tree = arguments["info"]["device_tree"]
    del tree[next(name for name in tree if "rng" in name)]


def short_ram(arguments: dict[str, Any]) -> None:
    """The second region's file is too small; the first is mapped by then."""
    arguments["parts"].append((1 << 32, RAM, 0, 1))
    arguments["ram_fds"].append(memfd("ch_ram", RAM // 2))


def overlapping_ram(arguments: dict[str, Any]) -> None:
    """KVM refuses the second memslot: the machine is half made."""
    arguments["parts"].append((RAM // 2, RAM, 0, 1))
    arguments["ram_fds"].append(memfd("ch_ram", RAM))


def serial_file_in_no_folder(arguments: dict[str, Any]) -> None:
    arguments["config"]["serial"]["file"] = "/nowhere/at/all"


def missing_image(arguments: dict[str, Any]) -> None:
    arguments["config"]["disks"].append({"path": "/nowhere/at/all", "id": "_disk7", "pci_device_id": 9})


def foreign_cpu(arguments: dict[str, Any]) -> None:
    """A feature that no host has: everything but workers is made by then."""
    for entry in arguments["info"]["cpuid"]:
        if entry[0] == 7:
            entry[3:] = [0xFFFF_FFFF] * 4


REASONS = [
    malformed_config, malformed_cpuid, missing_tree, device_without_a_place, short_ram, overlapping_ram,
    serial_file_in_no_folder, missing_image, foreign_cpu,
]  # fmt: skip


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_vm_that_can_not_arrive_leaves_nothing(rig: Rig, change: Callable[[dict[str, Any]], None]) -> None:
    before = held()
    with pytest.raises(FlotillaError):
        rig.incoming(change)
    assert held() == before


def test_vm_whose_worker_can_not_start_at_its_destination_leaves_nothing(rig: Rig) -> None:
    before, processes = held(), len(rig.context.fleet.processes)
    rig.random.chmod(0)
    with pytest.raises(FlotillaError, match="Permission denied"):
        rig.incoming()
    settles(rig, before)
    assert len(rig.context.fleet.processes) == processes


def test_vm_that_arrived_and_ended_leaves_nothing(rig: Rig) -> None:
    before = held()
    vm = rig.incoming()
    assert held() != before
    rig.run(vm.destroy())
    del vm  # its state pages go with it
    settles(rig, before)


def test_assembly_that_runs_out_of_descriptors_anywhere_leaves_nothing(rig: Rig) -> None:
    """The limit is raised by one until it suffices, so that each descriptor of a VM fails once."""
    config = assign_ids(from_json({**rig.source.config_json(), "disks": []}, strict=False))
    image = os.open(rig.folder / "disk.raw", os.O_RDONLY)
    before = held()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    failures = 0

    def make() -> bool:
        arrived = {"_disk0": os.dup(image)}
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            made = Assembly(rig.context, config, images=arrived)
            try:
                rig.run(made.make_functions())
            finally:
                made.abandon()
        except (FlotillaError, OSError):
            return False
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return True

    for limit in range(lowest, lowest + 200):
        enough = make()
        assert held() == before, f"with {limit - lowest} descriptors"
        failures += not enough
        if enough:
            break
    else:
        pytest.fail("200 descriptors are not enough for a VM")
    os.close(image)
    assert failures > 20
