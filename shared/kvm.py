"""The KVM ABI: structs and constants under their kernel names, and thin typed wrappers of the ioctls.

Sources: include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h, Documentation/virt/kvm/api.rst. Every wrapper raises
OSError that names the ioctl; opening and checking /dev/kvm raises KvmError with a hint.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Iterable, Sequence
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64

from shared.errors import KvmError
from shared.linux import libc
from shared.typed import Any

KVM_API_VERSION = 12


def _IO(number: int) -> int:
    return 0xAE00 | number


def _IOW(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | 0xAE00 | number


def _IOR(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | 0xAE00 | number


def _IOWR(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | 0xAE00 | number


class kvm_userspace_memory_region(ctypes.Structure):
    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


class kvm_dirty_log(ctypes.Structure):
    _fields_ = (("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64))


class kvm_enable_cap(ctypes.Structure):
    _fields_ = (("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))


class kvm_irqfd(ctypes.Structure):
    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


class kvm_ioeventfd(ctypes.Structure):
    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class kvm_irq_routing_msi(ctypes.Structure):
    _fields_ = (("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("devid", c_uint32))


class kvm_irq_routing_entry(ctypes.Structure):
    class _u(ctypes.Union):
        _fields_ = (("msi", kvm_irq_routing_msi), ("pad", c_uint32 * 8))

    _fields_ = (("gsi", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("pad", c_uint32), ("u", _u))


class kvm_clock_data(ctypes.Structure):
    _fields_ = (
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    )


class kvm_cpuid_entry2(ctypes.Structure):
    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


class kvm_msr_entry(ctypes.Structure):
    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class kvm_regs(ctypes.Structure):
    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    )


class kvm_segment(ctypes.Structure):
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ["type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding"]),
    )


class kvm_dtable(ctypes.Structure):
    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class kvm_sregs(ctypes.Structure):
    _fields_ = (
        *((name, kvm_segment) for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"]),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class kvm_fpu(ctypes.Structure):
    _fields_ = (
        ("fpr", (c_uint8 * 16) * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", (c_uint8 * 16) * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    )


class kvm_lapic_state(ctypes.Structure):
    _fields_ = (("regs", c_uint8 * 1024),)


class kvm_mp_state(ctypes.Structure):
    _fields_ = (("mp_state", c_uint32),)


class kvm_vcpu_events(ctypes.Structure):
    """Carried as a whole; its 64 bytes are opaque here."""

    _fields_ = (("bytes", c_uint8 * 64),)


class kvm_debugregs(ctypes.Structure):
    _fields_ = (
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    )


class kvm_xcrs(ctypes.Structure):
    _fields_ = (("bytes", c_uint8 * 392),)


class kvm_device_attr(ctypes.Structure):
    _fields_ = (("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64))


class kvm_run_io(ctypes.Structure):
    _fields_ = (
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    )


class kvm_run_mmio(ctypes.Structure):
    _fields_ = (("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8))


class kvm_run_internal(ctypes.Structure):
    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class kvm_run(ctypes.Structure):
    """The head of the page that KVM and a vCPU's owner share; the data of PIO lies behind it."""

    class _exit(ctypes.Union):
        _fields_ = (
            ("io", kvm_run_io),
            ("mmio", kvm_run_mmio),
            ("internal", kvm_run_internal),
            ("hardware_reason", c_uint64),
            ("system_event_type", c_uint32),
            ("eoi_vector", c_uint8),
            ("padding", c_uint8 * 256),
        )

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _exit),
    )


KVM_EXIT_UNKNOWN, KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_MMIO = 0, 2, 5, 6
KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR = 8, 9, 10
KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_IOAPIC_EOI = 17, 24, 26
KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT = 0, 1
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_IRQFD_FLAG_DEASSIGN = 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 4
KVM_IRQ_ROUTING_MSI = 2
KVM_CLOCK_REALTIME = 4
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET = 0, 0
KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED = 0, 1
XSAVE_SIZE = 4096

KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_XSAVE2, KVM_CAP_GET_TSC_KHZ, KVM_CAP_NR_VCPUS = 121, 208, 61, 9
KVM_CAP_NESTED_STATE, KVM_CAP_BINARY_STATS_FD = 157, 203
# What the machine can't do without, by Cloud Hypervisor's list.
REQUIRED_CAPS = {
    "ADJUST_CLOCK": 39,
    "EXT_CPUID": 7,
    "IMMEDIATE_EXIT": 136,
    "IOEVENTFD": 36,
    "IRQCHIP": 0,
    "IRQFD": 32,
    "IRQ_ROUTING": 25,
    "MP_STATE": 14,
    "SET_IDENTITY_MAP_ADDR": 37,
    "SET_TSS_ADDR": 4,
    "SPLIT_IRQCHIP": KVM_CAP_SPLIT_IRQCHIP,
    "TSC_DEADLINE_TIMER": 72,
    "USER_MEMORY": 3,
    "USER_NMI": 22,
    "VCPU_EVENTS": 41,
    "XSAVE": 55,
}

KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE = _IO(0), _IO(1), _IO(3), _IO(4)
KVM_GET_MSR_INDEX_LIST, KVM_GET_SUPPORTED_CPUID = _IOWR(0x02, 4), _IOWR(0x05, 8)
KVM_CREATE_VCPU, KVM_GET_DIRTY_LOG = _IO(0x41), _IOW(0x42, 16)
KVM_SET_USER_MEMORY_REGION = _IOW(0x46, 32)
KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR = _IO(0x47), _IOW(0x48, 8)
KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_IOEVENTFD = _IOW(0x6A, 8), _IOW(0x76, 32), _IOW(0x79, 64)
KVM_SET_CLOCK, KVM_GET_CLOCK = _IOW(0x7B, 48), _IOR(0x7C, 48)
KVM_RUN, KVM_GET_STATS_FD = _IO(0x80), _IO(0xCE)
KVM_GET_REGS, KVM_SET_REGS = _IOR(0x81, 144), _IOW(0x82, 144)
KVM_GET_SREGS, KVM_SET_SREGS = _IOR(0x83, 312), _IOW(0x84, 312)
KVM_GET_MSRS, KVM_SET_MSRS = _IOWR(0x88, 8), _IOW(0x89, 8)
KVM_GET_FPU, KVM_SET_FPU = _IOR(0x8C, 416), _IOW(0x8D, 416)
KVM_GET_LAPIC, KVM_SET_LAPIC = _IOR(0x8E, 1024), _IOW(0x8F, 1024)
KVM_SET_CPUID2, KVM_GET_CPUID2 = _IOW(0x90, 8), _IOWR(0x91, 8)
KVM_GET_MP_STATE, KVM_SET_MP_STATE = _IOR(0x98, 4), _IOW(0x99, 4)
KVM_NMI = _IO(0x9A)
KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS = _IOR(0x9F, 64), _IOW(0xA0, 64)
KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS = _IOR(0xA1, 128), _IOW(0xA2, 128)
KVM_SET_TSC_KHZ, KVM_GET_TSC_KHZ, KVM_ENABLE_CAP = _IO(0xA2), _IO(0xA3), _IOW(0xA3, 104)
KVM_GET_XSAVE, KVM_SET_XSAVE = _IOR(0xA4, XSAVE_SIZE), _IOW(0xA5, XSAVE_SIZE)
KVM_GET_XSAVE2 = _IOR(0xCF, XSAVE_SIZE)
KVM_GET_XCRS, KVM_SET_XCRS = _IOR(0xA6, 392), _IOW(0xA7, 392)
KVM_KVMCLOCK_CTRL = _IO(0xAD)
KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE = _IOWR(0xBE, 128), _IOW(0xBF, 128)
KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR = _IOW(0xE1, 24), _IOW(0xE2, 24), _IOW(0xE3, 24)

