"""A VM small enough to be taken apart: one memslot, a few toy ports, no reactor, and a guest given in assembler.

The guests report what they see by the ports below; a guest that finds a wrong value says so on PORT_WRONG.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shared import kvm
from shared.memory import GuestMemory
from vcpu_worker import layout
from vcpu_worker.process import Exit, ExitKind, Vcpu

RAM_SIZE = 1 << 20
ENTRY = 0x1000
ECAM_BASE, ECAM_SIZE = 0xE800_0000, 0x1000_0000
TOY_MMIO = 0xD000_0000  # claimed by the toy device: dwords read are numbered, writes are kept
PORT_TRANSMIT = 0x3F8
PORT_COUNT = 0x500  # every dword read is one more than the last, per vCPU
PORT_ECHO = 0x504  # what is written is kept, per vCPU
PORT_WRONG = 0x508
PORT_BYTES = 0x50C  # every byte read is one more than the last (string instructions); writes are kept
HOST_BRIDGE = 0x0D57_8086
DYNAMIC_DWORD = 4  # of slot 3: the controller answers

# Every kind of exit, the order of bytes and values checked by the guest itself. esi: number of the round.
ALL_EXITS = """
    .code32
    xor %esi, %esi
round:
    mov %esi, %eax
    mov $0x3f8, %dx
    out %al, %dx                    # native: transmit
    mov $0x3fd, %dx
    in %dx, %al                     # native: line status
    cmp $0x60, %al
    jne wrong
    mov $0x80000000, %eax           # host bridge, dword 0
    mov $0xcf8, %dx
    out %eax, %dx                   # native: latch
    in %dx, %eax
    cmp $0x80000000, %eax
    jne wrong
    mov $0xcfe, %dx
    in %dx, %ax                     # native: configuration space by port
    cmp $0x0d57, %ax
    jne wrong
    mov 0xe8000000, %eax            # native: by ECAM
    cmp $0x0d578086, %eax
    jne wrong
    mov 0xe8010000, %eax            # native: slot 2, nothing there
    cmp $-1, %eax
    jne wrong
    mov 0xe8018010, %eax            # handed over: the dynamic dword
    cmp $0x5a5a5a5a, %eax
    jne wrong
    mov $0x80, %dx
    out %al, %dx                    # native: ignored
    mov $0x500, %dx
    in %dx, %eax                    # handed over: a numbered read must be seen once
    cmp %esi, %eax
    jne wrong
    mov $0x504, %dx
    out %eax, %dx                   # handed over: a write must happen once
    movl %esi, 0xd0000000
    mov 0xd0000000, %eax
    cmp %esi, %eax
    jne wrong
    mov $8, %ecx
    mov $0x2000, %edi
    mov $0x50c, %dx
    rep insb                        # handed over: more than one element, RAM is written on re-entry
    mov $8, %ecx
    xchg %esi, %ebx
    mov $0x2000, %esi
    rep outsb
    xchg %esi, %ebx
    inc %esi
    jmp round
wrong:
    mov $0x508, %dx
    out %eax, %dx
    mov %esi, %eax
    out %eax, %dx
    hlt
"""

# Only what must keep its order: bytes on the transmit ring, esi bytes so far.
TRANSMIT = """
    .code32
    xor %eax, %eax
    mov $0x3f8, %dx
again:
    out %al, %dx
    inc %eax
    jmp again
"""

# The same on two vCPUs: the high bit is the vCPU's, taken from ebx.
TRANSMIT_TAGGED = """
    .code32
    xor %ecx, %ecx
    mov $0x3f8, %dx
again:
    mov %ecx, %eax
    and $0x7f, %al
    or %bl, %al
    out %al, %dx
    inc %ecx
    jmp again
"""

# Never exits by itself.
SPIN = """
    .code32
again:
    inc %eax
    jmp again
