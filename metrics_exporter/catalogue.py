"""Every metric that the exporter has, once: name, kind, labels, meaning. docs/metrics.md lists them for users."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` as it is scraped, a counter's with its _total. Units are the base ones: seconds, bytes."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str


_PROCESS: Final = ("process", "kind")
_DEVICE: Final = ("device", "operation")


def _counter(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(f"flotilla_{name}_total", Kind.COUNTER, labels, text)


def _gauge(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(f"flotilla_{name}", Kind.GAUGE, labels, text)


CATALOGUE: Final = (
    _gauge("build_info", ("version",), "Always 1; the labels say what runs"),
    _gauge("collection_seconds", (), "What it took to collect these figures"),
    _gauge("vm_state", ("state",), "1 for the state of the VM as vm.info tells it"),
    # Processes
    _counter("process_cpu_seconds", (*_PROCESS, "mode"), "CPU time of the present process; a vCPU's user time has the "
             "guest's in it"),
    _gauge("process_pss_bytes", _PROCESS, "Proportional set size; the vCPUs' is the controller's"),
    _counter("process_restarts", _PROCESS, "How often the process has been started again"),
    _counter("process_losses", (*_PROCESS, "cause"), "How often the process was lost, by how that was noticed"),
    _counter("process_quarantines", _PROCESS, "How often no successor of the process came up, once for each reason"),
    _counter("process_upgrades", (*_PROCESS, "outcome"), "Upgrades of the worker, done and failed"),
    _gauge("process_state", (*_PROCESS, "state"), "1 for the state of the process as vmm.fleet tells it"),
    _gauge("process_last_stall_seconds", _PROCESS, "From the last loss of the process until its successor served"),
    # Devices
    _gauge("device_worker_up", ("device",), "1 if the device's worker answered this time"),
    _counter("device_operations", _DEVICE, "Operations that went well; of a network card, frames"),
    _counter("device_bytes", _DEVICE, "Bytes that they moved"),
    _counter("device_errors", ("device", "error"), "What went wrong, by how; what is poisoned is also in io or "
             "transmit_dropped"),
    Metric("flotilla_device_latency_seconds", Kind.HISTOGRAM, _DEVICE, "From taking a request to its completion"),
    _gauge("device_queue_depth", ("device",), "Requests that were taken and are not completed"),
    _counter("device_kicks", ("device",), "Notifications by the guest"),
    _counter("device_interrupts", ("device",), "Notifications to the guest"),
    _gauge("device_broken_queues", ("device",), "Queues that the guest has made unusable"),
    # vCPUs and KVM
    _counter("vcpu_exits", ("vcpu", "reason", "finished_by"), "Returns from KVM_RUN by KVM's reason; one whose vCPU "
             "process was killed may be counted twice"),
    _gauge("kvm_stats_available", (), "Whether this kernel has statistics of KVM, or was asked for them in time"),
    _counter("kvm_vm_stat", ("stat", "unit"), "KVM's cumulative statistics of the VM, under their kernel names"),
    _gauge("kvm_vm_value", ("stat", "unit"), "KVM's present and peak values of the VM"),
    _counter("kvm_vcpu_stat", ("vcpu", "stat", "unit"), "KVM's cumulative statistics of each vCPU"),
    _gauge("kvm_vcpu_value", ("vcpu", "stat", "unit"), "KVM's present and peak values of each vCPU"),
    # Migration
    _gauge("migration_state", ("state",), "1 for how the last migration went or goes (none, ongoing, completed …)"),
    _gauge("migration_phase", ("direction", "phase"), "1 for the phase that it is in, or ended in"),
    _gauge("migration_round", (), "Round of copying RAM, of a remote migration"),
    _gauge("migration_transferred_bytes", (), "What went through its stream"),
    _gauge("migration_remaining_bytes", (), "RAM that is known to be left to copy"),
    _gauge("migration_downtime_seconds", (), "How long the guest stood still"),
    _gauge("migration_duration_seconds", (), "How long it took, or takes until now"),
)  # fmt: skip