_NAMES = {value: name for name, value in list(globals().items()) if name.startswith("KVM_") and value >= 0xAE00}
_ioctl = libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int


def ioctl(fd: int, request: int, argument: int | ctypes.Structure | ctypes.Array[Any] = 0) -> int:
    """One ioctl with an integer or the address of a ctypes object. Raises OSError that names it."""
    pointer = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result: int = _ioctl(fd, request, pointer)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{_NAMES.get(request, hex(request))}: {os.strerror(number)}")
    return result


def cpuid_list(count: int) -> Any:
    """A kvm_cpuid2 with room for `count` entries."""

    class kvm_cpuid2(ctypes.Structure):
        _fields_ = (("nent", c_uint32), ("padding", c_uint32), ("entries", kvm_cpuid_entry2 * count))

    return kvm_cpuid2(count)


def msr_list(count: int) -> Any:
    """A kvm_msrs with room for `count` entries."""

    class kvm_msrs(ctypes.Structure):
        _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32), ("entries", kvm_msr_entry * count))

    return kvm_msrs(count)


@functools.cache
def _irq_routing(room: int) -> Any:
    """The type kvm_irq_routing with room for so many entries; a guest changes routes often, so types are kept."""

    class kvm_irq_routing(ctypes.Structure):
        _fields_ = (("nr", c_uint32), ("flags", c_uint32), ("entries", kvm_irq_routing_entry * room))

    return kvm_irq_routing


