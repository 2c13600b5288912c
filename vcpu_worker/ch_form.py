"""A vCPU's state in the JSON form of Cloud Hypervisor's stream: the "Kvm" object (machine page, section 7.7).

    to_ch(state, cpuid) -> object      from_ch(object) -> (state, cpuid)

`state` is what VcpuCodec saves and loads, `cpuid` a list of (function, index, flags, eax, ebx, ecx, edx). Binary
structs are lists of integers there; lists that are too short are filled with zeros and those too long are cut, as
Cloud Hypervisor does. Missing keys and values of a wrong type raise ProtocolError that names the key.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

from shared import kvm
from shared.errors import ProtocolError
from vcpu_worker.state import State

Cpuid = list[tuple[int, int, int, int, int, int, int]]

_CPUID_KEYS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
_BLOBS = {
    "regs": kvm.kvm_regs,
    "sregs": kvm.kvm_sregs,
    "xcrs": kvm.kvm_xcrs,
    "mp_state": kvm.kvm_mp_state,
    "vcpu_events": kvm.kvm_vcpu_events,
}
_FPU_SCALARS = ("fcw", "fsw", "ftwx", "last_opcode", "last_ip", "last_dp", "mxcsr")
_NESTED_SIZE = 8320  # its buffer, whatever of it is used


def to_ch(state: State, cpuid: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The object for JSON. Debug registers are left out: Cloud Hypervisor has no place for them."""
    fpu = kvm.kvm_fpu.from_buffer_copy(state["fpu"])
    words = list(struct.unpack(f"<{len(state['xsave']) // 4}I", state["xsave"]))
    xsave: dict[str, Any] = {"region": words[: kvm.XSAVE_SIZE // 4]}
    if len(words) > kvm.XSAVE_SIZE // 4:
        xsave["extra"] = words[kvm.XSAVE_SIZE // 4 :]
    nested = state.get("nested_state")
    return {
        "cpuid": [dict(zip(_CPUID_KEYS, entry, strict=True)) for entry in cpuid],
        "msrs": [{"index": index, "data": data} for index, data in state["msrs"]],
        **{key: list(state[key]) for key in _BLOBS},
        "fpu": {
            "fpr": [list(register) for register in fpu.fpr],
            "xmm": [list(register) for register in fpu.xmm],
            **{key: getattr(fpu, key) for key in _FPU_SCALARS},
        },
        "lapic_state": {"regs": list(struct.unpack("1024b", state["lapic_state"]))},
        "xsave": xsave,
        "tsc_khz": state["tsc_khz"],
        "nested_state": list(nested.ljust(_NESTED_SIZE, b"\0")) if nested else None,
        "hyperv_synic": False,
    }


def from_ch(data: dict[str, Any]) -> tuple[State, Cpuid]:
    """The state for VcpuCodec.load() and the entries for set_cpuid()."""
    key = ""
    try:
        state: State = {}
        for key, kind in _BLOBS.items():
            state[key] = _fit(_octets(data[key]), ctypes.sizeof(kind))
        key = "fpu"
        state["fpu"] = _fpu(data["fpu"])
        key = "lapic_state"
        state["lapic_state"] = _fit(struct.pack(f"{len(data[key]['regs'])}b", *data[key]["regs"]), 1024)
        key = "xsave"
        region, extra = data["xsave"]["region"], data["xsave"].get("extra") or []
        state["xsave"] = _fit(_words(region), kvm.XSAVE_SIZE) + _words(extra)
        key = "msrs"
        state["msrs"] = [(_unsigned(entry["index"], 32), _unsigned(entry["data"], 64)) for entry in data["msrs"]]
        key = "tsc_khz"
        khz = data.get("tsc_khz")
        state["tsc_khz"] = None if khz is None else _unsigned(khz, 32)
        key = "nested_state"
        nested = data.get("nested_state")
        state["nested_state"] = None if nested is None else _octets(nested)
        key = "cpuid"
        cpuid = [tuple(_unsigned(entry[name], 32) for name in _CPUID_KEYS) for entry in data["cpuid"]]
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ProtocolError(f"vCPU state: {key}: missing or not of the expected shape") from error
    return state, cpuid  # type: ignore[return-value]  # a tuple made in a loop has no length for mypy


def _octets(values: Any) -> bytes:
    """bytes() of a list, and not of a number: that would be so many zeros."""
    if not isinstance(values, list):
        raise TypeError(f"not a list of bytes: {type(values).__name__}")
    return bytes(values)


def _fit(data: bytes, size: int) -> bytes:
    return data[:size].ljust(size, b"\0")


def _words(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _unsigned(value: Any, bits: int) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise ValueError(f"not an unsigned integer of {bits} bits: {value!r}")
    return value


def _fpu(data: dict[str, Any]) -> bytes:
    fpu = kvm.kvm_fpu()
    for name in ("fpr", "xmm"):
        for register, values in zip(getattr(fpu, name), data[name], strict=True):
            register[:] = _fit(_octets(values), 16)
    for name in _FPU_SCALARS:
        size: int = getattr(kvm.kvm_fpu, name).size
        setattr(fpu, name, _unsigned(data[name], 8 * size))
    return bytes(fpu)
