"""KVM's binary statistics (Documentation/virt/kvm/api.rst, 4.133), read from what a statistics descriptor tells.

    header │ id │ descriptors: flags (type, unit, base), exponent, size, offset, name │ values, 64 bits each
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

HEADER: Final = struct.Struct("=6I")  # flags name_size num_desc id_offset desc_offset data_offset
DESCRIPTOR: Final = struct.Struct("=IhHII")  # flags exponent size offset bucket_size; then the name
KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, KVM_STATS_TYPE_PEAK = 0, 1, 2
KVM_STATS_BASE_POW2: Final = 1
UNITS: Final = ("", "bytes", "seconds", "cycles", "boolean")
MAX_NAME: Final = 256


@dataclass(frozen=True, slots=True)
class KvmStat:
    """Seconds and bytes are just these, whatever the kernel counts in; `unit` is "" for a plain number."""

    name: str
    unit: str
    cumulative: bool
    value: float


def parse(table: bytes) -> list[KvmStat]:
    """All scalar ones; histograms are left out. Empty for what is no table."""
    if len(table) < HEADER.size:
        return []
    _, name_size, count, _, at, data = HEADER.unpack_from(table)
    if name_size > MAX_NAME:
        return []
    each = DESCRIPTOR.size + name_size
    stats = []
    for start in range(at, min(at + each * count, len(table) - each + 1), each):
        flags, exponent, _, offset, _ = DESCRIPTOR.unpack_from(table, start)
        kind, unit, base = flags & 15, flags >> 4 & 15, flags >> 8 & 15
        raw = table[data + offset : data + offset + 8]
        if kind <= KVM_STATS_TYPE_PEAK and len(raw) == 8:
            name = table[start + DESCRIPTOR.size : start + each].partition(b"\0")[0].decode(errors="replace")
            scale = (2.0 if base == KVM_STATS_BASE_POW2 else 10.0) ** exponent
            value = int.from_bytes(raw, "little") * scale
            word = UNITS[unit] if unit < len(UNITS) else ""
            stats.append(KvmStat(name, word, kind == KVM_STATS_TYPE_CUMULATIVE, value))
    return stats
