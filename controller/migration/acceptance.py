"""Can a VM from another host run here? Asked before a byte of its RAM moves; the answer names everything that differs.

`machine_info()` is what the source tells beside the configuration, `accept()` what the destination makes of it. One
check per row of CHECKS: a device with host resources of its own (a TAP) gets a row there.

A local migration asks none of this: its destination gets what the guest uses by descriptor, on the host where the guest
runs already. A kernel file that has gone there since must not keep the guest in the old VMM.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from controller import disks
from controller.config.codec import from_json
from controller.config.hostfiles import missing_files
from controller.config.model import DiskConfig, NetConfig, VmConfig
from controller.config.validate import validate
from controller.machine import layout as lo
from controller.machine.cpuid import CpuidEntry, check_compatible, common_cpuid
from controller.machine.hostcpu import host_phys_bits
from controller.migration.migratable import Parts
from controller.taps import open_tap
from shared.errors import FlotillaError, HostError, MigrationError, ProtocolError
from shared.kvm import REQUIRED_CAPS, Kvm
from shared.linux import close_fds, memfd
from shared.memory import MEMFD_NAME, spans
from shared.reactor import describe
from shared.state_versions import refusals

# Beside what every VM needs: capabilities whose value says how much of the guest's state fits.
CAPS: Final = {**REQUIRED_CAPS, "XCRS": 56, "DEBUGREGS": 50, "GET_TSC_KHZ": 61, "XSAVE2": 208}


@dataclass(frozen=True, slots=True)
class Candidate:
    config: VmConfig
    parts: Parts
    info: Mapping[str, Any]


def machine_info(kvm: Kvm, images: Mapping[str, int]) -> dict[str, Any]:
    """What the destination compares: sizes of the disks by id, KVM's capabilities by name."""
    return {
        "disk_sizes": {name: image_size(fd) for name, fd in images.items()},
        "kvm": {name: kvm.check_extension(number) for name, number in CAPS.items()},
    }


def accept(config: dict[str, Any], parts: Parts, info: dict[str, Any]) -> tuple[list[int], dict[str, int]]:
    """RAM for it, and its disks, open and not locked. Raises MigrationError with every obstacle."""
    try:
        candidate = Candidate(from_json(config, strict=False), parts, info)
        validate(candidate.config)
    except FlotillaError as error:
        raise MigrationError("the guest's configuration makes no VM of this release") from error
    obstacles = [obstacle for check in CHECKS for obstacle in check(candidate)]
    if obstacles:
        raise MigrationError(f"this host can't take the guest: {'; '.join(obstacles)}")
    images: dict[str, int] = {}
    ram: list[int] = []
    try:
        for disk in _own_disks(candidate.config):
            images[disk.id or ""] = disks.open_unlocked(disk)
        for _, size, _, _ in parts:
            ram.append(memfd(MEMFD_NAME, size))
    except BaseException as error:
        close_fds([*ram, *images.values()])
        if isinstance(error, OSError):
            raise HostError(f"this host refused {sum(part[1] for part in parts)} bytes of guest RAM") from error
        raise
    return ram, images


def image_size(fd: int) -> int:
    """Bytes of a file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def _own_disks(config: VmConfig) -> list[DiskConfig]:
    return [disk for disk in config.disks if disk.path is not None and not disk.vhost_user]


def _versions(candidate: Candidate) -> list[str]:
    return [describe(refusal) for refusal in refusals(candidate.info.get("state_versions", {}))]


def _memory(candidate: Candidate) -> list[str]:
    """Before anything of the peer's numbers is allocated."""
    ours = [(gpa, size, 0, slot) for slot, (gpa, size) in enumerate(spans(candidate.config.memory.size))]
    return [] if candidate.parts == ours else [f"its RAM is laid out as {candidate.parts}, not as {ours}"]


def _cpu(candidate: Candidate) -> list[str]:
    try:
        guest = [CpuidEntry(*entry) for entry in candidate.info["cpuid"]]
    except (KeyError, TypeError) as error:
        raise ProtocolError("MACHINE from the peer: info has no CPUID list") from error
    config = candidate.config
    with_kvm = Kvm()
    try:
        layout = lo.compute(config.memory.size, host_phys_bits(), config.cpus.max_phys_bits)
        supported = [
            CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in with_kvm.supported_cpuid()
        ]
        check_compatible(guest, common_cpuid(supported, layout.phys_bits))
    except MigrationError as error:
        return [error.message]
    finally:
        with_kvm.close()
    return []


def _kvm(candidate: Candidate) -> list[str]:
    theirs = candidate.info.get("kvm")
    if not isinstance(theirs, dict):
        raise ProtocolError("MACHINE from the peer: info has no KVM capabilities")
    kvm = Kvm()
    try:
        ours = {name: kvm.check_extension(number) for name, number in CAPS.items()}
    finally:
        kvm.close()
    return [
        f"KVM capability {name} is {ours[name]} here and {theirs[name]} at the source"
        for name in CAPS
        if isinstance(theirs.get(name), int) and ours[name] < theirs[name]
    ]


def _disks(candidate: Candidate) -> list[str]:
    sizes = candidate.info.get("disk_sizes")
    if not isinstance(sizes, dict):
        raise ProtocolError("MACHINE from the peer: info has no disk sizes")
    found = (_disk(disk, sizes.get(disk.id)) for disk in _own_disks(candidate.config))
    return [obstacle for obstacle in found if obstacle]


def _disk(disk: DiskConfig, wanted: object) -> str:
    what = f"--disk path={disk.path}"
    try:
        mode = os.stat(disk.path or "").st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return f"{what}: neither an image file nor a block device"
        fd = disks.open_unlocked(disk)
    except OSError as error:
        return f"{what}: {error.strerror}"
    except HostError as error:
        return describe(error)
    try:
        size = image_size(fd)
    finally:
        os.close(fd)
    return "" if size == wanted else f"{what} has {size} bytes, at the source {wanted}"


def _files(candidate: Candidate) -> list[str]:
    return [describe(error) for error in missing_files(candidate.config)]


def _nets(candidate: Candidate) -> list[str]:
    """Descriptors do not travel; a TAP that is asked for by name must be free here, and any other one possible."""
    found = (_net(net) for net in candidate.config.net if not net.vhost_user)
    return [obstacle for obstacle in found if obstacle]


def _net(net: NetConfig) -> str:
    if net.fds:
        return f"{net.id}: its TAP was given by descriptor (fd=), which can't travel to another host"
    try:
        open_tap(net).close()
    except HostError as error:
        return describe(error)
    return ""


CHECKS: Final[tuple[Callable[[Candidate], list[str]], ...]] = (_versions, _memory, _cpu, _kvm, _disks, _files, _nets)
