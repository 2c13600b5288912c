"""metrics_exporter.exposition: from figures to text that Prometheus reads, and docs/metrics.md beside the catalogue."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from metrics_exporter import kvm_stats
from metrics_exporter.catalogue import CATALOGUE, Kind
from metrics_exporter.exposition import encode
from metrics_exporter.source import Measured
from shared.figures import (
    ExitFigures,
    Figures,
    KvmFigures,
    MigrationFigures,
    ProcessFigures,
    WorkerFigures,
)
from tests.prometheus import Samples, at, parse

ROOT = Path(__file__).resolve().parents[2]
TICK = os.sysconf("SC_CLK_TCK")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def table(*stats: tuple[str, int, int, int, int, int]) -> bytes:
    """What a statistics descriptor tells: name, type, unit, base, exponent, value of each."""
    descriptors = data = b""
    for name, kind, unit, base, exponent, value in stats:
        flags = kind | unit << 4 | base << 8
        descriptors += struct.pack("=IhHII48s", flags, exponent, 1, len(data), 0, name.encode())
        data += struct.pack("=Q", value)
    start = 24 + 48
    return struct.pack("=6I48s", 0, 48, len(stats), 24, start, start + len(descriptors), b"kvm-1") + descriptors + data


FIGURES = Figures(
    version="0.1.0",
    vm_state="Running",
    processes=(
        ProcessFigures("controller", "controller", 10, "running", 0, 300, 100),
        ProcessFigures("blk", "_disk0", 11, "running", 2, 50, 25, 12.5, 3, 1, {"ended": 2, "hung": 0}, 4),
        ProcessFigures("vcpu", "vcpu0", 12, "exiting", 0, 7, 8),
        ProcessFigures("console", "console", 0, "restarting", 1),
    ),
    workers=(
        WorkerFigures("blk", "_disk0", {
            "read_ops": 3, "read_bytes": 1536, "read_latency_sum": 250, "read_latency_bucket_0": 1,
            "read_latency_bucket_3": 2, "errors": 4, "malformed": 5, "poisoned": 2, "inflight": 6, "kicks": 7,
            "calls": 8,
        }),
        WorkerFigures("net", "_net1", {
            "rx_frames": 9, "rx_bytes": 90, "tx_frames": 8, "tx_bytes": 80, "rx_dropped": 1, "poisoned": 3,
        }),
        WorkerFigures("console", "console", None),
    ),
    exits=(ExitFigures("vcpu0", {"vcpu": [0, 0, 11, 0, 0, 0, 0, 5], "controller": [0, 0, 2, 0, 0, 0, 1, 0]}),),
    kvm=(
        KvmFigures("", table(("pages_4k", 1, 0, 0, 0, 93), ("flushes", 0, 0, 0, 0, 4))),
        KvmFigures("vcpu0", table(("halt_wait_ns", 0, 2, 0, -9, 1_500_000_000), ("hist", 4, 2, 0, -9, 1))),
    ),
    migration=MigrationFigures("ongoing", "copying", "send", 4096, 8192, 3, None, 2500.0),
)  # fmt: skip


def scrape(figures: Figures, pss: dict[int, int] | None = None, accept: str = "") -> str:
    return encode(Measured(figures, pss or {}, 0.25), accept)[0].decode()


@pytest.fixture(scope="module")
def found() -> Samples:
    return parse(scrape(FIGURES, {10: 1 << 20, 11: 4096}))


def test_processes(found: Samples) -> None:
    disk = {"process": "_disk0", "kind": "blk"}
    assert at(found, "process_cpu_seconds_total", **disk, mode="user") == 50 / TICK
    assert at(found, "process_cpu_seconds_total", **disk, mode="system") == 25 / TICK
    assert at(found, "process_pss_bytes", **disk) == 4096
    assert at(found, "process_restarts_total", **disk) == 2
    assert at(found, "process_upgrades_total", **disk, outcome="done") == 3
    assert at(found, "process_upgrades_total", **disk, outcome="failed") == 1
    assert at(found, "process_losses_total", **disk, cause="ended") == 2
    assert at(found, "process_losses_total", **disk, cause="hung") == 0
    assert at(found, "process_quarantines_total", **disk) == 4
    assert at(found, "process_state", **disk, state="running") == 1
    assert at(found, "process_last_stall_seconds", **disk) == 0.0125


def test_what_is_not_known_of_a_process_is_not_told(found: Samples) -> None:
    console = {"process": "console", "kind": "console"}
    assert at(found, "process_state", **console, state="restarting") == 1
    assert at(found, "process_cpu_seconds_total", **console, mode="user") is None
    assert at(found, "process_pss_bytes", **console) is None
    assert at(found, "process_pss_bytes", process="vcpu0", kind="vcpu") is None
    assert at(found, "process_last_stall_seconds", **console) is None


def test_devices(found: Samples) -> None:
    assert at(found, "device_worker_up", device="_disk0") == 1
    assert at(found, "device_operations_total", device="_disk0", operation="read") == 3
    assert at(found, "device_bytes_total", device="_disk0", operation="read") == 1536
    assert at(found, "device_errors_total", device="_disk0", error="io") == 4
    assert at(found, "device_errors_total", device="_disk0", error="malformed") == 5
    assert at(found, "device_errors_total", device="_disk0", error="poisoned") == 2
    assert at(found, "device_queue_depth", device="_disk0") == 6
    assert at(found, "device_kicks_total", device="_disk0") == 7
    assert at(found, "device_interrupts_total", device="_disk0") == 8
    assert at(found, "device_operations_total", device="_net1", operation="transmit") == 8
    assert at(found, "device_bytes_total", device="_net1", operation="receive") == 90
    assert at(found, "device_errors_total", device="_net1", error="receive_dropped") == 1
    assert at(found, "device_errors_total", device="_net1", error="poisoned") == 3


def test_a_worker_that_does_not_answer_has_no_figures_and_says_so(found: Samples) -> None:
    assert at(found, "device_worker_up", device="console") == 0
    assert at(found, "device_operations_total", device="console", operation="console") is None


def test_latency_histogram_is_cumulative_and_ends_with_all(found: Samples) -> None:
    read = {"device": "_disk0", "operation": "read"}
    for le, count in (("1.6e-05", 1), ("3.2e-05", 1), ("6.4e-05", 1), ("0.000128", 3), ("4.194304", 3), ("+Inf", 3)):
        assert at(found, "device_latency_seconds_bucket", **read, le=le) == count
    assert at(found, "device_latency_seconds_count", **read) == 3
    assert at(found, "device_latency_seconds_sum", **read) == 250e-6


def test_exits_have_their_reason_and_who_finished_them(found: Samples) -> None:
    def count(reason: str, by: str) -> float | None:
        return at(found, "vcpu_exits_total", vcpu="vcpu0", reason=reason, finished_by=by)

    assert (count("io", "vcpu"), count("io", "controller")) == (11, 2)
    assert (count("mmio", "vcpu"), count("mmio", "controller")) == (0, 1)
    assert (count("other", "vcpu"), count("other", "controller")) == (5, None)


def test_kvm_statistics_in_base_units(found: Samples) -> None:
    assert at(found, "kvm_stats_available") == 1
    assert at(found, "kvm_vm_stat_total", stat="flushes", unit="") == 4
    assert at(found, "kvm_vm_value", stat="pages_4k", unit="") == 93
    assert at(found, "kvm_vcpu_stat_total", vcpu="vcpu0", stat="halt_wait_ns", unit="seconds") == 1.5
    assert not any(("stat", "hist") in labels for _, labels in found)


def test_a_kernel_without_kvm_statistics_is_said_to_have_none() -> None:
    assert at(parse(scrape(Figures())), "kvm_stats_available") == 0


@pytest.mark.parametrize("cut", [0, 3, 23, 24, 80, 130, 200, 215])
def test_a_kvm_table_that_is_cut_short_gives_what_is_whole(cut: int) -> None:
    whole = table(("a", 0, 0, 0, 0, 1), ("b", 0, 0, 0, 0, 2))
    assert [stat.name for stat in kvm_stats.parse(whole)] == ["a", "b"]
    assert [stat.name for stat in kvm_stats.parse(whole[:cut])] in ([], ["a"])


def test_migration(found: Samples) -> None:
    assert at(found, "migration_state", state="ongoing") == 1
    assert at(found, "migration_phase", direction="send", phase="copying") == 1
    assert at(found, "migration_round") == 3
    assert at(found, "migration_transferred_bytes") == 4096
    assert at(found, "migration_remaining_bytes") == 8192
    assert at(found, "migration_downtime_seconds") is None
    assert at(found, "migration_duration_seconds") == 2.5


def test_without_a_migration_only_that_is_told() -> None:
    told = {name for name, _ in parse(scrape(Figures())) if "_migration_" in name}
    assert told == {"flotilla_migration_state"}


def test_a_label_may_hold_anything() -> None:
    name = 'a"b\\c\nd ü'
    text = scrape(Figures(processes=(ProcessFigures("blk", name, 1, "running"),)))
    assert at(parse(text), "process_restarts_total", process=name, kind="blk") == 0


@pytest.mark.parametrize("figures", [Figures(), FIGURES], ids=["nothing", "everything"])
def test_openmetrics_when_the_client_asks_for_it(figures: Figures) -> None:
    text, kind = encode(Measured(figures, {}, 0.25), f"{OPENMETRICS};q=0.5,text/plain;q=0.1")
    assert kind.startswith("application/openmetrics-text")
    families = [*openmetrics.text_string_to_metric_families(text.decode())]
    assert len(families) == len(CATALOGUE)


def test_plain_text_otherwise() -> None:
    for accept in ("", "text/html", "*/*", "\0nonsense;;=,"):
        assert encode(Measured(FIGURES, {}, 0.25), accept)[1].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("version", ["x", "", "1.x", "1..0", "0.0.4.", "\N{SUPERSCRIPT TWO}"])
@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
def test_a_version_that_is_none_is_no_wish(kind: str, version: str) -> None:
    text, _ = encode(Measured(FIGURES, {}, 0.25), f"{kind}; version={version}")
    assert text.startswith(b"# HELP flotilla_build_info")


def documented() -> dict[str, tuple[str, str]]:
    """docs/metrics.md: kind and labels by name."""
    rows = re.findall(r"^\| `(flotilla_\w+)` \| (\w+) \| ([^|]*) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    return {name: (kind, labels.strip()) for name, kind, labels in rows}


def test_the_page_lists_every_metric_with_its_kind_and_labels() -> None:
    assert documented() == {m.name: (m.kind.value, " ".join(f"`{label}`" for label in m.labels)) for m in CATALOGUE}


def test_every_metric_of_the_catalogue_is_in_a_scrape_and_no_other() -> None:
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(scrape(Figures()))
    }
    assert families == {metric.name for metric in CATALOGUE}
    assert all(metric.name.endswith("_total") is (metric.kind is Kind.COUNTER) for metric in CATALOGUE)
