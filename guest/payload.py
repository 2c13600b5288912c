"""Datagram payloads that say whether they are whole: guest/net.h and packet.c, seen from the host.

Little-endian words: magic, stream, number, then words that follow from those two, then zeros up to a multiple of 8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from guest.lines import mix64

MAGIC: Final = 0x3154454E544F4C46
SMALLEST: Final = 32  # with one word that follows
_STEP: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Payload:
    """One whole, undamaged payload."""

    stream: int
    number: int


def encode(payload: Payload, length: int) -> bytes:
    """`length` bytes, SMALLEST or more."""
    count = (length - 24) // 8
    key = mix64(payload.stream ^ mix64(payload.number))
    words = [(key + i * _STEP) & _MASK for i in range(count)]
    return struct.pack(f"<{3 + count}Q", MAGIC, payload.stream, payload.number, *words).ljust(length, b"\0")


def decode(data: bytes) -> Payload:
    """Raises ValueError for a payload of somebody else's, or a damaged one."""
    if len(data) < SMALLEST:
        raise ValueError(f"{len(data)} bytes are no payload of the probe guest's")
    magic, stream, number = struct.unpack_from("<3Q", data)
    if magic != MAGIC:
        raise ValueError("no payload of the probe guest's")
    payload = Payload(stream, number)
    if encode(payload, len(data)) != data:
        raise ValueError(f"payload {number} of stream {stream} is damaged")
    return payload
