"""All vCPUs of a VM: their exits, their pauses, their deaths.

Exits are carried out here, on the reactor's thread, one after the other, so devices need no locks. An effect
that has to wait (a device's activation) is a coroutine: its vCPU waits for it, the others go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from controller.backends import DEGRADED, BackendState
from controller.bus import Bus, Effect
from controller.config.cli import Seccomp
from controller.fleet import row
from controller.supervision import OFTEN, Cause, Supervision
from shared import kvm, log
from shared.errors import FlotillaError, HostError
from shared.reactor import Future, Reactor, describe, drain_eventfd, sleep, within
from shared.seccomp import MODES
from shared.typed import TYPE_CHECKING, Any, Protocol
from vcpu_worker.layout import StatePages
from vcpu_worker.process import Exit, ExitKind, Vcpu

if TYPE_CHECKING:
    from collections.abc import Iterable

    from controller.watchdog import Patient

PAUSE_SECONDS = 10.0
# A vCPU that is killed again and again is started again and again, but not in a busy loop.
STEADY_SECONDS = 0.2
FIRST_DELAY, LAST_DELAY = 0.02, 2.0
BORN_SECONDS = 0.02
# Exit codes of vcpu.c for a process that never came as far as the guest.
BIRTH_FAILURES = {125: "its parent thread is gone", 126: "no signals", 127: "its seccomp filter is refused"}
# An entry that KVM refuses is tried again after each of these, in seconds: an emulated CPU refuses one in millions, or
# a few in a row, for a reason of its own, and what is really wrong with a vCPU is wrong the last time, too.
ENTRY_DELAYS = (0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 1.0)
ENTRY_SECONDS = 5.0  # after which a refusal is no other's successor
# KVM_SYSTEM_EVENT_*: 1 shutdown, 2 reset, 3 crash
SYSTEM_EVENT_SHUTDOWN = 1


class Machine(Protocol):
    """What an exit can mean for the VM as a whole."""

    pio: Bus
    mmio: Bus
    stopped: bool

    def end_of_interrupt(self, vector: int) -> None: ...
    def triple_fault(self) -> None: ...
    def guest_shutdown(self) -> None: ...
    def vcpu_failed(self, name: str, why: str) -> None: ...


class Vcpus:
    """Made with the vCPU fds; start() lets them run."""

    def __init__(
        self,
        reactor: Reactor,
        vm: kvm.KvmVm,
        pages: StatePages,
        apic_ids: list[int],
        machine: Machine,
        seccomp: Seccomp,
        supervision: Supervision,
    ) -> None:
        self._reactor = reactor
        self._supervision = supervision
        self._verdicts: dict[int, str] = {}  # by pid, of those that were ended for hanging
        self._machine = machine
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.all: list[Vcpu] = []
        try:
            for index, apic_id in enumerate(apic_ids):
                self.all.append(Vcpu(vm, pages, index, apic_id, self._event_fd, MODES[seccomp.value]))
        except BaseException:
            for vcpu in self.all:
                vcpu.close()
            os.close(self._event_fd)
            raise
        self._spawned = [0.0] * len(self.all)
        self.on_spawn: Callable[[str, int], None] = lambda _name, _pid: None
        self._parking: Future[None] | None = None
        self._closing = False
        self._delays = [0.0] * len(self.all)  # before the next start, where the last ones came to nothing
        self._refused: list[list[float]] = [[] for _ in self.all]  # when entries were refused, of the last seconds
        reactor.add_reader(self._event_fd, self._on_event)

    def start(self, *, paused: bool = False) -> None:
        """Spawn every process. Paused: they park at once and wait for resume()."""
        for vcpu in self.all:
            if paused:
                vcpu.request_pause()
            self._spawn(vcpu)

    def _spawn(self, vcpu: Vcpu) -> None:
        births = vcpu.births
        vcpu.spawn()
        self.on_spawn(vcpu.name, vcpu.pid)
        self._spawned[vcpu.index] = time.monotonic()
        self._reactor.add_reader(vcpu.pidfd, lambda: self._ended(vcpu))
        if self._delays[vcpu.index]:
            self._expect(vcpu, vcpu.pid, births)
        else:
            self._supervision.restored("vcpu", vcpu.name, vcpu.pid)

    def _expect(self, vcpu: Vcpu, pid: int, births: int) -> None:
        """After starts that came to nothing: it serves once it has come as far as the guest, which nobody tells us."""
        if self._closing or vcpu.pid != pid:
            return
        if vcpu.births == births:
            self._reactor.call_later(BORN_SECONDS, lambda: self._expect(vcpu, pid, births))
            return
        self._delays[vcpu.index] = 0.0
        self._supervision.restored("vcpu", vcpu.name, pid)

    def _ended(self, vcpu: Vcpu) -> None:
        """Killed: its successor finishes the exit that was under way. Reaped first: two on one stack would be the
        end.
        """
        self._reactor.remove_reader(vcpu.pidfd)
        pid = vcpu.pid
        status = vcpu.reap()
        verdict = self._verdicts.pop(pid, "")
        if self._closing:
            return
        if status in BIRTH_FAILURES:
            why = f"its process can't start ({BIRTH_FAILURES[status]})"
            if not self._delays[vcpu.index]:  # otherwise nobody has been told that it serves
                self._supervision.lost("vcpu", vcpu.name, pid, Cause.ENDED, why)
            self._stillborn(vcpu, why)
            return
        cause = Cause.HUNG if verdict else Cause.ENDED
        self._supervision.lost("vcpu", vcpu.name, pid, cause, verdict or f"it ended with {status}")
        lived = time.monotonic() - self._spawned[vcpu.index]
        if lived > STEADY_SECONDS:
            self._respawn(vcpu)
        else:
            self._reactor.call_later(FIRST_DELAY, lambda: self._respawn(vcpu))

    def _respawn(self, vcpu: Vcpu) -> None:
        if self._closing:
            return
        try:
            self._spawn(vcpu)
        except HostError as error:
            self._stillborn(vcpu, describe(error))

    def _stillborn(self, vcpu: Vcpu, why: str) -> None:
        """Its exit waits where it is: another start, and another, for as long as the VM lives."""
        delay = self._delays[vcpu.index]
        if delay == LAST_DELAY:
            self._supervision.quarantined("vcpu", vcpu.name, why)
        else:
            log.warn(f"{vcpu.name}: {why}; trying again")
        self._delays[vcpu.index] = delay = min(max(2 * delay, FIRST_DELAY), LAST_DELAY)
        self._reactor.call_later(delay, lambda: self._respawn(vcpu))

    def patients(self) -> Iterable[Patient]:
        """For the watchdog: a vCPU that is stopped is as good as dead, and its successor goes on where it was."""
        from controller.watchdog import Patient

        for vcpu in self.all:
            if vcpu.pid:
                yield Patient("vcpu", vcpu.name, vcpu.pid, self._condemner(vcpu, vcpu.pid))

    def _condemner(self, vcpu: Vcpu, pid: int) -> Callable[[Cause, str], None]:
        def condemn(_: Cause, reason: str) -> None:
            self._verdicts[pid] = reason
            vcpu.kill()

        return condemn

    # Exits -------------------------------------------------------------------------------------------------------

    def _on_event(self) -> None:
        drain_eventfd(self._event_fd)
        for vcpu in self.all:
            exit = vcpu.take_exit()
            if exit is not None:
                self._carry_out(vcpu, exit)
        self._check_parked()

    def _carry_out(self, vcpu: Vcpu, exit: Exit) -> None:
        try:
            effects = self._effects(vcpu, exit)
        except FlotillaError as error:
            log.warn(f"{vcpu.name}: {exit.kind.value} at {exit.address:#x}: {describe(error)}")
            effects = []
        if self._machine.stopped:
            return  # power-off or reset: as on hardware, the instruction never ends
        if effects:
            self._reactor.spawn(self._finish_later(vcpu, exit, effects), f"{vcpu.name} exit")
        else:
            vcpu.finish_exit(exit.epoch)

    async def _finish_later(self, vcpu: Vcpu, exit: Exit, effects: list[Effect]) -> None:
        try:
            for effect in effects:
                await effect
        except FlotillaError as error:
            # The guest must not hang for it: the device has said what it thinks (NEEDS_RESET).
            log.error(f"{vcpu.name}: {exit.kind.value} at {exit.address:#x}: {describe(error)}")
        finally:
            if not self._closing:
                vcpu.finish_exit(exit.epoch)

    def _effects(self, vcpu: Vcpu, exit: Exit) -> list[Effect]:
        """Carry an exit out; what is left to be waited for."""
        machine = self._machine
        if exit.kind is ExitKind.PIO:
            return _access(machine.pio, exit)
        if exit.kind is ExitKind.MMIO:
            return _access(machine.mmio, exit)
        if exit.kind is ExitKind.IOAPIC_EOI:
            machine.end_of_interrupt(exit.address)
        elif exit.kind is ExitKind.SHUTDOWN:
            machine.triple_fault()
        elif exit.kind is ExitKind.SYSTEM_EVENT and exit.address == SYSTEM_EVENT_SHUTDOWN:
            machine.guest_shutdown()
        elif exit.kind is ExitKind.SYSTEM_EVENT:
            machine.triple_fault()
        elif vcpu.entry_refused and (again := self._enters_again(vcpu)):
            return [again]
        else:
            machine.vcpu_failed(vcpu.name, vcpu.failure())
        return []

    def _enters_again(self, vcpu: Vcpu) -> Effect | None:
        """What to wait for before that; None: it has been tried often enough."""
        now = time.monotonic()
        recent = [when for when in self._refused[vcpu.index] if now - when < ENTRY_SECONDS]
        if len(recent) == len(ENTRY_DELAYS):
            return None
        self._refused[vcpu.index] = [*recent, now]
        log.warn(f"{vcpu.name}: {vcpu.failure()}: the guest could not be entered; trying again")
        return sleep(self._reactor, ENTRY_DELAYS[len(recent)])

    # Pause -------------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """All vCPUs out of the guest, no exit pending. Raises Timeout after PAUSE_SECONDS (they are resumed then)."""
        parking: Future[None] = Future()
        self._parking = parking
        for vcpu in self.all:
            vcpu.request_pause()
        self._check_parked()
        try:
            await within(self._reactor, PAUSE_SECONDS, parking, "the vCPUs to park")
        except BaseException:
            self.resume()
            raise
        finally:
            self._parking = None

    def _check_parked(self) -> None:
        if self._parking is not None and all(vcpu.parked for vcpu in self.all):
            self._parking.set_result(None)

    def resume(self) -> None:
        for vcpu in self.all:
            vcpu.resume()

    # End ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill and reap every process, let go of the fds. The guest is gone when this returns."""
        if self._closing:
            return
        self._closing = True
        self._reactor.remove_reader(self._event_fd)
        for vcpu in self.all:
            if vcpu.pidfd >= 0:
                self._reactor.remove_reader(vcpu.pidfd)
                vcpu.kill()
        for vcpu in self.all:
            if vcpu.pidfd >= 0:
                vcpu.reap()
            vcpu.close()
        os.close(self._event_fd)

    def describe(self) -> list[dict[str, Any]]:
        """Rows for `vmm.fleet`. A vCPU shares the controller's address space, whose PSS is in the controller's row."""
        return [row("vcpu", vcpu.name, vcpu.pid, self._state(vcpu), vcpu.restarts) for vcpu in self.all]

    def _state(self, vcpu: Vcpu) -> str:
        """The page tells what a process does that is there; of one that is not, it tells the past."""
        account = self._supervision.accounts.get(("vcpu", vcpu.name))
        if account is not None and account.quarantine:
            return BackendState.QUARANTINED
        if not vcpu.pid:
            return BackendState.RESTARTING
        if self._supervision.often("vcpu", vcpu.name) >= OFTEN:
            return DEGRADED
        return vcpu.state.name.lower()


def _access(bus: Bus, exit: Exit) -> list[Effect]:
    """One access, or each element of a string instruction, all at the same address."""
    effects: list[Effect] = []
    found = bus.find(exit.address)
    if found is None:
        return effects
    device, offset = found
    size, data = exit.size, exit.data
    read: Callable[[int, int], int | None] = device.read
    for start in range(0, size * exit.repeats, size):
        if exit.is_write:
            effect = device.write(offset, size, int.from_bytes(data[start : start + size], "little"))
            if effect is not None:
                effects.append(effect)
        elif (value := read(offset, size)) is not None:
            data[start : start + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return effects
