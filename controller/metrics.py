"""Figures of a running VMM for its metrics exporter (shared/figures.py).

The guest's exits wait while this thread computes, so it only copies, and a little at a time: /proc is read for
PROCESSES_A_TURN processes by turn, workers are asked side by side, and PSS, which walks the page tables of guest RAM,
is not read here at all: the exporter gets the files, open, as it may not open them itself.
"""

from __future__ import annotations

import os

from controller.api_socket import ApiSocket
from controller.backends import Backend
from controller.config.version import FLOTILLA_VERSION
from controller.exporter import Exporter
from controller.leavings import Leavings
from controller.supervision import stat_fields
from shared import log
from shared.errors import FlotillaError
from shared.figures import (
    ExitFigures,
    Figures,
    KvmFigures,
    MigrationFigures,
    ProcessFigures,
    WorkerFigures,
    known,
    to_wire,
)
from shared.reactor import Reactor, describe, gather, sleep, within
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.vmm import Vmm

PROCESSES_A_TURN = 16
WORKER_SECONDS = 2.0
# Fields 14 and 15 of proc_pid_stat(5), counted from the third, which is the first behind the name.
UTIME, STIME = 11, 12


def exporter(vmm: Vmm, listening: ApiSocket, leavings: Leavings) -> Exporter:
    """The exporter of a VMM; start() is the caller's."""

    async def collected(files: dict[int, int]) -> dict[str, Any]:
        return to_wire(await collect(vmm, files))

    return Exporter(vmm.reactor, vmm.fleet, vmm.runtime.path, leavings, listening, collected)


async def collect(vmm: Vmm, files: dict[int, int]) -> Figures:
    """Everything, and in `files`, by pid, an open smaps_rollup of each address space, for the caller to close whatever
    is raised. What can't be had is left out."""
    backends = vmm.vm.workers if vmm.vm else ()
    workers = await gather(vmm.reactor, *(_worker(vmm.reactor, backend) for backend in backends))
    rows = await vmm.describe_fleet(None, pss=False)  # after the wait: a pid is good as long as it is not reaped
    processes = []
    for number, row in enumerate(rows):
        if number % PROCESSES_A_TURN == PROCESSES_A_TURN - 1:
            await sleep(vmm.reactor, 0)
        processes.append(_process(row, *vmm.fleet.supervision.counts(row["kind"], row["device"])))
        if row["pid"] and row["kind"] != "vcpu":  # their address space is the controller's
            _open(row["pid"], files)
    vm = vmm.vm  # looked at from here on without a wait: it may have ended meanwhile
    return Figures(
        FLOTILLA_VERSION,
        str(vmm.state) if vmm.config is not None else "",
        tuple(processes),
        tuple(workers),
        tuple(ExitFigures(name, counts) for name, counts in vm.exits().items()) if vm else (),
        _kvm(vmm),
        known(MigrationFigures, vmm.migration.progress()) if vmm.migration is not None else MigrationFigures(),
    )


def _process(row: dict[str, Any], losses: dict[str, int], quarantines: int) -> ProcessFigures:
    user, system = cpu_ticks(row["pid"]) if row["pid"] else (None, None)
    return ProcessFigures(
        row["kind"], row["device"], row["pid"], row["state"], row["restarts"], user, system, row.get("last_stall_ms"),
        row.get("upgrades", 0), row.get("failed_upgrades", 0), losses, quarantines,
    )  # fmt: skip


async def _worker(reactor: Reactor, backend: Backend) -> WorkerFigures:
    stats: dict[str, int] | None
    try:
        stats = await within(reactor, WORKER_SECONDS, backend.stats(), f"statistics of {backend.name}") or None
    except FlotillaError as error:
        log.debug(f"metrics: {backend.name}: {describe(error)}")
        stats = None
    return WorkerFigures(backend.kind, backend.name, stats)


def _kvm(vmm: Vmm) -> tuple[KvmFigures, ...]:
    try:
        return tuple(KvmFigures(owner, table) for owner, table in vmm.vm.kvm_stats()) if vmm.vm else ()
    except OSError as error:
        log.debug(f"metrics: KVM's statistics: {error}")
        return ()


def cpu_ticks(pid: int) -> tuple[int, int] | tuple[None, None]:
    """User and system time of a process with all its threads, in clock ticks; Nones when it is gone."""
    fields = stat_fields(f"/proc/{pid}/stat")
    return (int(fields[UTIME]), int(fields[STIME])) if fields else (None, None)


def _open(pid: int, files: dict[int, int]) -> None:
    try:
        files[pid] = os.open(f"/proc/{pid}/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        log.debug(f"metrics: {error}")
