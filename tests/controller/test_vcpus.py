"""controller.vcpus: what becomes of an exit that says that the guest could not be entered, and of a process that can't
start. The rest of it is shown in tests/vcpu_worker and tests/probe.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from controller import vcpus
from controller.config.cli import Seccomp
from controller.supervision import OFTEN, Supervision
from controller.vcpus import ENTRY_DELAYS, ENTRY_SECONDS, Vcpus
from shared.reactor import Reactor, sleep
from tests.vcpu_worker.rig import SPIN, Rig, rig
from vcpu_worker.layout import StatePages, state_size
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
    """Its entry, once; until that is settled."""
    made._carry_out(vcpu, Exit(1, ExitKind.FAILED, address=9))
    end = time.monotonic() + 30
    finished, reactor = vcpu.finished, made._reactor
    while vcpu.finished == finished and not made._machine.stopped:
        assert time.monotonic() < end
        reactor.run_until(sleep(reactor, 0.001))


def test_refused_entry_is_tried_again_and_a_vcpu_that_never_enters_resets_the_guest(all_vcpus) -> None:
    made, vcpu, machine = all_vcpus
    began = time.monotonic()
    for tries in range(1, len(ENTRY_DELAYS) + 1):
        fails(made, vcpu)
        assert (vcpu.finished, machine.failed) == (tries, "")
    assert time.monotonic() - began >= sum(ENTRY_DELAYS)  # whatever refuses for a moment has had one
    made._refused[0] = [time.monotonic()] * len(ENTRY_DELAYS)  # also on a host that stood still in between
    fails(made, vcpu)
    assert machine.failed == "vcpu0: KVM exit 9, hardware reason 0xffffffff"
    assert vcpu.finished == len(ENTRY_DELAYS)


def test_refused_entries_that_are_rare_are_tried_again_each_time(all_vcpus) -> None:
    made, vcpu, machine = all_vcpus
    for count in range(1, 2 * len(ENTRY_DELAYS)):
        fails(made, vcpu)
        assert (vcpu.finished, machine.failed) == (count, "")
        made._refused[0] = [when - ENTRY_SECONDS for when in made._refused[0]]


def test_any_other_failure_is_final(all_vcpus) -> None:
    made, vcpu, machine = all_vcpus
    vcpu.entry_refused = False
    fails(made, vcpu)
    assert machine.failed and vcpu.finished == 0


class Real:
    """One vCPU on /dev/kvm, whose process can be kept from starting. `events`: name, state of its row, reason."""

    def __init__(self, machine: Rig) -> None:
        self.reactor, self.machine = Reactor(), Machine()
        self.events: list[tuple[str, str, str]] = []
        self.supervision = Supervision(self._told)
        pages = StatePages(mmap.mmap(-1, state_size(1)), 1)
        vcpu_machine: Any = self.machine
        self.vcpus = Vcpus(self.reactor, machine.vm, pages, [1], vcpu_machine, Seccomp.TRAP, self.supervision)
        self.vcpu = self.vcpus.all[0]
        machine.set_registers(self.vcpu)

    def _told(self, _source: str, event: str, properties: dict[str, Any] | None) -> None:
        self.events.append((event, self.state, (properties or {})["reason"]))

    @property
    def state(self) -> str:
        return str(self.vcpus.describe()[0]["state"])

    def until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():
                await sleep(self.reactor, 0.001)

        self.reactor.run_until(wait(), 30)

    def kill(self) -> None:
        """And wait for its successor."""
        pid, births = self.vcpu.pid, self.vcpu.births
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: self.vcpu.births > births)

    def break_it(self, how: str) -> Callable[[], None]:
        """No process of it starts until the answer is called: its filter is refused, or there is no clone."""
        start = self.vcpu._start
        name, before = ("seccomp", start.seccomp) if how == "filter" else ("stack_size", start.stack_size)
        empty = ctypes.create_string_buffer(16)
        setattr(start, name, ctypes.addressof(empty) if how == "filter" else 0)

        def repair(_: Any = empty) -> None:
            setattr(start, name, before)

        return repair


@pytest.fixture
def real() -> Iterator[Real]:
    with rig(SPIN, started=False) as machine:
        made = Real(machine)
        made.vcpus.start()
        made.until(lambda: made.vcpu.births == 1)
        yield made
        made.vcpus.close()
        made.reactor.close()


@pytest.mark.probe
@pytest.mark.parametrize(
    ("how", "reason", "first"),
    [("filter", "its seccomp filter is refused", ["worker-lost", "worker-restarted", "worker-lost"]),
     ("clone", "clone3 failed", ["worker-lost"])],
)  # fmt: skip
def test_vcpu_whose_process_can_not_start_is_tried_for_ever_and_the_guest_goes_on(
    real: Real, monkeypatch: pytest.MonkeyPatch, how: str, reason: str, first: list[str]
) -> None:
    monkeypatch.setattr(vcpus, "LAST_DELAY", 0.04)
    repair = real.break_it(how)
    os.kill(real.vcpu.pid, signal.SIGKILL)
    tries: list[str] = []
    again = real.vcpus._stillborn
    monkeypatch.setattr(real.vcpus, "_stillborn", lambda vcpu, why: (tries.append(why), again(vcpu, why)))
    real.until(lambda: len(tries) > 20)
    assert real.state == "quarantined" and reason in real.supervision.columns("vcpu", "vcpu0")["last_reason"]
    repair()
    real.until(lambda: real.state == "running")
    assert [event for event, *_ in real.events] == [*first, "worker-quarantined", "worker-restarted"]
    assert reason in real.events[-2][2]
    assert real.machine.failed == ""
    told = len(real.events)
    real.kill()
    assert [event for event, *_ in real.events[told:]] == ["worker-lost", "worker-restarted"]


@pytest.mark.probe
def test_vcpu_that_is_away_is_shown_and_one_that_is_replaced_often_is_degraded(real: Real) -> None:
    for lost in range(1, OFTEN + 1):
        assert real.state == "running"
        real.kill()
        assert len(real.events) == 2 * lost
    assert real.state == "degraded"
    assert {state for event, state, _ in real.events if event == "worker-lost"} == {"restarting"}