class Kvm:
    """/dev/kvm itself. Raises KvmError when it can't serve."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            hint = "load the module kvm_intel or kvm_amd, or enable it in the BIOS"
            raise KvmError(f"{path}: no such device", hint) from error
        except PermissionError as error:
            raise KvmError(f"{path}: permission denied", "become root or a member of the group kvm") from error
        except OSError as error:
            raise KvmError(f"{path}: {error.strerror}") from error
        try:
            self._check(path)
        except BaseException:
            os.close(self.fd)
            raise

    def _check(self, path: str) -> None:
        try:
            version = ioctl(self.fd, KVM_GET_API_VERSION)
        except OSError as error:
            raise KvmError(f"{path} is not KVM") from error
        if version != KVM_API_VERSION:
            raise KvmError(f"{path}: API version {version}, not {KVM_API_VERSION}")
        lacking = [name for name, number in REQUIRED_CAPS.items() if not self.check_extension(number)]
        if lacking:
            raise KvmError(f"{path} lacks {', '.join(lacking)}", "a newer host kernel is needed")

    def check_extension(self, capability: int) -> int:
        return ioctl(self.fd, KVM_CHECK_EXTENSION, capability)

    def create_vm(self) -> KvmVm:
        while True:
            try:
                return KvmVm(self, ioctl(self.fd, KVM_CREATE_VM))
            except OSError as error:
                # A signal during the kernel's own set-up; nothing was made.
                if error.errno != errno.EINTR:
                    raise KvmError(f"KVM_CREATE_VM failed: {error.strerror}") from error

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        buffer = cpuid_list(256)
        ioctl(self.fd, KVM_GET_SUPPORTED_CPUID, buffer)
        return list(buffer.entries[: buffer.nent])

    def msr_indices(self) -> list[int]:
        """Every MSR that KVM would save: KVM_GET_MSR_INDEX_LIST."""
        buffer = (c_uint32 * 1025)(1024)
        ioctl(self.fd, KVM_GET_MSR_INDEX_LIST, buffer)
        return list(buffer[1 : 1 + buffer[0]])

    def vcpu_mmap_size(self) -> int:
        return ioctl(self.fd, KVM_GET_VCPU_MMAP_SIZE)

    def close(self) -> None:
        os.close(self.fd)


class KvmVm:
    """One VM: what `controller.irq.KvmVm` asks for, and memslots, clock and vCPUs."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        self.kvm = kvm
        self.fd = fd
        # KVM_CREATE_VM has no flag for it, and a worker must never inherit a VM.
        os.set_inheritable(fd, False)

    def set_tss_address(self, address: int) -> None:
        ioctl(self.fd, KVM_SET_TSS_ADDR, address)

    def set_identity_map_address(self, address: int) -> None:
        ioctl(self.fd, KVM_SET_IDENTITY_MAP_ADDR, (c_uint64 * 1)(address))

    def enable_cap(self, capability: int, argument: int = 0) -> None:
        cap = kvm_enable_cap(cap=capability)
        cap.args[0] = argument
        ioctl(self.fd, KVM_ENABLE_CAP, cap)

    def enable_split_irqchip(self, pins: int) -> None:
        """LAPICs in KVM, the IOAPIC outside. Before the first vCPU."""
        self.enable_cap(KVM_CAP_SPLIT_IRQCHIP, pins)

    def set_memory(self, slot: int, gpa: int, size: int, address: int, *, log_dirty: bool = False) -> None:
        """KVM_SET_USER_MEMORY_REGION; size 0 removes the slot."""
        flags = KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region = kvm_userspace_memory_region(slot, flags, gpa, size, address)
        ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot: int, bitmap: ctypes.Array[Any]) -> None:
        """Fetch and clear: one bit per 4 KiB page, in multiples of 64 bits."""
        ioctl(self.fd, KVM_GET_DIRTY_LOG, kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap)))

    def create_vcpu(self, apic_id: int) -> int:
        fd = ioctl(self.fd, KVM_CREATE_VCPU, apic_id)
        os.set_inheritable(fd, False)
        return fd

    def set_gsi_routing(self, routes: Iterable[tuple[int, int, int, int]]) -> None:
        """Replace the table: (gsi, address_lo, address_hi, data) each."""
        entries = list(routes)
        table = _irq_routing(1 << max(len(entries) - 1, 0).bit_length())(len(entries))
        for entry, (gsi, low, high, data) in zip(table.entries, entries, strict=False):
            entry.gsi, entry.type = gsi, KVM_IRQ_ROUTING_MSI
            entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data = low, high, data
        ioctl(self.fd, KVM_SET_GSI_ROUTING, table)

    def irqfd(self, fd: int, gsi: int, *, deassign: bool = False) -> None:
        ioctl(self.fd, KVM_IRQFD, kvm_irqfd(fd, gsi, KVM_IRQFD_FLAG_DEASSIGN if deassign else 0))

    def ioeventfd(self, fd: int, address: int, *, deassign: bool = False) -> None:
        """MMIO, any length, no data match."""
        flags = KVM_IOEVENTFD_FLAG_DEASSIGN if deassign else 0
        ioctl(self.fd, KVM_IOEVENTFD, kvm_ioeventfd(addr=address, fd=fd, flags=flags))

    def get_clock(self) -> bytes:
        """48 bytes of kvm_clock_data."""
        clock = kvm_clock_data()
        ioctl(self.fd, KVM_GET_CLOCK, clock)
        return bytes(clock)

    def set_clock(self, data: bytes) -> None:
        """With KVM_CLOCK_REALTIME in its flags the guest's clock jumps over the time since get_clock()."""
        clock = kvm_clock_data.from_buffer_copy(data)
        clock.flags &= KVM_CLOCK_REALTIME
        ioctl(self.fd, KVM_SET_CLOCK, clock)

    def close(self) -> None:
        os.close(self.fd)


def cpuid_entries(entries: Sequence[Any]) -> Any:
    """A kvm_cpuid2 from objects with function, index, flags, eax, ebx, ecx, edx."""
    buffer = cpuid_list(len(entries))
    for target, entry in zip(buffer.entries, entries, strict=True):
        target.function, target.index, target.flags = entry.function, entry.index, entry.flags
        target.eax, target.ebx, target.ecx, target.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    return buffer
