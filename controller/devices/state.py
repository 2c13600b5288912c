"""Checked reading of a device's saved state, which may come from a file or a peer and is not trusted.

Key names and shapes are Cloud Hypervisor's; what it does not carry is ours alone, under the key `flotilla`.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import ProtocolError

State = dict[str, object]
PRIVATE = "flotilla"


class Fields:
    """One state dict. Every accessor raises ProtocolError that names the device, the key and what was expected."""

    __slots__ = ("_state", "where")

    def __init__(self, where: str, state: object) -> None:
        if not isinstance(state, Mapping):
            raise ProtocolError(f"state of {where}: expected an object, not {type(state).__name__}")
        self.where = where
        self._state = state

    def _bad(self, key: str, expected: str) -> ProtocolError:
        return ProtocolError(f"state of {self.where}: {key}: expected {expected}")

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def _get(self, key: str, expected: str) -> object:
        if key not in self._state:
            raise self._bad(key, f"{expected}, but the key is missing")
        return self._state[key]

    def integer(self, key: str, bits: int) -> int:
        """An unsigned integer of at most `bits` bits."""
        expected = f"an unsigned integer of {bits} bits"
        value = self._get(key, expected)
        if type(value) is not int or not 0 <= value < 1 << bits:
            raise self._bad(key, expected)
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key, "a boolean")
        if not isinstance(value, bool):
            raise self._bad(key, "a boolean")
        return value

    def text(self, key: str) -> str:
        value = self._get(key, "a string")
        if not isinstance(value, str):
            raise self._bad(key, "a string")
        return value

    def items(self, key: str, count: int | None = None, limit: int = 4096) -> list[object]:
        """A list of exactly `count` items, or of at most `limit`."""
        expected = f"a list of {count} items" if count is not None else f"a list of at most {limit} items"
        value = self._get(key, expected)
        if not isinstance(value, (list, tuple, bytes, bytearray)):
            raise self._bad(key, expected)
        if len(value) != count if count is not None else len(value) > limit:
            raise self._bad(key, f"{expected}, not {len(value)}")
        return list(value)

    def integers(self, key: str, bits: int, count: int | None = None, limit: int = 4096) -> list[int]:
        values = self.items(key, count, limit)
        numbers = [v for v in values if type(v) is int and 0 <= v < 1 << bits]
        if len(numbers) != len(values):
            raise self._bad(key, f"unsigned integers of {bits} bits")
        return numbers

    def flags(self, key: str, count: int) -> list[bool]:
        values = self.items(key, count)
        flags = [v for v in values if isinstance(v, bool)]
        if len(flags) != len(values):
            raise self._bad(key, "booleans")
        return flags

    def section(self, key: str) -> Fields:
        return Fields(f"{self.where}.{key}", self._get(key, "an object"))

    def maps(self, key: str) -> dict[str, Fields]:
        """An object of objects, by name."""
        below = self.section(key)
        if not all(isinstance(name, str) for name in below._state):
            raise self._bad(key, "names")
        return {name: below.section(name) for name in below._state}

    def raw(self, key: str) -> object:
        return self._get(key, "a value")

    def sections(self, key: str, count: int | None = None, limit: int = 4096) -> list[Fields]:
        return [Fields(f"{self.where}.{key}[{i}]", v) for i, v in enumerate(self.items(key, count, limit))]

    def private(self) -> Fields:
        """What only Flotilla writes; empty in a state that Cloud Hypervisor wrote."""
        return self.section(PRIVATE) if PRIVATE in self._state else Fields(f"{self.where}.{PRIVATE}", {})
