"""Routes, irqfds and ioeventfds on a real KVM VM: what is injected, and what no longer leaves the kernel."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator

import pytest

from controller.devices.ioapic import Ioapic
from controller.devices.state import Fields
from controller.irq import IrqRouting
from controller.pci.msix import ENABLE, Msix
from shared import kvm
from shared.memory import GuestMemory
from shared.reactor import drain_eventfd
from tests.controller.fakes import Driver, FakeDevice, finish, machine

pytestmark = pytest.mark.probe

APIC_SPIV, APIC_IRR = 0xF0, 0x200
DEADLINE = 10.0
EXIT_PORT = 0x80


class Guest:
    """A VM with one vCPU whose LAPIC takes interrupts."""

    def __init__(self) -> None:
        self.kvm = kvm.Kvm()
        self.vm = self.kvm.create_vm()
        self.vm.enable_split_irqchip(24)
        self.vcpu = self.vm.create_vcpu(0)
        lapic = kvm.kvm_lapic_state()
        kvm.ioctl(self.vcpu, kvm.KVM_GET_LAPIC, lapic)
        lapic.regs[APIC_SPIV + 1] = 1  # software enable
        kvm.ioctl(self.vcpu, kvm.KVM_SET_LAPIC, lapic)

    def requested(self) -> set[int]:
        """Vectors in the LAPIC's IRR."""
        lapic = kvm.kvm_lapic_state()
        kvm.ioctl(self.vcpu, kvm.KVM_GET_LAPIC, lapic)
        return {v for v in range(256) if lapic.regs[APIC_IRR + 16 * (v // 32) + v % 32 // 8] >> v % 8 & 1}

    def wait_for(self, *vectors: int) -> None:
        """Until exactly these are requested; an irqfd whose eventfd holds a count already injects a little later."""
        until(lambda: self.requested() == set(vectors), f"vectors {vectors}, not {self.requested()}")

    def close(self) -> None:
        os.close(self.vcpu)
        self.vm.close()
        self.kvm.close()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        os.sched_yield()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def program(msix: Msix, vector: int, data: int, *, masked: bool = False) -> None:
    msix.write_table(16 * vector, 8, 0xFEE0_0000)
    msix.write_table(16 * vector + 8, 8, int(masked) << 32 | data)


def test_an_unmasked_vector_reaches_the_lapic_and_a_masked_one_when_it_is_unmasked(guest: Guest) -> None:
    msix = Msix(3, IrqRouting(guest.vm))
    try:
        program(msix, 0, 0x50)
        program(msix, 1, 0x51, masked=True)
        program(msix, 2, 0x52)
        msix.set_control(ENABLE)
        msix.signal(1)
        msix.signal(0)
        guest.wait_for(0x50)
        assert msix.read_pba(0, 8) == 0b10
        assert guest.requested() == {0x50}, "draining into the PBA injects nothing"
        msix.write_table(16 + 12, 4, 0)
        guest.wait_for(0x50, 0x51)
        assert msix.read_pba(0, 8) == 0
        msix.signal(2)
        guest.wait_for(0x50, 0x51, 0x52)
    finally:
        msix.close()


def test_a_signal_that_came_before_the_irqfd_is_not_lost(guest: Guest) -> None:
    msix = Msix(1, IrqRouting(guest.vm))
    try:
        msix.signal(0)  # MSI-X is disabled
        program(msix, 0, 0x60)
        msix.set_control(ENABLE)
        guest.wait_for(0x60)
    finally:
        msix.close()


def test_masking_stops_injection_and_keeps_what_was_injected(guest: Guest) -> None:
    msix = Msix(1, IrqRouting(guest.vm))
    try:
        program(msix, 0, 0x70)
        msix.set_control(ENABLE)
        msix.signal(0)
        msix.write_table(12, 4, 1)
        guest.wait_for(0x70)
        msix.write_table(8, 4, 0x71)
        msix.signal(0)
        assert msix.read_pba(0, 8) == 1
        assert guest.requested() == {0x70}
        msix.write_table(12, 4, 0)
        guest.wait_for(0x70, 0x71)
    finally:
        msix.close()


def test_no_message_of_a_guest_takes_the_table_from_others(guest: Guest) -> None:
    routing = IrqRouting(guest.vm)
    good, bad = Msix(1, routing), Msix(1, routing)
    try:
        program(good, 0, 0x80)
        good.set_control(ENABLE)
        for offset, value in ((0, 0xFFFF_FFFF), (4, 0xFFFF_FFFF), (8, 0xFFFF_FFFF), (12, 0)):
            bad.write_table(offset, 4, value)
        bad.set_control(ENABLE)
        bad.signal(0)
        good.signal(0)
        until(lambda: 0x80 in guest.requested(), "vector 0x80")
    finally:
        good.close()
        bad.close()


def test_restored_vectors_inject(guest: Guest) -> None:
    source = Msix(2, IrqRouting(guest.vm))
    program(source, 0, 0x90)
    program(source, 1, 0x91, masked=True)
    source.set_control(ENABLE)
    source.signal(1)
    state = source.save()
    source.close()
    other = Guest()
    msix = Msix(2, IrqRouting(other.vm))
    try:
        msix.load(Fields("copy", state))
        msix.attach()
        msix.signal(0)
        other.wait_for(0x90)
        msix.write_table(16 + 12, 4, 0)
        other.wait_for(0x90, 0x91)
    finally:
        msix.close()
        other.close()


def test_ioapic_pins_inject_like_vectors(guest: Guest) -> None:
    ioapic = Ioapic(IrqRouting(guest.vm))
    try:
        for pin, data in ((4, 0x34), (13, 0x1_003D)):
            ioapic.write(0, 4, 0x10 + 2 * pin)
            ioapic.write(0x10, 4, data)
        os.eventfd_write(ioapic.eventfd(4), 1)  # as a vCPU loop does it
        ioapic.pulse(13)
        guest.wait_for(0x34)
        ioapic.write(0x10, 4, 0x3D)
        guest.wait_for(0x34, 0x3D)
    finally:
        ioapic.close()


def run_store(guest: Guest, address: int) -> int:
    """Let the guest store a word at `address`, then write to EXIT_PORT. The reason of the first exit."""
    memory = GuestMemory.create(2 << 20)
    (region,) = memory.regions
    guest.vm.set_memory(0, 0, region.size, region.address)
    # movw $0, address; out %al, $0x80
    memory.write(
        0x1000, b"\x66\xc7\x05" + address.to_bytes(4, "little") + b"\x00\x00" + b"\xe6" + bytes((EXIT_PORT,))
    )
    sregs = kvm.kvm_sregs()
    kvm.ioctl(guest.vcpu, kvm.KVM_GET_SREGS, sregs)
    for name, kind in (("cs", 0xB), *((name, 3) for name in ("ds", "es", "fs", "gs", "ss"))):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 8 if name == "cs" else 16
        segment.type, segment.present, segment.dpl, segment.db = kind, 1, 0, 1
        segment.s, segment.l, segment.g, segment.unusable = 1, 0, 1, 0
    sregs.cr0 |= 1
    kvm.ioctl(guest.vcpu, kvm.KVM_SET_SREGS, sregs)
    regs = kvm.kvm_regs()
    regs.rip, regs.rflags = 0x1000, 2
    kvm.ioctl(guest.vcpu, kvm.KVM_SET_REGS, regs)
    with mmap.mmap(guest.vcpu, guest.kvm.vcpu_mmap_size()) as mapping:
        run = kvm.kvm_run.from_buffer(mapping)
        try:
            kvm.ioctl(guest.vcpu, kvm.KVM_RUN)
            return int(run.exit_reason)
        finally:
            del run
            guest.vm.set_memory(0, 0, 0, 0)
            memory.close()


def test_a_kick_of_a_device_that_does_not_run_is_an_exit(guest: Guest) -> None:
    with machine(guest.vm) as made:
        made.segment.add(made.transport(), wide=False)
        assert run_store(guest, 0xE7F8_6000) == kvm.KVM_EXIT_MMIO


@pytest.mark.parametrize("queue", [0, 1])
def test_a_kick_stays_in_the_kernel_and_follows_the_bar(guest: Guest, queue: int) -> None:
    device = FakeDevice(queue_sizes=(128, 128))
    with machine(guest.vm) as made:
        transport = made.transport(device)
        made.segment.add(transport, wide=False)
        Driver(transport).start()
        kicks = [item.kick_fd for item in device.queues]
        assert run_store(guest, 0xE7F8_6000 + 4 * queue) == kvm.KVM_EXIT_IO
        assert [drain_eventfd(fd) for fd in kicks] == [int(queue == n) for n in (0, 1)]
        at = made.config_address(1)
        finish(made.mmio.write(at + 4, 2, 2))
        finish(made.mmio.write(at + 0x10, 4, 0xD000_0000))
        assert run_store(guest, 0xD000_6000 + 4 * queue) == kvm.KVM_EXIT_IO
        assert [drain_eventfd(fd) for fd in kicks] == [int(queue == n) for n in (0, 1)]
        assert run_store(guest, 0xE7F8_6000 + 4 * queue) == kvm.KVM_EXIT_MMIO, (
            "nothing listens at the old place"
        )


def test_everything_registered_goes_again(guest: Guest) -> None:
    """The same addresses and GSIs can be registered a second time, which KVM would refuse with EEXIST."""
    for _ in range(2):
        with machine(guest.vm) as made:
            device = FakeDevice(queue_sizes=(128, 128))
            transport = made.transport(device)
            made.segment.add(transport, wide=False)
            Driver(transport).start()
            assert device.log == ["activate"]
            assert len(transport._ioeventfds) == 2
