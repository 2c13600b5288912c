"""controller.kvm_stats: descriptors of KVM's statistics, and hosts that have none."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from controller.kvm_stats import KvmStats
from metrics_exporter.kvm_stats import parse
from shared import kvm

pytestmark = pytest.mark.probe


class Machine:
    def __init__(self) -> None:
        self.device = kvm.Kvm()
        self.vm = self.device.create_vm()
        self.vcpu = self.vm.create_vcpu(0)
        self.owners = [("", self.vm.fd), ("vcpu0", self.vcpu)]

    def close(self) -> None:
        os.close(self.vcpu)
        self.vm.close()
        self.device.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


def descriptors() -> set[int]:
    """Ours that are open; the one of the listing itself is not among them."""
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")}


def test_tables_of_the_vm_and_of_each_vcpu_are_whole(machine: Machine) -> None:
    before = descriptors()
    stats = KvmStats(machine.device, machine.owners)
    tables = dict(stats.read())
    assert {stat.name for stat in parse(tables[""])} >= {"remote_tlb_flush", "pages_4k"}
    vcpu = {stat.name: stat for stat in parse(tables["vcpu0"])}
    assert {"exits", "halt_wait_ns"} <= set(vcpu)
    assert (vcpu["exits"].cumulative, vcpu["exits"].unit, vcpu["exits"].value) == (True, "", 0)
    assert vcpu["halt_wait_ns"].unit == "seconds"
    ours = descriptors() - before
    assert len(ours) == 2 and not any(os.get_inheritable(fd) for fd in ours)
    stats.close()
    stats.close()
    assert descriptors() == before
    assert stats.read() == []


def test_a_kernel_that_has_none_gives_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.device, "check_extension", lambda _capability: 0)
    stats = KvmStats(machine.device, machine.owners)
    assert stats.read() == []
    stats.close()


def test_without_descriptors_there_are_none_and_none_is_kept(machine: Machine) -> None:
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = os.open("/dev/null", os.O_RDONLY)  # the lowest free one: room for exactly this
    os.close(highest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        stats = KvmStats(machine.device, machine.owners)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert stats.read() == []
    assert descriptors() == before
    stats.close()
