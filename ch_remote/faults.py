"""The argument of `fault-inject` to the body of vmm.fault-inject: `process=_disk0,fault=slow,value=20,request=100`."""

from __future__ import annotations

from typing import Any, Final

from shared.errors import ConfigError
from shared.grammar import Converter, integer, parse, string

POINTS: Final = ("state", "message", "request", "step")


def _rate(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"Unable to convert {value} for {key}", "expected a part such as 0.01") from None


def _range(key: str, value: str) -> list[int]:
    """`8-15`, or one sector."""
    first, dash, last = value.partition("-")
    return [integer(key, first), integer(key, last if dash else first)]


def _number_or_word(key: str, value: str) -> int | str:
    word = string(key, value)
    return integer(key, word) if word.isdigit() else word


_FAULT: Final[dict[str, Converter]] = {
    **dict.fromkeys(("process", "fault", "shape", "state", "message", "step"), string),
    **dict.fromkeys(("request", "spread", "count", "duration_ms", "seed"), integer),
    "value": _number_or_word,
    "rate": _rate,
    "sectors": _range,
}


def fault_body(text: str) -> dict[str, Any]:
    """Only what was given: the VMM judges it. Raises ConfigError."""
    given = parse(text, _FAULT)
    at = {key: given.pop(key) for key in POINTS if key in given}
    return given | ({"at": at} if at else {})
