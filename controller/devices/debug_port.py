"""Ports for debugging: POST codes at 0x80, firmware messages at 0x402, the debug console at 0xE9.

Source: the reference's cloud-hypervisor-machine page, sections 1.4 and 5.2. None of them has a state.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shared import log
from shared.typed import Final

_RANGES: Final = ("Firmware", "Bootloader", "Kernel", "Userspace")  # codes 0x00, 0x20, 0x40 and 0x60 onwards
_PRESENT: Final = 0xE9


class DebugPort:
    """Port 0x80: every code written is logged with the time since the VM was made."""

    def __init__(self, began_ns: int | None = None) -> None:
        self._began_ns = time.monotonic_ns() if began_ns is None else began_ns

    def read(self, offset: int, size: int) -> int | None:
        return None

    def write(self, offset: int, size: int, value: int) -> None:
        code = value & 0xFF
        kind = _RANGES[code >> 5] if code < 0x80 else "Custom"
        elapsed = (time.monotonic_ns() - self._began_ns) / 1e9
        log.info(f"Debug I/O port: {kind} code {code:#x} at {elapsed:.6f} s")


class DebugConsole:
    """A port that takes characters, one byte each. `reply` is what a read gives, None for nothing."""

    def __init__(self, output: Callable[[bytes], None], reply: int | None = None) -> None:
        self._output = output
        self._reply = reply

    def read(self, offset: int, size: int) -> int | None:
        return self._reply if size == 1 else None

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1:
            self._output(bytes((value,)))


def firmware_debug_port(output: Callable[[bytes], None]) -> DebugConsole:
    """Port 0x402; a read answers 0xE9, by which firmware recognises it."""
    return DebugConsole(output, _PRESENT)
