"""The state at the first instruction (Cloud Hypervisor's machine page, 5.4 and 5.5), also as KVM takes it."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from controller.machine import regs
from controller.machine.acpi.description import Description
from controller.machine.acpi.tables import write_tables
from controller.machine.boot import BootEntry, BootProtocol, load
from controller.machine.cpuid import common_cpuid, from_kvm
from controller.machine.layout import KVM_IDENTITY_MAP_START, KVM_TSS_START, Layout
from controller.machine.topology import Topology
from shared import kvm
from shared.kvm import Kvm, KvmVm, kvm_lapic_state, kvm_segment, kvm_sregs
from shared.memory import GuestMemory
from tests.controller.machine import images


def fields(segment: kvm_segment) -> dict[str, int]:
    return {name: getattr(segment, name) for name, *_ in kvm_segment._fields_ if name != "padding"}


CODE = {
    "base": 0, "limit": 0xFFFF_FFFF, "selector": 0x08, "type": 0xB, "present": 1, "dpl": 0, "db": 1, "s": 1, "l": 0,
    "g": 1, "avl": 0, "unusable": 0,
}  # fmt: skip
DATA = CODE | {"selector": 0x10, "type": 0x3}
TASK = CODE | {"limit": 0x67, "selector": 0x18, "db": 0, "s": 0, "g": 0}


def test_descriptor_tables_byte_for_byte(memory: GuestMemory) -> None:
    memory.write(0x520, b"\xff" * 8)
    regs.write_descriptor_tables(memory)
    assert memory.read(0x500, 40) == struct.pack(
        "<5Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067, 0
    )


def test_segments_are_what_their_descriptors_say() -> None:
    sregs = kvm_sregs(efer=0, apic_base=0xFEE0_0900, cr4=0x20, cr3=5)
    regs.set_boot_sregs(sregs)
    assert fields(sregs.cs) == CODE
    assert all(fields(getattr(sregs, name)) == DATA for name in ("ds", "es", "fs", "gs", "ss"))
    assert fields(sregs.tr) == TASK
    assert fields(regs.segment(0))["unusable"] == 1
    assert (sregs.gdt.base, sregs.gdt.limit) == (0x500, 0x1F)
    assert (sregs.idt.base, sregs.idt.limit) == (0x520, 7)
    assert (sregs.cr0, sregs.cr4, sregs.efer, sregs.apic_base) == (1, 0, 0, 0xFEE0_0900)


def test_x2apic_mode_only_above_id_254() -> None:
    assert not regs.needs_x2apic(Topology.flat(255))
    assert regs.needs_x2apic(Topology.flat(256))
    assert regs.needs_x2apic(Topology(1, 129, 1, 1)) is False
    assert regs.needs_x2apic(Topology(1, 65, 1, 3))
    sregs = kvm_sregs(apic_base=0xFEE0_0900)
    regs.set_boot_sregs(sregs, x2apic=True)
    assert sregs.apic_base == 0xFEE0_0D00


def test_general_registers_of_both_protocols() -> None:
    pvh = regs.boot_regs(BootEntry(BootProtocol.PVH, rip=0x100_0370, rbx=0x6000))
    packed = regs.boot_regs(BootEntry(BootProtocol.BZIMAGE32, rip=0x10_0000, rsi=0x7000, rsp=0x8FF0))
    for state, expected in (
        (pvh, {"rip": 0x100_0370, "rbx": 0x6000}),
        (packed, {"rip": 0x10_0000, "rsi": 0x7000, "rsp": 0x8FF0}),
    ):
        found = {name: getattr(state, name) for name, *_ in state._fields_ if getattr(state, name)}
        assert found == expected | {"rflags": 2}


def test_lint_pins_get_delivery_modes_and_keep_the_rest() -> None:
    lapic = kvm_lapic_state()
    struct.pack_into("<I", lapic.regs, 0x350, 0x1_0000)
    struct.pack_into("<I", lapic.regs, 0x360, 0x1_07FF)
    regs.set_lint(lapic)
    assert struct.unpack_from("<I", lapic.regs, 0x350) == (0x1_0700,)
    assert struct.unpack_from("<I", lapic.regs, 0x360) == (0x1_04FF,)


def test_fpu_and_msrs() -> None:
    fpu = regs.boot_fpu()
    assert (fpu.fcw, fpu.mxcsr) == (0x37F, 0x1F80)
    assert dict(regs.BOOT_MSRS) == {
        0x174: 0, 0x175: 0, 0x176: 0, 0xC0000081: 0, 0xC0000082: 0, 0xC0000083: 0, 0xC0000084: 0, 0xC0000102: 0,
        0x10: 0, 0x1A0: 1, 0x2FF: 0x806,
    }  # fmt: skip


# Write the start info's magic and the second half of the RSDP's signature to port 0x3F8, then 'K', then halt.
GUEST = bytes.fromhex(
    "66baf803"  # mov dx, 0x3f8
    "8b03ef"  # mov eax, [ebx]; out dx, eax
    "8b43208b00ef"  # mov eax, [ebx + 32]; mov eax, [eax]; out dx, eax
    "b04bee"  # mov al, 'K'; out dx, al
    "f4"  # hlt
)  # fmt: skip


@pytest.fixture
def vm(memory: GuestMemory) -> Iterator[KvmVm]:
    with ExitStack() as stack:
        host = Kvm()
        stack.callback(host.close)
        machine = host.create_vm()
        stack.callback(machine.close)
        machine.set_tss_address(KVM_TSS_START)
        machine.set_identity_map_address(KVM_IDENTITY_MAP_START)
        machine.enable_split_irqchip(24)
        for region in memory.regions:
            machine.set_memory(region.slot, region.gpa, region.size, region.address)
        yield machine


@pytest.mark.probe
def test_kvm_runs_a_pvh_guest_that_finds_start_info_and_rsdp(
    vm: KvmVm, memory: GuestMemory, layout: Layout, tmp_path: os.PathLike[str]
) -> None:
    path = os.path.join(tmp_path, "vmlinux")
    with open(path, "wb") as file:
        file.write(images.elf(((images.ENTRY, GUEST, len(GUEST)),)))
    entry = load(memory, layout, path, None, "")
    regs.write_descriptor_tables(memory)
    write_tables(memory, layout, Description(2, 2))
    common = common_cpuid(from_kvm(vm.kvm.supported_cpuid()), layout.phys_bits)
    fds = [vm.create_vcpu(vcpu) for vcpu in range(2)]
    try:
        lists = [regs.configure(fd, vcpu, common, Topology.flat(2), entry) for vcpu, fd in enumerate(fds)]
        assert [next(item.edx for item in cpuid if item.function == 0x1F) for cpuid in lists] == [0, 1]
        for fd, state in zip(fds, (kvm.KVM_MP_STATE_RUNNABLE, kvm.KVM_MP_STATE_UNINITIALIZED), strict=True):
            found = kvm.kvm_mp_state()
            kvm.ioctl(fd, kvm.KVM_GET_MP_STATE, found)
            assert found.mp_state == state
            sregs = kvm_sregs()
            kvm.ioctl(fd, kvm.KVM_GET_SREGS, sregs)
            assert (fields(sregs.cs), fields(sregs.tr)) == (CODE, TASK)
            lapic = kvm_lapic_state()
            kvm.ioctl(fd, kvm.KVM_GET_LAPIC, lapic)
            assert struct.unpack_from("<I", lapic.regs, 0x350)[0] & 0x700 == 0x700
            assert struct.unpack_from("<I", lapic.regs, 0x360)[0] & 0x700 == 0x400
        assert port_writes(fds[0], vm.kvm.vcpu_mmap_size(), 3) == [
            struct.pack("<I", 0x336E_C578), b"RSD ", b"K",
        ]  # fmt: skip
    finally:
        for fd in fds:
            os.close(fd)


def port_writes(fd: int, size: int, count: int) -> list[bytes]:
    """Run a vCPU for `count` exits, each of which must be a write to COM1."""
    found = []
    with mmap.mmap(fd, size) as page:
        for _ in range(count):
            kvm.ioctl(fd, kvm.KVM_RUN)
            run = kvm.kvm_run.from_buffer_copy(page)
            assert (run.exit_reason, run.io.direction, run.io.port) == (kvm.KVM_EXIT_IO, kvm.KVM_EXIT_IO_OUT, 0x3F8)
            found.append(page[run.io.data_offset : run.io.data_offset + run.io.size])
    return found
