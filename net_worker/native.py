"""net.h for Python: its ABI structs, and the functions with their types."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int32, c_uint32, c_uint64, c_void_p
from typing import Final

from shared import native
from shared.native_ring import bind, vring_region, vring_setup

HEADER: Final = 12
LEGACY_HEADER: Final = 10


class net_counters(ctypes.Structure):
    _fields_ = (
        ("epoch", c_uint64),
        ("kicks", c_uint64),
        ("calls", c_uint64),
        ("frames", c_uint64),
        ("bytes", c_uint64),
        ("dropped", c_uint64),
        ("stalls", c_uint64),
        ("malformed", c_uint64),
        ("last_malformed", c_uint64),
        ("broken", c_uint64),
        ("tap_errno", c_uint64),
        ("tap_gone", c_uint64),
        ("poisoned", c_uint64),
    )
    epoch: int
    kicks: int
    calls: int
    frames: int
    bytes: int
    dropped: int
    stalls: int
    malformed: int
    last_malformed: int
    broken: int
    tap_errno: int
    tap_gone: int
    poisoned: int


class net_fault(ctypes.Structure):
    _fields_ = (
        ("die_at", c_uint32),
        ("die_after", c_uint32),
        ("delay_ms", c_uint32),
        ("freeze", c_uint32),
        ("withhold", c_uint32),
        ("repeat", c_uint32),
    )


ABI: Final = (net_counters, vring_setup, net_fault, vring_region)

_FUNCTIONS: Final[dict[str, tuple[object, tuple[object, ...]]]] = {
    "net_create": (c_void_p, (c_uint32, POINTER(c_int32))),
    "net_destroy": (None, (c_void_p,)),
    "net_set_memory": (c_int, (c_void_p, POINTER(vring_region), c_uint32)),
    "net_set_log": (None, (c_void_p, c_uint64, c_uint64)),
    "net_set_format": (c_int, (c_void_p, c_uint32, c_uint32)),
    "net_set_attached": (c_int, (c_void_p, c_uint32, c_uint32)),
    "net_start": (c_int, (c_void_p, POINTER(vring_setup))),
    "net_stop": (c_int, (c_void_p, c_uint32)),
    "net_nudge": (None, (c_void_p,)),
    "net_event_fd": (c_int, (c_void_p,)),
    "net_counters": (POINTER(net_counters), (c_void_p, c_uint32)),
    "net_set_trial": (None, (c_void_p, c_uint32)),
    "net_set_lethal": (None, (c_void_p, c_uint32)),
    "net_set_fault": (None, (c_void_p, POINTER(net_fault))),
    "net_ctrl_take": (c_int, (c_void_p, c_char_p, c_uint32)),
    "net_ctrl_answer": (None, (c_void_p, c_uint32)),
    "net_abi_size": (c_uint32, (c_uint32,)),
}


def load() -> ctypes.CDLL:
    return bind(native.load("net"), _FUNCTIONS)
