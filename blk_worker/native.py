"""blk.h for Python: its ABI structs, and the functions with their types."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_int, c_int32, c_uint32, c_uint64, c_void_p
from enum import IntEnum, IntFlag
from typing import Final

from shared import latency, native
from shared.native_ring import bind, vring_region, vring_setup

HANG_FOR_EVER: Final = (1 << 32) - 1
ID_BYTES: Final = 20


class Flag(IntFlag):
    READONLY = 1
    DIRECT = 2
    BLOCK_DEVICE = 4
    CAN_DISCARD = 8
    CAN_ZERO = 16
    TRIAL = 32
    BLAME = 64


class Kind(IntEnum):
    """enum blk_kind, the index into blk_counters.op."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    ZERO = 4
    OTHER = 5


class blk_config(ctypes.Structure):
    _fields_ = (
        ("sectors", c_uint64),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("num_queues", c_uint32),
        ("io_threads", c_uint32),
        ("memory_align", c_uint32),
        ("offset_align", c_uint32),
        ("id", c_char * ID_BYTES),
        ("writeback", c_uint32),
    )


class blk_op_counters(ctypes.Structure):
    _fields_ = (
        ("ops", c_uint64),
        ("bytes", c_uint64),
        ("latency_min_us", c_uint64),
        ("latency_max_us", c_uint64),
        ("latency_sum_us", c_uint64),
        ("latency_bucket", c_uint64 * latency.BUCKETS),
    )
    ops: int
    bytes: int
    latency_min_us: int
    latency_max_us: int
    latency_sum_us: int
    latency_bucket: ctypes.Array[c_uint64]


class blk_counters(ctypes.Structure):
    _fields_ = (
        ("epoch", c_uint64),
        ("kicks", c_uint64),
        ("calls", c_uint64),
        ("inflight", c_uint64),
        ("resubmitted", c_uint64),
        ("syncs", c_uint64),
        ("bounced", c_uint64),
        ("errors", c_uint64),
        ("unsupported", c_uint64),
        ("malformed", c_uint64),
        ("last_malformed", c_uint64),
        ("broken", c_uint64),
        ("io_errno", c_uint64),
        ("poisoned", c_uint64),
        ("poisoned_sector", c_uint64),
        ("op", blk_op_counters * len(Kind)),
    )
    epoch: int
    kicks: int
    calls: int
    inflight: int
    resubmitted: int
    syncs: int
    bounced: int
    errors: int
    unsupported: int
    malformed: int
    last_malformed: int
    broken: int
    io_errno: int
    poisoned: int
    poisoned_sector: int
    op: ctypes.Array[blk_op_counters]


class Shape(IntEnum):
    """enum blk_shape: how delays are spread."""

    FIXED = 0
    UNIFORM = 1
    NORMAL = 2


class blk_fault(ctypes.Structure):
    _fields_ = (
        ("first_sector", c_uint64),
        ("last_sector", c_uint64),
        ("seed", c_uint64),
        ("kinds", c_uint32),
        ("after", c_uint32),
        ("count", c_uint32),
        ("delay_ms", c_uint32),
        ("spread_ms", c_uint32),
        ("shape", c_uint32),
        ("fail", c_uint32),
        ("die_at", c_uint32),
        ("die_after", c_uint32),
        ("freeze", c_uint32),
        ("withhold", c_uint32),
        ("repeat", c_uint32),
        ("die_on_sector", c_uint32),
        ("sector", c_uint64),
    )


ABI: Final = (blk_config, vring_setup, blk_op_counters, blk_counters, blk_fault, vring_region)

_FUNCTIONS: Final[dict[str, tuple[object, tuple[object, ...]]]] = {
    "blk_create": (c_void_p, (POINTER(blk_config),)),
    "blk_destroy": (None, (c_void_p,)),
    "blk_set_memory": (c_int, (c_void_p, POINTER(vring_region), c_uint32)),
    "blk_set_log": (None, (c_void_p, c_uint64, c_uint64)),
    "blk_set_writeback": (None, (c_void_p, c_uint32)),
    "blk_start": (c_int, (c_void_p, POINTER(vring_setup))),
    "blk_stop_request": (c_int, (c_void_p, c_uint32)),
    "blk_stopped": (c_int, (c_void_p, c_uint32)),
    "blk_stop_wait": (c_int, (c_void_p, c_uint32)),
    "blk_nudge": (None, (c_void_p,)),
    "blk_alive": (c_int, (c_void_p,)),
    "blk_event_fd": (c_int, (c_void_p,)),
    "blk_counters": (POINTER(blk_counters), (c_void_p, c_uint32)),
    "blk_set_fault": (None, (c_void_p, POINTER(blk_fault))),
    "blk_abi_size": (c_uint32, (c_uint32,)),
}


def load() -> ctypes.CDLL:
    return bind(native.load("blk"), _FUNCTIONS)
