"""32-bit atomics on mapped memory, sequentially consistent: what a word shared between processes needs (atomics.c).

Addresses are this process's, aligned to 4 bytes, of memory that the caller keeps mapped.
"""

from __future__ import annotations

import ctypes
from functools import cache

from shared import native


@cache
def _library() -> ctypes.CDLL:
    library = native.load("atomics")
    library.load32.argtypes = (ctypes.c_void_p,)
    library.load32.restype = ctypes.c_uint32
    library.store32.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.store32.restype = None
    library.cas32.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32)
    library.cas32.restype = ctypes.c_uint32
    return library


def preload() -> None:
    """For a process that can open no file later (shared/sandbox.py)."""
    _library()


def load32(address: int) -> int:
    return int(_library().load32(address))


def store32(address: int, value: int) -> None:
    _library().store32(address, value)


def cas32(address: int, expected: int, desired: int) -> int:
    """Store `desired` if the word holds `expected`; returns what it held, so equality with `expected` means success."""
    return int(_library().cas32(address, expected, desired))
