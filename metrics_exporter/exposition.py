"""From figures to text: metric families by prometheus_client, in the format that the client asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from metrics_exporter import kvm_stats
from metrics_exporter.catalogue import CATALOGUE, Kind
from metrics_exporter.source import Measured
from shared import latency
from shared.figures import (
    VM,
    ExitFigures,
    Figures,
    KvmFigures,
    MigrationFigures,
    ProcessFigures,
    WorkerFigures,
)

# Accept headers that lead to each encoder of prometheus_client.
FORMATS: Final = ("text/plain", *(f"application/openmetrics-text; version={version}" for version in ("0.0.1", "1.0.0")))
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
# include/uapi/linux/kvm.h, KVM_EXIT_*. Others are told by their number, those beyond the count as "other".
EXIT_REASONS: Final = {
    0: "unknown", 1: "exception", 2: "io", 3: "hypercall", 4: "debug", 5: "hlt", 6: "mmio", 7: "irq_window_open",
    8: "shutdown", 9: "fail_entry", 10: "intr", 11: "set_tpr", 12: "tpr_access", 16: "nmi", 17: "internal_error",
    24: "system_event", 26: "ioapic_eoi", 27: "hyperv", 29: "x86_rdmsr", 30: "x86_wrmsr", 31: "dirty_ring_full",
    33: "x86_bus_lock", 34: "xen", 37: "notify", 39: "memory_fault",
}  # fmt: skip
# Those that any guest has, and that are told from the first scrape on: a rate needs a beginning.
USUAL_EXITS: Final = (2, 6)
UPPER: Final = (*(repr(seconds) for seconds in latency.UPPER_SECONDS), "+Inf")
# By kind of worker: what its stats call an operation, what we call it.
BLK_OPERATIONS: Final = {
    "read": "read", "write": "write", "flush": "flush", "discard": "discard", "zero": "write_zeroes", "other": "other",
}  # fmt: skip
NET_OPERATIONS: Final = {"rx": "receive", "tx": "transmit"}
ERRORS: Final = {
    "errors": "io", "unsupported": "unsupported", "malformed": "malformed", "poisoned": "poisoned",
    "rx_dropped": "receive_dropped", "tx_dropped": "transmit_dropped", "tap_gone": "tap_gone",
    "console_errors": "console", "rng_errors": "rng",
}  # fmt: skip
OF_A_DEVICE: Final = {
    "inflight": "flotilla_device_queue_depth",
    "kicks": "flotilla_device_kicks_total",
    "calls": "flotilla_device_interrupts_total",
    "broken_queues": "flotilla_device_broken_queues",
}

_FAMILIES: Final[dict[Kind, Callable[..., Any]]] = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


class Snapshot(Collector):
    """One scrape. Every family of the catalogue is there, also without a sample."""

    def __init__(self, measured: Measured) -> None:
        self._families = {m.name: _FAMILIES[m.kind](m.name, m.text, labels=m.labels) for m in CATALOGUE}
        figures = measured.figures
        self._set("flotilla_build_info", 1, figures.version)
        self._set("flotilla_collection_seconds", measured.seconds)
        if figures.vm_state:
            self._set("flotilla_vm_state", 1, figures.vm_state)
        for process in figures.processes:
            self._process(process, measured.pss_bytes)
        for worker in figures.workers:
            self._worker(worker)
        for exits in figures.exits:
            self._exits(exits)
        self._set("flotilla_kvm_stats_available", int(bool(figures.kvm)))
        for kvm in figures.kvm:
            self._kvm(kvm)
        self._migration(figures.migration)

    def collect(self) -> Iterable[Family]:
        return self._families.values()

    def _set(self, name: str, value: float | None, *labels: str) -> None:
        """None: not known, so not told."""
        if value is not None:
            self._families[name].add_metric(labels, value)

    def _process(self, process: ProcessFigures, pss: Mapping[int, int]) -> None:
        labels = (process.name, process.kind)
        for mode, ticks in (("user", process.user_ticks), ("system", process.system_ticks)):
            if ticks is not None:
                self._set("flotilla_process_cpu_seconds_total", ticks / TICKS_PER_SECOND, *labels, mode)
        self._set("flotilla_process_pss_bytes", pss.get(process.pid), *labels)
        self._set("flotilla_process_restarts_total", process.restarts, *labels)
        for cause, count in process.losses.items():
            self._set("flotilla_process_losses_total", count, *labels, cause)
        self._set("flotilla_process_quarantines_total", process.quarantines, *labels)
        for outcome, count in (("done", process.upgrades), ("failed", process.failed_upgrades)):
            self._set("flotilla_process_upgrades_total", count, *labels, outcome)
        self._set("flotilla_process_state", 1, *labels, process.state)
        if process.last_stall_ms is not None:
            self._set("flotilla_process_last_stall_seconds", process.last_stall_ms / 1000, *labels)

    def _worker(self, worker: WorkerFigures) -> None:
        self._set("flotilla_device_worker_up", int(worker.stats is not None), worker.name)
        stats = worker.stats or {}
        for operation, ops, moved in _operations(worker.kind, stats):
            self._set("flotilla_device_operations_total", ops, worker.name, operation)
            self._set("flotilla_device_bytes_total", moved, worker.name, operation)
        for key, name in OF_A_DEVICE.items():
            self._set(name, stats.get(key), worker.name)
        for key, error in ERRORS.items():
            self._set("flotilla_device_errors_total", stats.get(key), worker.name, error)
        if worker.kind == "blk" and worker.stats is not None:
            for key, operation in BLK_OPERATIONS.items():
                total, buckets = latency.read(key, stats)
                cumulative = [*zip(UPPER, accumulate(buckets), strict=True)]
                histogram = self._families["flotilla_device_latency_seconds"]
                histogram.add_metric((worker.name, operation), cumulative, total / 1e6)

    def _exits(self, exits: ExitFigures) -> None:
        for finisher, counts in exits.counts.items():
            last = len(counts) - 1
            for number, count in enumerate(counts):
                if count or number in USUAL_EXITS:
                    reason = "other" if number == last else EXIT_REASONS.get(number, str(number))
                    self._set("flotilla_vcpu_exits_total", count, exits.vcpu, reason, finisher)

    def _kvm(self, kvm: KvmFigures) -> None:
        owner = "vm" if kvm.owner == VM else "vcpu"
        labels = () if kvm.owner == VM else (kvm.owner,)
        for stat in kvm_stats.parse(kvm.table):
            what = "stat_total" if stat.cumulative else "value"
            self._set(f"flotilla_kvm_{owner}_{what}", stat.value, *labels, stat.name, stat.unit)

    def _migration(self, migration: MigrationFigures) -> None:
        self._set("flotilla_migration_state", 1, migration.state)
        if migration.state == "none":
            return
        self._set("flotilla_migration_phase", 1, migration.direction, migration.phase)
        self._set("flotilla_migration_round", migration.round)
        self._set("flotilla_migration_transferred_bytes", migration.bytes_transferred)
        self._set("flotilla_migration_remaining_bytes", migration.remaining_bytes)
        for name, value in (("downtime", migration.downtime_ms), ("duration", migration.total_ms)):
            self._set(f"flotilla_migration_{name}_seconds", None if value is None else value / 1000)


def _operations(kind: str, stats: Mapping[str, int]) -> Iterator[tuple[str, int | None, int | None]]:
    """Name, how many, bytes; None for what the worker does not tell."""
    if kind == "blk":
        for key, name in BLK_OPERATIONS.items():
            yield name, stats.get(f"{key}_ops"), stats.get(f"{key}_bytes")
    elif kind == "net":
        for key, name in NET_OPERATIONS.items():
            yield name, stats.get(f"{key}_frames"), stats.get(f"{key}_bytes")
    elif kind == "console":
        yield "console", stats.get("console_requests"), _sum(stats, "console_bytes_in", "console_bytes_out")
        yield "rng", stats.get("rng_requests"), stats.get("rng_bytes")


def _sum(stats: Mapping[str, int], *names: str) -> int | None:
    found = [stats[name] for name in names if name in stats]
    return sum(found) if found else None


def encode(measured: Measured, accept: str) -> tuple[bytes, str]:
    """The text and its content type, as an Accept header wishes; one that can't be read wishes nothing."""
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # of prometheus_client, for a version that is no number
        encoder, content_type = choose_encoder("")
    return encoder(Snapshot(measured)), content_type


def rehearse() -> None:
    """Every format once, of nothing: what they import must be there before the file system goes."""
    nothing = Measured(Figures(version="", processes=()), {}, 0.0)
    for accept in FORMATS:
        encode(nothing, accept)
