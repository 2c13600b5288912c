"""One vCPU process, seen from the controller: start, pause, its exits, its death.

    spawn ─▶ RUNNING ⇄ EXITING (take_exit … finish_exit)         killed at any point: reap, spawn, it goes on
                │  ▲
       request_pause resume
                ▼  │
              PARKED

All of it must be called from the controller's main thread: the process dies with the thread that made it. `event_fd` is
one eventfd for all vCPUs of a VM; it is written when a vCPU has an exit for us or has parked.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from enum import Enum

from shared import kvm
from shared.errors import HostError
from shared.linux import check, libc
from shared.records import NamedTuple
from shared.seccomp import Forbidden
from vcpu_worker.layout import (
    COMMAND_PAUSE,
    EXIT_SENTINEL,
    Finisher,
    Stat,
    State,
    StatePages,
    VcpuPage,
    VcpuStart,
    library,
)
from vcpu_worker.seccomp import vcpu_filter

STACK_SIZE = 64 << 10
KICK_SIGNAL = signal.SIGRTMIN


class ExitKind(Enum):
    PIO = "pio"
    MMIO = "mmio"
    IOAPIC_EOI = "ioapic-eoi"
    SHUTDOWN = "shutdown"  # triple fault
    SYSTEM_EVENT = "system-event"
    FAILED = "failed"  # KVM_RUN can't go on: `address` is the reason


class Exit(NamedTuple):
    """An exit for the controller. `data` is the access's bytes in kvm_run: what a write carries, what a read gets.

    A string instruction has `repeats` elements of `size` bytes, all at the same port.
    """

    epoch: int
    kind: ExitKind
    is_write: bool = False
    address: int = 0
    size: int = 0
    repeats: int = 1
    data: memoryview = memoryview(b"")


class Vcpu:
    """`index` is the vCPU's number, `apic_id` its KVM id. Owns vCPU fd and kvm_run mapping. Raises HostError."""

    def __init__(
        self,
        vm: kvm.KvmVm,
        pages: StatePages,
        index: int,
        apic_id: int,
        event_fd: int,
        forbidden: Forbidden | None = Forbidden.KILL,
    ) -> None:
        """`forbidden`: of its seccomp filter; None leaves the process without one."""
        self.index = index
        self.page: VcpuPage = pages.vcpu(index)
        try:
            self.fd = vm.create_vcpu(apic_id)
        except OSError as error:
            raise HostError(f"vcpu{index}: KVM made no vCPU: {error.strerror}") from error
        try:
            self._run_map = mmap.mmap(self.fd, vm.kvm.vcpu_mmap_size())
        except OSError as error:
            os.close(self.fd)
            raise HostError(f"vcpu{index}: its state page can't be mapped: {error.strerror}") from error
        self._run_view = memoryview(self._run_map)
        self.run = kvm.kvm_run.from_buffer(self._run_map)
        # Nothing is pending in a vCPU that has never run.
        self.run.exit_reason = EXIT_SENTINEL
        self._stack = mmap.mmap(-1, STACK_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        stack = ctypes.addressof(ctypes.c_char.from_buffer(self._stack))
        # Its lowest page is a guard: an overflow is a SIGSEGV of this process, not a change in the controller's heap.
        check(libc.mprotect(ctypes.c_void_p(stack), mmap.PAGESIZE, 0), "mprotect")
        self._seccomp = vcpu_filter(forbidden) if forbidden is not None else None
        self._start = VcpuStart(
            page=ctypes.addressof(self.page),
            run=ctypes.addressof(self.run),
            machine=ctypes.addressof(pages.machine),
            seccomp=ctypes.addressof(self._seccomp) if self._seccomp is not None else 0,
            stack=stack,
            stack_size=STACK_SIZE,
            vcpu_fd=self.fd,
            event_fd=event_fd,
            index=index,
            kick_signal=KICK_SIGNAL,
            name=f"vcpu{index}".encode(),
        )
        self._begun = 0  # epoch of the exit that take_exit() gave out last
        self._requests = 0
        self.pid = 0
        self.pidfd = -1
        self.starts = 0

    @property
    def name(self) -> str:
        return f"vcpu{self.index}"

    @property
    def state(self) -> State:
        return State(self.page.state)

    @property
    def restarts(self) -> int:
        return max(self.starts - 1, 0)

    @property
    def births(self) -> int:
        """How many of its processes have come as far as the guest."""
        return int(self.page.stats[Stat.STARTS])

    def spawn(self) -> None:
        """Start the process, or its successor after reap(). Raises HostError."""
        pid = library().vcpu_spawn(ctypes.addressof(self._start))
        if pid < 0:
            raise HostError(f"{self.name}: clone3 failed: {os.strerror(-pid)}") from OSError(-pid, os.strerror(-pid))
        self.pid, self.pidfd = pid, self._start.pidfd
        os.set_inheritable(self.pidfd, False)
        self.starts += 1

    def reap(self) -> int:
        """Wait for a process that has ended; its status. Only then may a successor use the same stack and pages."""
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.pid, self.pidfd = 0, -1
        return result.si_status if result else 0

    def kill(self) -> None:
        if self.pidfd >= 0:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def request_pause(self) -> None:
        """Ask it to leave the guest and park. The order matters: a kick that comes before KVM_RUN is entered is only
        noticed by immediate_exit, and the process looks at the command only after KVM_RUN has been interrupted."""
        self._requests += 2
        library().vcpu_command(ctypes.addressof(self.page), self._requests | COMMAND_PAUSE)
        self.run.immediate_exit = 1
        self.kick()

    def kick(self) -> None:
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, KICK_SIGNAL)
            except ProcessLookupError:
                pass  # it was killed; its successor sees command and immediate_exit

    @property
    def parked(self) -> bool:
        """Parked for the present request: out of KVM_RUN, nothing pending, until resume()."""
        command = self.page.command
        return bool(command & COMMAND_PAUSE and self.page.parked == command and self.page.state == State.PARKED)

    def resume(self) -> None:
        """Let it enter the guest again."""
        self._requests += 2
        self.run.immediate_exit = 0
        library().vcpu_command(ctypes.addressof(self.page), self._requests)

    def take_exit(self) -> Exit | None:
        """The exit that waits for us, once; None when there is none or it is being worked on already."""
        epoch = self.page.handoff
        if epoch in (self._begun, self.page.done):
            return None
        self._begun = epoch
        return self._decode(epoch)

    def finish_exit(self, epoch: int) -> None:
        """The exit's effect is done and its data in place: the vCPU may go on."""
        library().vcpu_finish(ctypes.addressof(self.page), epoch)

    def _decode(self, epoch: int) -> Exit:
        run = self.run
        if self.page.error:
            return Exit(epoch, ExitKind.FAILED, address=self.page.error)
        reason = run.exit_reason
        if reason == kvm.KVM_EXIT_IO:
            io = run.io
            data = self._run_view[io.data_offset : io.data_offset + io.size * io.count]
            return Exit(epoch, ExitKind.PIO, io.direction == kvm.KVM_EXIT_IO_OUT, io.port, io.size, io.count, data)
        if reason == kvm.KVM_EXIT_MMIO:
            mmio = run.mmio
            start = kvm.kvm_run.exit.offset + kvm.kvm_run_mmio.data.offset
            data = self._run_view[start : start + mmio.len]
            return Exit(epoch, ExitKind.MMIO, bool(mmio.is_write), mmio.phys_addr, mmio.len, 1, data)
        if reason == kvm.KVM_EXIT_IOAPIC_EOI:
            return Exit(epoch, ExitKind.IOAPIC_EOI, address=run.eoi_vector)
        if reason == kvm.KVM_EXIT_SHUTDOWN:
            return Exit(epoch, ExitKind.SHUTDOWN)
        if reason == kvm.KVM_EXIT_SYSTEM_EVENT:
            return Exit(epoch, ExitKind.SYSTEM_EVENT, address=run.system_event_type)
        return Exit(epoch, ExitKind.FAILED, address=reason)

    @property
    def entry_refused(self) -> bool:
        """Of a FAILED exit: KVM did not get the CPU into the guest. Not one instruction of it has run."""
        return not self.page.error and bool(self.run.exit_reason == kvm.KVM_EXIT_FAIL_ENTRY)

    def failure(self) -> str:
        """What a FAILED exit means, for the log."""
        if self.page.error:
            return f"KVM_RUN: {os.strerror(self.page.error)}"
        reason = self.run.exit_reason
        if reason == kvm.KVM_EXIT_INTERNAL_ERROR:
            internal = self.run.internal
            words = " ".join(f"{word:#x}" for word in internal.data[: min(internal.ndata, 16)])
            return f"KVM internal error {internal.suberror} ({words})"
        return f"KVM exit {reason}, hardware reason {self.run.hardware_reason:#x}"

    def stats(self) -> dict[str, int]:
        return {stat.name.lower(): int(self.page.stats[stat]) for stat in Stat}

    def exits(self) -> dict[str, list[int]]:
        """By who finished them: a count for each number of KVM's reasons."""
        return {finisher.name.lower(): list(self.page.exits[finisher]) for finisher in Finisher}

    def close(self) -> None:
        """After the process has been reaped: let go of fd and mappings."""
        self._run_view.release()
        self.run = kvm.kvm_run()
        try:
            self._run_map.close()
        except BufferError:
            pass  # an Exit still holds a view; the mapping goes with it
        os.close(self.fd)