"""


def assemble(source: str) -> bytes:
    """A flat 32-bit image that begins at ENTRY."""
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "guest"
        stem.with_suffix(".S").write_text(source)
        compile_it = ["gcc", "-m32", "-c", "-o", f"{stem}.o", f"{stem}.S"]
        subprocess.run(compile_it, check=True, timeout=20)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", f"{stem}.o", f"{stem}.bin"], check=True, timeout=20)
        return stem.with_suffix(".bin").read_bytes()


def flat_segment(selector: int, kind: int) -> kvm.kvm_segment:
    return kvm.kvm_segment(0, 0xFFFF_FFFF, selector, kind, present=1, db=1, s=1, g=1)


class ToyDevices:
    """The controller's side of the toy ports, and a record of what was written."""

    def __init__(self, vcpus: int) -> None:
        self.counters = [0] * vcpus
        self.echoes: list[list[int]] = [[] for _ in range(vcpus)]
        self.mmio_writes: list[list[int]] = [[] for _ in range(vcpus)]
        self.mmio_counters = [0] * vcpus
        self.wrong: list[int] = []
        self.bytes_given = 0
        self.bytes_taken = bytearray()
        self.other: list[tuple[ExitKind, int, int, bool]] = []

    def carry_out(self, index: int, exit: Exit) -> None:
        data = exit.data
        value = int.from_bytes(data, "little")
        if exit.kind is ExitKind.PIO and exit.address == PORT_COUNT and not exit.is_write:
            data[:] = self.counters[index].to_bytes(4, "little")
            self.counters[index] += 1
        elif exit.kind is ExitKind.PIO and exit.address == PORT_ECHO:
            self.echoes[index].append(value)
        elif exit.kind is ExitKind.PIO and exit.address == PORT_WRONG:
            self.wrong.append(value)
        elif exit.kind is ExitKind.PIO and exit.address == PORT_BYTES:
            self._string(exit)
        elif exit.kind is ExitKind.MMIO and exit.address == TOY_MMIO:
            if exit.is_write:
                self.mmio_writes[index].append(value)
            else:
                data[:] = self.mmio_counters[index].to_bytes(4, "little")
                self.mmio_counters[index] += 1
        elif exit.kind is ExitKind.MMIO and exit.address == ECAM_BASE + (3 << 15) + 4 * DYNAMIC_DWORD:
            data[:] = b"\x5a" * 4
        else:
            self.other.append((exit.kind, exit.address, exit.size, exit.is_write))

    def _string(self, exit: Exit) -> None:
        for at in range(exit.size * exit.repeats):
            if exit.is_write:
                self.bytes_taken.append(exit.data[at])
            else:
                exit.data[at] = self.bytes_given & 0xFF
                self.bytes_given += 1


