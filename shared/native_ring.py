"""vring.h and vring_setup.h for Python: the ABI between a vhost-user device and its native loop."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum
from typing import Any, Final

from shared.vhost_device import Ring
from shared.vhost_memory import Mapping as MemoryMapping

NO_GPA: Final = (1 << 64) - 1


class VringError(IntEnum):
    """enum vring_error."""

    OK = 0
    TOO_LONG = 1
    BAD_NEXT = 2
    BAD_ADDRESS = 3
    BAD_INDIRECT = 4
    BAD_ORDER = 5
    ZERO_LENGTH = 6
    BAD_REQUEST = 7
    BAD_INDEX = 16
    BAD_HEAD = 17
    HEAD_IN_USE = 18
    BAD_SETUP = 19


class Step(IntEnum):
    """enum vring_step: where a test lets the process die."""

    NONE = 0
    POPPED = 1
    COUNTED = 2
    MARKED = 3
    DONE = 4
    LINKED = 5
    FILLED = 6
    PUBLISHED = 7
    CLEARED = 8
    SETTLED = 9


class vring_setup(ctypes.Structure):
    _fields_ = (
        ("desc", c_uint64),
        ("avail", c_uint64),
        ("used", c_uint64),
        ("used_gpa", c_uint64),
        ("inflight", c_uint64),
        ("index", c_uint32),
        ("size", c_uint16),
        ("base", c_uint16),
        ("kick_fd", c_int32),
        ("call_fd", c_int32),
        ("inflight_desc_num", c_uint16),
        ("event_idx", c_uint8),
        ("indirect", c_uint8),
    )


class vring_region(ctypes.Structure):
    _fields_ = (("gpa", c_uint64), ("size", c_uint64), ("host", c_uint64))


def setup_of(ring: Ring, *, event_idx: bool, indirect: bool) -> vring_setup:
    return vring_setup(
        desc=ring.desc, avail=ring.avail, used=ring.used, used_gpa=ring.used_gpa if ring.log_used else NO_GPA,
        inflight=ring.inflight, inflight_desc_num=ring.inflight_desc_num, index=ring.index, size=ring.size,
        base=ring.base, kick_fd=ring.kick_fd, call_fd=ring.call_fd, event_idx=event_idx, indirect=indirect,
    )  # fmt: skip


def regions_of(mappings: tuple[MemoryMapping, ...]) -> ctypes.Array[vring_region]:
    table = (vring_region * len(mappings))()
    for entry, mapping in zip(table, mappings, strict=True):
        entry.gpa, entry.size, entry.host = mapping.gpa, mapping.size, mapping.address
    return table


def bind(library: ctypes.CDLL, functions: Mapping[str, tuple[object, tuple[object, ...]]]) -> ctypes.CDLL:
    """Give the functions their types: name -> (result, arguments)."""
    for name, (result, arguments) in functions.items():
        function: Any = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check(result: int, what: str) -> int:
    """A result of a loop's API, or the OSError that it stands for."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Pulse:
    """The epoch of a device with several native threads: rises only while each of them takes turns."""

    def __init__(self) -> None:
        self._epoch = 0
        self._seen: dict[int, int] = {}

    def take(self, turns: dict[int, int]) -> int:
        """`turns`: each running thread's own counter. What stops running is forgotten."""
        if all(self._seen.get(index) != turn for index, turn in turns.items()):
            self._epoch += 1
        self._seen = turns
        return self._epoch
