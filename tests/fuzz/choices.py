"""An input as a sequence of choices: what a target's bytes decide, one after the other; zeros behind their end.

`junk` and `damage` make what a hostile peer would put where a number, a string or a map is expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
         (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    None, True, False, "", "x", "\0", "off", b"", b"\0\xff", 0.0, -1.5, math.inf, math.nan, -1, -(1 << 63), "9" * 40,
)  # fmt: skip


class Choices:
    """The input's bytes, consumed from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def bytes(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        self._at += size
        return part.ljust(size, b"\0")

    def rest(self) -> bytes:
        part, self._at = self._data[self._at :], len(self._data)
        return part

    def integer(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def below(self, limit: int) -> int:
        return self.integer(1 if limit <= 256 else 2 if limit <= 65536 else 4) % limit

    def flag(self) -> bool:
        return bool(self.integer(1) & 1)

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def number(self, bits: int) -> int:
        """Any of so many bits; half of the time one at an edge."""
        kind = self.integer(1)
        value = EDGES[kind % len(EDGES)] if kind & 128 else self.integer(1 + (kind & 7))
        return value & (1 << bits) - 1

    def junk(self, depth: int = 0) -> Any:
        """A value of any type that JSON or msgpack can carry."""
        kind = self.below(8)
        if kind < 3:
            return self.one_of(SCALARS)
        if kind < 6 or depth > 3:
            return self.number(64)
        if kind == 6:
            return [self.junk(depth + 1) for _ in range(self.below(5))]
        return {self.one_of(("", "x", "flotilla", 1, "size")): self.junk(depth + 1) for _ in range(self.below(3))}

    def damage(self, value: Any) -> Any:
        """A copy with some things changed: replaced, dropped, doubled, moved."""
        places: list[tuple[Any, Any]] = []
        root = [_copy(value)]
        _walk(root, places)
        for _ in range(1 + self.below(3)):
            holder, key = places[self.below(len(places))]
            self._damage_one(holder, key, places)
        return root[0]

    def _damage_one(self, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
        if not (key in holder if isinstance(holder, dict) else key < len(holder)):
            return  # an earlier change has taken it away
        match self.below(8):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder[key], list):
                holder[key] = holder[key] * self.below(4)
            case 2 if isinstance(holder[key], dict):
                holder[key][self.one_of(("", "x", 3, "flotilla"))] = self.junk()
            case 3:
                other, name = places[self.below(len(places))]
                if name in other if isinstance(other, dict) else name < len(other):
                    holder[key] = _copy(other[name])
            case 4 if isinstance(holder[key], int):
                holder[key] += self.one_of((-1, 1, 1 << 8, 1 << 32, 1 << 64))
            case 5 if isinstance(holder[key], (str, bytes)):
                holder[key] = holder[key] * self.below(300)
            case _:
                holder[key] = self.junk()


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(below) for below in value]
    return value


def _walk(holder: Any, places: list[tuple[Any, Any]]) -> None:
    for key in holder if isinstance(holder, dict) else range(min(len(holder), 40)):
        places.append((holder, key))
        if isinstance(holder[key], (dict, list)) and len(places) < 2000:
            _walk(holder[key], places)
