"""A vCPU's whole state, out of KVM and into it again. Key names are Cloud Hypervisor's (machine page, section 7.7).

Binary structs travel as bytes, `msrs` as a list of (index, value); ch_form.py has Cloud Hypervisor's own form. The
order of both directions is part of the contract with KVM; each line says why. The vCPU must be out of KVM_RUN with no
exit pending (Vcpu.parked).
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence

from shared import kvm
from shared.errors import ProtocolError
from shared.kvm import ioctl
from shared.typed import Any

State = dict[str, Any]

MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE = 0x10, 0x6E0
# Not in KVM's index list, but guests set them: variable ranges, fixed ranges, default type.
MTRR_MSRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
_BLOBS = {
    "regs": (kvm.KVM_GET_REGS, kvm.KVM_SET_REGS, kvm.kvm_regs),
    "sregs": (kvm.KVM_GET_SREGS, kvm.KVM_SET_SREGS, kvm.kvm_sregs),
    "fpu": (kvm.KVM_GET_FPU, kvm.KVM_SET_FPU, kvm.kvm_fpu),
    "xcrs": (kvm.KVM_GET_XCRS, kvm.KVM_SET_XCRS, kvm.kvm_xcrs),
    "debugregs": (kvm.KVM_GET_DEBUGREGS, kvm.KVM_SET_DEBUGREGS, kvm.kvm_debugregs),
    "lapic_state": (kvm.KVM_GET_LAPIC, kvm.KVM_SET_LAPIC, kvm.kvm_lapic_state),
    "mp_state": (kvm.KVM_GET_MP_STATE, kvm.KVM_SET_MP_STATE, kvm.kvm_mp_state),
    "vcpu_events": (kvm.KVM_GET_VCPU_EVENTS, kvm.KVM_SET_VCPU_EVENTS, kvm.kvm_vcpu_events),
}
# MP_STATE first: reading it runs pending INIT and SIPI, which change registers and LAPIC. VCPU_EVENTS last: other
# getters may turn a pending event into another one.
# Cloud Hypervisor saves no debug registers: a state of its lacks them.
_OPTIONAL = ("debugregs",)
_SAVE_FIRST = ("mp_state", "regs", "sregs")
_SAVE_REST = ("xcrs", "debugregs", "lapic_state", "fpu")
# SREGS carries APIC_BASE, without which the LAPIC's registers are not taken; FPU after XSAVE, which covers it too.
_LOAD_FIRST = ("mp_state", "regs", "sregs")
_LOAD_REST = ("xcrs", "debugregs", "lapic_state", "fpu")
# kvm_nested_state: u16 flags, u16 format, u32 size; 128 bytes of header, then what a guest of the guest needs.
_NESTED_HEADER = 128
# LAPIC register LVT timer: bits 18:17 are 2 in TSC-deadline mode, bit 16 masks it.
_LVT_TIMER, _LVT_MODE_AND_MASK, _LVT_DEADLINE = 0x320, 0x70000, 0x40000


def _get(fd: int, name: str) -> bytes:
    request, _, struct = _BLOBS[name]
    value = struct()
    ioctl(fd, request, value)
    return bytes(value)


def _checked(name: str, data: object) -> bytes:
    size = ctypes.sizeof(_BLOBS[name][2])
    if not isinstance(data, bytes) or len(data) != size:
        raise ProtocolError(f"vCPU state: {name}: expected {size} bytes")
    return data


def _set(fd: int, name: str, value: object) -> None:
    _, request, struct = _BLOBS[name]
    data = _checked(name, value)
    if name == "xcrs" and not int.from_bytes(data[:4], "little"):
        return  # nr_xcrs: saved where the kernel does not use XSAVE. Such a kernel refuses the ioctl, even for none
    ioctl(fd, request, struct.from_buffer_copy(data))


class VcpuCodec:
    """Saves and loads vCPUs of one VM; knows the host's MSR list and XSAVE size, asked once, before any downtime."""

    def __init__(self, vm: kvm.KvmVm) -> None:
        self._host = vm.kvm
        self._indices = list(dict.fromkeys([*vm.kvm.msr_indices(), *MTRR_MSRS]))
        # KVM_CAP_XSAVE2 is 0 where KVM_GET_XSAVE's 4096 bytes hold everything.
        self._xsave_size = max(vm.kvm.check_extension(kvm.KVM_CAP_XSAVE2), kvm.XSAVE_SIZE)
        self._nested_size = vm.kvm.check_extension(kvm.KVM_CAP_NESTED_STATE)

    def save(self, fd: int) -> State:
        state: State = {name: _get(fd, name) for name in _SAVE_FIRST}
        state["xsave"] = self._get_xsave(fd)
        state.update((name, _get(fd, name)) for name in _SAVE_REST)
        state["nested_state"] = self._get_nested(fd)
        state["tsc_khz"] = _tsc_khz(fd)
        # After the LAPIC: reading TSC_DEADLINE gives 0 once its timer has been taken into account.
        state["msrs"] = self._get_msrs(fd)
        state["vcpu_events"] = _get(fd, "vcpu_events")
        return state

    def load(self, fd: int, state: State) -> list[int]:
        """Everything but CPUID, which set_cpuid() gives the vCPU before. Returns MSRs that this host refused.

        Raises ProtocolError for a state that is incomplete or needs a CPU which this host has not got.
        """
        for key in (*_BLOBS, "xsave", "msrs"):
            if key not in state and key not in _OPTIONAL:
                raise ProtocolError(f"vCPU state: {key} is missing")
        for name in _LOAD_FIRST:
            _set(fd, name, state[name])
        self._set_xsave(fd, state["xsave"], _checked("xcrs", state["xcrs"]))
        for name in _LOAD_REST:
            if name in state:
                _set(fd, name, state[name])
        # After SREGS: KVM wants EFER.SVME or CR4.VMXE, and leaves the guest's mode as the nested state says.
        self._set_nested(fd, state.get("nested_state"))
        if state.get("tsc_khz"):
            _set_tsc_khz(fd, int(state["tsc_khz"]))
        # After the LAPIC: TSC_DEADLINE is refused while the LVT timer is not in deadline mode.
        refused = set_msrs(fd, _restore_order(state["msrs"], state["lapic_state"]))
        _set(fd, "vcpu_events", state["vcpu_events"])
        tell_paused(fd)
        return refused

    def _get_xsave(self, fd: int) -> bytes:
        buffer = (ctypes.c_uint8 * self._xsave_size)()
        ioctl(fd, kvm.KVM_GET_XSAVE2 if self._xsave_size > kvm.XSAVE_SIZE else kvm.KVM_GET_XSAVE, buffer)
        return bytes(buffer)

    def _set_xsave(self, fd: int, data: object, xcrs: bytes) -> None:
        if not isinstance(data, bytes) or not kvm.XSAVE_SIZE <= len(data) <= self._xsave_size:
            raise ProtocolError("vCPU state: xsave: this host's XSAVE area is smaller", "CPU features differ")
        buffer = (ctypes.c_uint8 * self._xsave_size)()
        ctypes.memmove(buffer, data, len(data))
        try:
            ioctl(fd, kvm.KVM_SET_XSAVE, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            from vcpu_worker import xsave

            # Asked only now: KVM's whole CPUID costs more than all else here, and hosts are mostly alike.
            xsave.leave_out(buffer, xsave.xcr0(xcrs), xsave.supported_components(self._host))
            ioctl(fd, kvm.KVM_SET_XSAVE, buffer)

    def _get_nested(self, fd: int) -> bytes | None:
        """None where KVM has no nesting, and where the guest does not use it: there is nothing to carry."""
        if not self._nested_size:
            return None
        buffer = (ctypes.c_uint8 * self._nested_size)()
        size = ctypes.c_uint32.from_buffer(buffer, 4)
        size.value = self._nested_size
        ioctl(fd, kvm.KVM_GET_NESTED_STATE, buffer)
        return bytes(buffer[: size.value])

    def _set_nested(self, fd: int, data: object) -> None:
        if not isinstance(data, bytes) or len(data) < _NESTED_HEADER:
            return
        size = int.from_bytes(data[4:8], "little")
        trivial = size <= _NESTED_HEADER
        if size > min(len(data), self._nested_size):
            if not trivial:
                raise ProtocolError("vCPU state: nested_state: a guest runs inside, and this host's KVM has no nesting")
            return
        buffer = (ctypes.c_uint8 * self._nested_size)()
        ctypes.memmove(buffer, data, size)
        try:
            ioctl(fd, kvm.KVM_SET_NESTED_STATE, buffer)
        except OSError as error:
            # The header alone says that no guest runs inside; one of another CPU vendor is refused, and means the same.
            if not trivial or error.errno != errno.EINVAL:
                raise

    def _get_msrs(self, fd: int) -> list[tuple[int, int]]:
        """KVM_GET_MSRS stops at the first MSR it can't read: skip that one, now and in future, and go on."""
        values: list[tuple[int, int]] = []
        pending = list(self._indices)
        while pending:
            buffer = kvm.msr_list(len(pending))
            for entry, index in zip(buffer.entries, pending, strict=True):
                entry.index = index
            count = ioctl(fd, kvm.KVM_GET_MSRS, buffer)
            values += [(entry.index, entry.data) for entry in buffer.entries[:count]]
            if count < len(pending):
                self._indices.remove(pending[count])
            pending = pending[count + 1 :]
        return values


def _restore_order(msrs: Sequence[Sequence[int]], lapic: bytes) -> list[tuple[int, int]]:
    """TSC before TSC_DEADLINE, which is compared with it.

    A deadline of 0 while the LVT timer waits for one means that the timer fired between the reading of LAPIC and MSRs:
    its interrupt may be in neither. A deadline that is past fires at once; one tick too many is harmless, a guest that
    waits for a lost one is not.
    """
    order = {MSR_IA32_TSC: 1, MSR_IA32_TSC_DEADLINE: 2}
    pairs = sorted(((int(index), int(value)) for index, value in msrs), key=lambda pair: order.get(pair[0], 0))
    timer = int.from_bytes(lapic[_LVT_TIMER : _LVT_TIMER + 4], "little")
    if timer & _LVT_MODE_AND_MASK == _LVT_DEADLINE and pairs and pairs[-1] == (MSR_IA32_TSC_DEADLINE, 0):
        tsc = dict(pairs).get(MSR_IA32_TSC, 0)
        pairs[-1] = (MSR_IA32_TSC_DEADLINE, max(tsc, 1))
    return pairs


def set_msrs(fd: int, msrs: Sequence[tuple[int, int]]) -> list[int]:
    """Set what this host takes; the indices that it refused."""
    refused: list[int] = []
    pending = list(msrs)
    while pending:
        buffer = kvm.msr_list(len(pending))
        for entry, (index, value) in zip(buffer.entries, pending, strict=True):
            entry.index, entry.data = index, value
        count = ioctl(fd, kvm.KVM_SET_MSRS, buffer)
        if count < len(pending):
            refused.append(pending[count][0])
        pending = pending[count + 1 :]
    return refused


def set_cpuid(fd: int, entries: Sequence[Any]) -> None:
    """Before any register: KVM checks SREGS and MSRs against it."""
    ioctl(fd, kvm.KVM_SET_CPUID2, kvm.cpuid_entries(entries))


def _tsc_khz(fd: int) -> int | None:
    try:
        return ioctl(fd, kvm.KVM_GET_TSC_KHZ)
    except OSError:
        return None  # an unstable host TSC: kvm-clock is all the guest has


def _set_tsc_khz(fd: int, khz: int) -> None:
    if _tsc_khz(fd) == khz:
        return
    try:
        ioctl(fd, kvm.KVM_SET_TSC_KHZ, khz)
    except OSError as error:
        # No TSC scaling on this host: a guest on kvm-clock does not notice.
        if error.errno not in (errno.EIO, errno.EINVAL):
            raise


def tell_paused(fd: int) -> bool:
    """Tell the guest's watchdogs that this vCPU was paused. False when the guest has no kvm-clock to tell it by."""
    try:
        ioctl(fd, kvm.KVM_KVMCLOCK_CTRL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def share_tsc_offset(fds: Sequence[int]) -> bool:
    """Give every vCPU the first one's TSC offset, so that their TSCs agree as they did before. After load() of all.

    Writing IA32_TSC leaves each vCPU's TSC at the instant of its own write; KVM's heuristic for that covers one second.
    False where KVM has no such attribute (a software KVM runs guests on the host's TSC).
    """
    offset = ctypes.c_uint64()
    attribute = kvm.kvm_device_attr(0, kvm.KVM_VCPU_TSC_CTRL, kvm.KVM_VCPU_TSC_OFFSET, ctypes.addressof(offset))
    try:
        ioctl(fds[0], kvm.KVM_HAS_DEVICE_ATTR, attribute)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EINVAL, errno.ENOTTY):
            return False
        raise
    ioctl(fds[0], kvm.KVM_GET_DEVICE_ATTR, attribute)
    for fd in fds[1:]:
        ioctl(fd, kvm.KVM_SET_DEVICE_ATTR, attribute)
    return True
