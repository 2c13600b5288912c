"""The state of a vCPU before its first instruction: protected mode without paging, as both boot protocols want it.

All boot vCPUs get the same; KVM keeps those after the first waiting for INIT and SIPI. `configure` does it all in Cloud
Hypervisor's order. Sources: Xen's PVH ABI (docs/misc/pvh.pandoc), Documentation/arch/x86/boot.rst (32-bit entry).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

from controller.machine import layout as lo
from controller.machine.boot import BootEntry
from controller.machine.cpuid import CpuidEntry, vcpu_cpuid
from controller.machine.topology import Topology, x2apic_id
from shared import kvm
from shared.errors import KvmError
from shared.kvm import kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs
from shared.memory import GuestMemory
from vcpu_worker.state import set_msrs

# Null, code (selector 0x08), data (0x10) and a busy 32-bit TSS (0x18).
BOOT_GDT = (0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067)
CODE, DATA, TSS = 1, 2, 3
CR0_PE = 1
RFLAGS_RESERVED = 2
APIC_BASE_X2APIC = 1 << 10
# xAPIC ids have 8 bits and 255 means everybody; above this, LAPICs start in x2APIC mode.
MAX_XAPIC_ID = 254
FCW_INITIAL, MXCSR_INITIAL = 0x37F, 0x1F80
APIC_LVT0, APIC_LVT1 = 0x350, 0x360
APIC_DELIVERY_MODE = 0x700
APIC_MODE_NMI, APIC_MODE_EXTINT = 0x400, 0x700

BOOT_MSRS = (
    (0x174, 0),  # SYSENTER_CS
    (0x175, 0),  # SYSENTER_ESP
    (0x176, 0),  # SYSENTER_EIP
    (0xC000_0081, 0),  # STAR
    (0xC000_0083, 0),  # CSTAR
    (0xC000_0082, 0),  # LSTAR
    (0xC000_0102, 0),  # KERNEL_GS_BASE
    (0xC000_0084, 0),  # SYSCALL_MASK
    (0x10, 0),  # TSC
    (0x1A0, 1),  # MISC_ENABLE: fast strings
    (0x2FF, 0x806),  # MTRRdefType: enabled, write-back
)


def write_descriptor_tables(memory: GuestMemory) -> None:
    """The GDT and an empty IDT that `boot_sregs` points to."""
    memory.write(lo.BOOT_GDT_START, struct.pack("<4Q", *BOOT_GDT))
    memory.write(lo.BOOT_IDT_START, bytes(8))


def segment(index: int) -> kvm_segment:
    """What the processor would load for descriptor `index` of the boot GDT (Intel SDM, volume 3, 3.4.5)."""
    entry = BOOT_GDT[index]
    granular = entry >> 55 & 1
    limit = entry & 0xFFFF | entry >> 32 & 0xF_0000
    present = entry >> 47 & 1
    return kvm_segment(
        base=entry >> 16 & 0xFF_FFFF | entry >> 32 & 0xFF00_0000,
        limit=limit << 12 | 0xFFF if granular else limit,
        selector=index * 8,
        type=entry >> 40 & 0xF,
        present=present,
        dpl=entry >> 45 & 3,
        db=entry >> 54 & 1,
        s=entry >> 44 & 1,
        l=entry >> 53 & 1,
        g=granular,
        avl=entry >> 52 & 1,
        unusable=1 - present,
    )


def boot_regs(entry: BootEntry) -> kvm_regs:
    return kvm_regs(rip=entry.rip, rbx=entry.rbx, rsi=entry.rsi, rsp=entry.rsp, rflags=RFLAGS_RESERVED)


def set_boot_sregs(sregs: kvm_sregs, *, x2apic: bool = False) -> None:
    """Change what KVM_GET_SREGS gave for a new vCPU; the rest (EFER 0, APIC base) stays as after a reset."""
    data = segment(DATA)
    sregs.cs, sregs.tr = segment(CODE), segment(TSS)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.gdt = kvm_dtable(base=lo.BOOT_GDT_START, limit=len(BOOT_GDT) * 8 - 1)
    sregs.idt = kvm_dtable(base=lo.BOOT_IDT_START, limit=7)
    sregs.cr0, sregs.cr4 = CR0_PE, 0
    if x2apic:
        sregs.apic_base |= APIC_BASE_X2APIC


def boot_fpu() -> kvm_fpu:
    return kvm_fpu(fcw=FCW_INITIAL, mxcsr=MXCSR_INITIAL)


def set_lint(lapic: kvm_lapic_state) -> None:
    """LINT0 for a PIC's interrupts, LINT1 for NMIs: the delivery modes alone; masks stay as they are."""
    for register, mode in ((APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)):
        (value,) = struct.unpack_from("<I", lapic.regs, register)
        struct.pack_into("<I", lapic.regs, register, value & ~APIC_DELIVERY_MODE | mode)


def needs_x2apic(topology: Topology) -> bool:
    """Whether LAPICs must start in x2APIC mode, for the highest id that this topology can have."""
    return x2apic_id(topology.threads_per_package * topology.packages - 1, topology) > MAX_XAPIC_ID


def tsc_khz(fd: int) -> int | None:
    """KVM_GET_TSC_KHZ of a vCPU; None where the host's TSC is not stable."""
    try:
        return kvm.ioctl(fd, kvm.KVM_GET_TSC_KHZ)
    except OSError as error:
        if error.errno == errno.EIO:
            return None
        raise


def configure(
    fd: int,
    vcpu: int,
    common: Iterable[CpuidEntry],
    topology: Topology,
    entry: BootEntry | None,
    *,
    nested: bool = True,
) -> list[CpuidEntry]:
    """Bring a new vCPU fd to its boot state; the CPUID list it got. `entry` None: added later, started by INIT-SIPI.

    `topology` as for `vcpu_cpuid`. The descriptor tables must be in RAM before the guest runs. Raises KvmError.
    """
    try:
        cpuid = vcpu_cpuid(common, vcpu, topology, tsc_khz=tsc_khz(fd), nested=nested)
        kvm.ioctl(fd, kvm.KVM_SET_CPUID2, kvm.cpuid_entries(cpuid))
        _set_boot_msrs(fd)
        if entry is not None:
            kvm.ioctl(fd, kvm.KVM_SET_REGS, boot_regs(entry))
            sregs = kvm_sregs()
            kvm.ioctl(fd, kvm.KVM_GET_SREGS, sregs)
            set_boot_sregs(sregs, x2apic=needs_x2apic(topology))
            kvm.ioctl(fd, kvm.KVM_SET_SREGS, sregs)
            kvm.ioctl(fd, kvm.KVM_SET_FPU, boot_fpu())
        # After the SREGS: their APIC base may switch the LAPIC's mode, which changes its register page.
        lapic = kvm_lapic_state()
        kvm.ioctl(fd, kvm.KVM_GET_LAPIC, lapic)
        set_lint(lapic)
        kvm.ioctl(fd, kvm.KVM_SET_LAPIC, lapic)
    except OSError as error:
        raise KvmError(f"vCPU {vcpu} can't be set up: {error.strerror}") from error
    return cpuid


def _set_boot_msrs(fd: int) -> None:
    if refused := set_msrs(fd, BOOT_MSRS):
        raise KvmError(f"KVM refuses to set MSR {refused[0]:#x}")
