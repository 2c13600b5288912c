"""Components of an XSAVE area in standard format: which of them a host's KVM can take.

Source: Intel SDM, volume 1, 13.1 (components), 13.4.2 (XSTATE_BV in the area's header), 13.3 (XCR0); CPUID leaf 0xD.
"""

from __future__ import annotations

import ctypes

from shared import kvm
from shared.errors import ProtocolError

_XSTATE_BV = 512  # byte offset in the area
_XSAVE_LEAF = 0xD
_FP_SSE = 0b11  # KVM takes these where it knows no XSAVE, too
_NAMES = {
    2: "AVX",
    3: "MPX bounds",
    4: "MPX configuration",
    5: "AVX-512 masks",
    6: "AVX-512 (ZMM0 to ZMM15)",
    7: "AVX-512 (ZMM16 to ZMM31)",
    9: "PKRU",
    17: "AMX tile configuration",
    18: "AMX tiles",
}


def supported_components(host: kvm.Kvm) -> int:
    """A bit for each component that KVM_SET_XSAVE takes on this host."""
    for entry in host.supported_cpuid():
        if (entry.function, entry.index) == (_XSAVE_LEAF, 0):
            return _FP_SSE | int(entry.eax) | int(entry.edx) << 32
    return _FP_SSE


def xcr0(xcrs: bytes) -> int:
    """Components that the guest has enabled, from a kvm_xcrs (u32 nr_xcrs, u32 flags, then of each u32 number, u32
    reserved, u64 value; XCR0 is the only one that there is). 0 where there is none.
    """
    count = int.from_bytes(xcrs[:4], "little")
    return int.from_bytes(xcrs[16:24], "little") if count else 0


def leave_out(area: ctypes.Array[ctypes.c_uint8], enabled: int, supported: int) -> None:
    """Take out of a saved area what this host's KVM can't take and the guest has not enabled.

    A kernel whose CPU has protection keys lists PKRU as present in every guest's area. Raises ProtocolError where the
    guest has enabled something that is not here.
    """
    present = ctypes.c_uint64.from_buffer(area, _XSTATE_BV)
    missing = present.value & ~supported
    if used := missing & enabled:
        names = ", ".join(_NAMES.get(bit, f"component {bit}") for bit in range(64) if used >> bit & 1)
        why = f"vCPU state: xsave: the guest uses {names}, which this host has not"
        raise ProtocolError(why, "CPU features differ")
    present.value &= ~missing
