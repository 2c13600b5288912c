"""controller.vcpus: what becomes of an exit that says that the guest could not be entered. The rest of it is shown by
real vCPUs, in tests/vcpu_worker and tests/probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from controller import vcpus
from controller.config.cli import Seccomp
from controller.supervision import Supervision
from controller.vcpus import ENTRY_TRIES, Vcpus
from shared.reactor import Reactor
from vcpu_worker.process import Exit, ExitKind


class Refused:
    """A vCPU whose entries KVM refuses: no KVM that this machine can have does so when it is asked to."""

    name, pidfd = "vcpu0", -1

    def __init__(self, _vm: Any, _pages: Any, index: int, *_: Any) -> None:
        self.index, self.entry_refused, self.finished = index, True, 0

    def failure(self) -> str:
        return "KVM exit 9, hardware reason 0xffffffff"

    def finish_exit(self, _epoch: int) -> None:
        self.finished += 1

    def close(self) -> None:
        pass


class Machine:
    def __init__(self) -> None:
        self.stopped, self.failed = False, ""

    def vcpu_failed(self, name: str, why: str) -> None:
        self.stopped, self.failed = True, f"{name}: {why}"


@pytest.fixture
def all_vcpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Vcpus, Any, Machine]]:
    monkeypatch.setattr(vcpus, "Vcpu", Refused)
    machine: Any = Machine()
    made = Vcpus(Reactor(), None, None, [0], machine, Seccomp.TRAP, Supervision())  # type: ignore[arg-type]
    yield made, made.all[0], machine
    made.close()


def fails(made: Vcpus, vcpu: Any) -> None:
    made._carry_out(vcpu, Exit(1, ExitKind.FAILED, address=9))


def test_refused_entry_is_tried_again_and_a_vcpu_that_never_enters_resets_the_guest(all_vcpus) -> None:
    made, vcpu, machine = all_vcpus
    for tries in range(1, ENTRY_TRIES + 1):
        fails(made, vcpu)
        assert (vcpu.finished, machine.failed) == (tries, "")
    fails(made, vcpu)
    assert machine.failed == "vcpu0: KVM exit 9, hardware reason 0xffffffff"
    assert vcpu.finished == ENTRY_TRIES


def test_refused_entries_that_are_rare_are_tried_again_each_time(all_vcpus, monkeypatch: pytest.MonkeyPatch) -> None:
    made, vcpu, machine = all_vcpus
    now = 1000.0
    monkeypatch.setattr(vcpus.time, "monotonic", lambda: now)
    for _ in range(10):
        fails(made, vcpu)
        now += 0.6
    assert (vcpu.finished, machine.failed) == (10, "")


def test_any_other_failure_is_final(all_vcpus) -> None:
    made, vcpu, machine = all_vcpus
    vcpu.entry_refused = False
    fails(made, vcpu)
    assert machine.failed and vcpu.finished == 0
