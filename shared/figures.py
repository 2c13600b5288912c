"""What the controller knows of its VM in figures, as the metrics exporter gets it (Verb.METRICS).

One answer is one `Figures`, msgpack maps inside of maps by field name. Readers are tolerant: fields that they do not
know are ignored, those that are missing have their defaults.

The controller only copies: what has to be computed (KVM's tables, sums, names) the exporter does, beside the guest and
not in its way. What walks page tables (PSS) is not in here either: the exporter reads it from descriptors that come
beside the answer, datagrams {"pids": […]} with one of /proc/PID/smaps_rollup per pid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from shared.errors import ProtocolError

T = TypeVar("T")

VM: Final = ""  # the owner of KVM's statistics that belong to no vCPU


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """A row of `vmm.fleet`. CPU time in clock ticks, None when it could not be read; the guest's is in a vCPU's user
    time. `losses` by cause."""

    kind: str = ""
    name: str = ""
    pid: int = 0
    state: str = ""
    restarts: int = 0
    user_ticks: int | None = None
    system_ticks: int | None = None
    last_stall_ms: float | None = None
    upgrades: int = 0
    failed_upgrades: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    quarantines: int = 0


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """A device worker's `stats`; None when it did not answer. `name`: the device's id, or `console`."""

    kind: str = ""
    name: str = ""
    stats: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class ExitFigures:
    """A vCPU's exits: by who finished them, a count for each number of KVM's reasons; the last is for all others."""

    vcpu: str = ""
    counts: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KvmFigures:
    """All that a statistics descriptor of KVM's tells (metrics_exporter/kvm_stats.py). `owner`: a vCPU, or VM."""

    owner: str = VM
    table: bytes = b""


@dataclass(frozen=True, slots=True)
class MigrationFigures:
    """Of the last migration, or the one under way; state "none" without any. As `vm.migration-progress` has it."""

    state: str = "none"
    phase: str = ""
    direction: str = ""
    bytes_transferred: int = 0
    remaining_bytes: int | None = None
    round: int | None = None
    downtime_ms: float | None = None
    total_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """`kvm`: empty where the kernel has no such statistics. `vm_state`: as `vm.info` tells it, "" without a VM."""

    version: str = ""
    vm_state: str = ""
    processes: tuple[ProcessFigures, ...] = ()
    workers: tuple[WorkerFigures, ...] = ()
    exits: tuple[ExitFigures, ...] = ()
    kvm: tuple[KvmFigures, ...] = ()
    migration: MigrationFigures = field(default_factory=MigrationFigures)


_LISTS: Final = {"processes": ProcessFigures, "workers": WorkerFigures, "exits": ExitFigures, "kvm": KvmFigures}
_HINTS: Final = {kind: get_type_hints(kind) for kind in (Figures, MigrationFigures, *_LISTS.values())}


def to_wire(figures: Figures) -> dict[str, Any]:
    wire = _plain(figures)
    for name in _LISTS:
        wire[name] = [_plain(entry) for entry in wire[name]]
    wire["migration"] = _plain(figures.migration)
    return wire


def from_wire(wire: object) -> Figures:
    """Raises ProtocolError for what is no map of lists of maps, and for a field of another type than ours."""
    whole = dict(_map(wire, "figures"))
    for name, kind in _LISTS.items():
        entries = whole.get(name, [])
        if not isinstance(entries, list):
            raise ProtocolError(f"figures: {name} is no list")
        whole[name] = tuple(_read(kind, _map(entry, name), name) for entry in entries)
    whole["migration"] = _read(MigrationFigures, _map(whole.get("migration", {}), "migration"), "migration")
    return _read(Figures, whole, "figures")


def known(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance from those of the values that it has a field for."""
    return kind(**{name: values[name] for name in _names(kind) if name in values})


def _read(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    for name, hint in _HINTS[kind].items():
        if name in values and not _fits(values[name], hint):
            raise ProtocolError(f"figures: {what} with {name}={values[name]!r:.40}")
    return known(kind, values)


def _fits(value: object, hint: Any) -> bool:
    origin, of = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, each) for each in of)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_fits(each, of[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint)


def _plain(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _names(type(record))}


def _names(kind: Any) -> list[str]:
    return [entry.name for entry in fields(kind)]


def _map(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError(f"figures: {what} is no map")
    return value