class Rig:
    """A VM with `vcpus` vCPUs that all begin at ENTRY; ebx is the vCPU's number shifted left by seven."""

    def __init__(self, source: str, vcpus: int = 1, *, started: bool = True) -> None:
        self.kvm = kvm.Kvm()
        self.vm = self.kvm.create_vm()
        self.vm.set_identity_map_address(0xFFFB_C000)
        self.vm.set_tss_address(0xFFFB_D000)
        self.vm.enable_split_irqchip(24)
        self.memory = GuestMemory.create(RAM_SIZE)
        self.memory.write(ENTRY, assemble(source))
        for region in self.memory.regions:
            self.vm.set_memory(region.slot, region.gpa, region.size, region.address)
        self.shared = mmap.mmap(-1, layout.state_size(vcpus))
        self.pages = layout.StatePages(self.shared, vcpus)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.vcpus = [Vcpu(self.vm, self.pages, index, index, self.event_fd) for index in range(vcpus)]
        self.devices = ToyDevices(vcpus)
        self.output = bytearray()
        self.kills = 0
        self.overflows = 0
        self.drains = True
        self.held: list[Exit] = []
        self.hold: Callable[[Vcpu, Exit], bool] = lambda vcpu, exit: False  # True: leave the exit unfinished
        self._set_up_pages()
        for vcpu in self.vcpus:
            self.set_registers(vcpu)
            if started:
                vcpu.spawn()

    def _set_up_pages(self) -> None:
        uart, pci = self.pages.uart, self.pages.pci
        uart.lsr = 0x60
        uart.present = 1
        pci.ecam_base, pci.ecam_size = ECAM_BASE, ECAM_SIZE
        pci.config[0][0] = HOST_BRIDGE
        pci.set_dynamic(3, DYNAMIC_DWORD)
        pci.present = 1 << 0 | 1 << 3
        pci.enabled = 1

    def set_registers(self, vcpu: Vcpu) -> None:
        """Flat 32-bit protected mode, paging off, as the PVH entry has it."""
        kvm.ioctl(vcpu.fd, kvm.KVM_SET_CPUID2, kvm.cpuid_entries(self.kvm.supported_cpuid()))
        self.set_mp_state(vcpu, kvm.KVM_MP_STATE_RUNNABLE)
        sregs = kvm.kvm_sregs()
        kvm.ioctl(vcpu.fd, kvm.KVM_GET_SREGS, sregs)
        sregs.cs = flat_segment(0x08, 0xB)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, flat_segment(0x10, 3))
        sregs.cr0 |= 1
        kvm.ioctl(vcpu.fd, kvm.KVM_SET_SREGS, sregs)
        kvm.ioctl(vcpu.fd, kvm.KVM_SET_REGS, kvm.kvm_regs(rip=ENTRY, rflags=2, rbx=vcpu.index << 7))

    def set_mp_state(self, vcpu: Vcpu, state: int) -> None:
        kvm.ioctl(vcpu.fd, kvm.KVM_SET_MP_STATE, kvm.kvm_mp_state(state))

    def regs(self, vcpu: Vcpu) -> kvm.kvm_regs:
        regs = kvm.kvm_regs()
        kvm.ioctl(vcpu.fd, kvm.KVM_GET_REGS, regs)
        return regs

    # The controller's loop -------------------------------------------------------------------------------------------

    def serve(self, timeout: float) -> bool:
        """One round: exits, transmitted bytes, deaths. False when nothing happened within `timeout` seconds."""
        poll = select.poll()
        poll.register(self.event_fd, select.POLLIN)
        for vcpu in self.vcpus:
            if vcpu.pidfd >= 0:
                poll.register(vcpu.pidfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout * 1000)}
        if self.event_fd in ready:
            os.eventfd_read(self.event_fd)
        for vcpu in self.vcpus:
            self.take(vcpu)
            if vcpu.pidfd in ready:
                self.succeed(vcpu)
        if self.drains:
            self.output += self.pages.uart.drain()
        return bool(ready)

    def take(self, vcpu: Vcpu) -> None:
        """Carry out an exit that waits, unless `hold` says otherwise."""
        exit = vcpu.take_exit()
        if exit is not None:
            if self.hold(vcpu, exit):
                self.held.append(exit)
            else:
                self.carry_out(vcpu, exit)
                vcpu.finish_exit(exit.epoch)

    def carry_out(self, vcpu: Vcpu, exit: Exit) -> None:
        if exit.kind is ExitKind.PIO and exit.address == PORT_TRANSMIT and exit.is_write:
            self.overflows += 1  # the ring was full; what is in it comes first
            self.output += self.pages.uart.drain() + bytes(exit.data)
        else:
            self.devices.carry_out(vcpu.index, exit)

    def succeed(self, vcpu: Vcpu) -> None:
        """Bury a killed vCPU process and start its successor."""
        status = vcpu.reap()
        assert status == signal.SIGKILL, f"{vcpu.name} ended by itself: {status}"
        self.kills += 1
        vcpu.spawn()

    def run_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"the guest got stuck: {self.describe()}"
            self.serve(0.05)

    def pause(self) -> None:
        for vcpu in self.vcpus:
            vcpu.request_pause()
        self.run_until(lambda: all(vcpu.parked for vcpu in self.vcpus))

    def resume(self) -> None:
        for vcpu in self.vcpus:
            vcpu.resume()

    def describe(self) -> str:
        return "; ".join(
            f"{v.name} {v.state.name} epoch {v.page.epoch} handoff {v.page.handoff} done {v.page.done}"
            f" reason {v.run.exit_reason:#x} error {v.page.error} wrong {self.devices.wrong}"
            for v in self.vcpus
        )

    def violations(self) -> list[str]:
        """What was lost, doubled, out of order or seen wrong by the guest: nothing, whatever was killed."""
        devices, found = self.devices, []
        if devices.wrong:
            found.append(f"the guest saw {devices.wrong}")
        if devices.other:
            found.append(f"exits that nobody expected: {devices.other[:3]}")
        counted = {"output": list(self.output), "string": list(devices.bytes_taken)}
        for index in range(len(self.vcpus)):
            counted[f"echo {index}"] = devices.echoes[index]
            counted[f"mmio {index}"] = devices.mmio_writes[index]
        for what, values in counted.items():
            modulus = 256 if what in ("output", "string") else 1 << 32
            if what in ("output", "string") and len(self.vcpus) > 1:
                continue  # the vCPUs' bytes are mixed
            if wrong := first_wrong(values, modulus):
                found.append(f"{what}: {wrong}")
        return found

    def check(self) -> None:
        violations = self.violations()
        assert not violations, "; ".join(violations)

    def close(self) -> None:
        for vcpu in self.vcpus:
            if vcpu.pidfd >= 0:
                vcpu.kill()
                vcpu.reap()
            self.held.clear()
            vcpu.close()
        os.close(self.event_fd)
        self.vm.close()
        self.kvm.close()
        self.memory.close()


@contextlib.contextmanager
def rig(source: str, vcpus: int = 1, *, started: bool = True) -> Iterator[Rig]:
    machine = Rig(source, vcpus, started=started)
    try:
        yield machine
    finally:
        machine.close()


def first_wrong(values: Iterable[int], modulus: int) -> str:
    """Where a sequence is not 0, 1, 2 … modulo `modulus`; "" when it is."""
    for at, value in enumerate(values):
        if value != at % modulus:
            return f"number {at} is {value}, expected {at % modulus}"
    return ""


def native_variant(folder: Path, old: str, new: str, *flags: str) -> ctypes.CDLL:
    """vcpu.c and once.h with a piece of text replaced, for proving that a test notices, and further compiler flags."""
    from shared import native

    loop = native.LOOPS["vcpu"]
    path = Path(native.ROOT) / loop.source
    source = path.read_text().replace('#include "once.h"', path.with_name("once.h").read_text())
    assert source.count(old) == 1, f"vcpu.c has {source.count(old)} times: {old}"
    changed = folder / "vcpu.c"
    changed.write_text(source.replace(old, new))
    library = folder / "vcpu.so"
    include = f"-I{Path(native.ROOT) / 'vcpu_worker'}"
    command: list[Any] = ["gcc", "-std=gnu11", *loop.cflags, *flags, include, "-o", library, changed]
    subprocess.run(command, check=True, timeout=30)
    return layout.declare(ctypes.CDLL(str(library)))
