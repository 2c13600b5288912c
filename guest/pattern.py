"""The sectors that `mode=blkload` writes, read from the host: guest/pattern.h and mode_blkload.c.

A sector is 64 little-endian words: magic, its own number, the generation of its block, the run's seed, and 60 words
that follow from those, so that each sector says by itself whether, where and in which write it was made.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guest.lines import mix64

SECTOR: Final = 512
MAGIC: Final = 0x314B4C42544F4C46
_STEP: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_WORDS: Final = struct.Struct("<64Q")
_HEADER: Final = struct.Struct("<4Q")


@dataclass(frozen=True, slots=True)
class Sector:
    """One whole, undamaged sector."""

    number: int
    generation: int
    seed: int


def encode(sector: Sector) -> bytes:
    """The 512 bytes that the guest writes."""
    key = mix64(sector.seed ^ mix64(sector.number ^ mix64(sector.generation)))
    words = [(key + i * _STEP) & _MASK for i in range(60)]
    return _WORDS.pack(MAGIC, sector.number, sector.generation, sector.seed, *words)


def header(data: bytes) -> Sector | None:
    """What 512 bytes say that they are, damaged or not; None when they are no sector of the guest's."""
    magic, number, generation, seed = _HEADER.unpack_from(data)
    return Sector(number, generation, seed) if magic == MAGIC else None


def decode(data: bytes) -> Sector | None:
    """What 512 bytes hold; None when they are no sector of the guest's. Raises ValueError when it is damaged."""
    sector = header(data)
    if sector is not None and encode(sector) != data:
        raise ValueError(f"sector {sector.number}, generation {sector.generation}: the pattern is damaged")
    return sector


def damage(image: Path, block_bytes: int, first: int) -> Iterator[str]:
    """What is wrong with a raw image after a run on blocks of `block_bytes` from sector `first`: sectors that are
    damaged or in the wrong place, and blocks whose sectors come from different writes."""
    sectors = block_bytes // SECTOR
    with open(image, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(first * SECTOR)
        for start in range(first, size // SECTOR - sectors + 1, sectors):
            found = set()
            block = file.read(block_bytes)
            for number in range(start, start + sectors):
                at = (number - start) * SECTOR
                try:
                    sector = decode(block[at : at + SECTOR])
                except ValueError as error:
                    yield f"sector {number}: {error}"
                    continue
                if sector and sector.number != number:
                    yield f"sector {number} holds sector {sector.number}"
                found.add(sector and (sector.generation, sector.seed))
            if len(found) > 1:
                yield f"block at sector {start} is torn: {found}"
