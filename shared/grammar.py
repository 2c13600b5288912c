"""Cloud Hypervisor's option strings: `path=a.raw,readonly=on`, `tty`, `file="a,b"`, `[0,2-4]`, `[1@[2,3]]`.

Commas separate options; inside double quotes and square brackets (which nest) they don't. Double quotes are
removed from plain values, so a value cannot hold one. `key=` counts as not given. Every error is a
ConfigError of Cloud Hypervisor's wording whose hint says what would have been right.

A converter takes (key, value) and returns the value or raises ConfigError; a table {key: converter} is a
grammar.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from shared.errors import ConfigError
from shared.typed import Any, TypeVar

Converter = Callable[[str, str], Any]
T = TypeVar("T")

# What an attacker-free but mistyped `[0-4000000000]` may cost: no list of the grammar names more things than
# this.
MAX_LIST = 65536
U64_MAX = (1 << 64) - 1

_TOGGLES = {"on": True, "true": True, "off": False, "false": False, "": False}
_SUFFIXES = {"K": 10, "M": 20, "G": 30}


def split(text: str, separator: str = ",") -> list[str]:
    """Cut at each separator outside quotes and brackets; the quotes stay. "" gives []. Raises ConfigError."""
    parts: list[str] = []
    start = depth = 0
    quoted = False
    for position, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
            if depth < 0:
                break
        elif character == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if quoted:
        raise ConfigError(f"Invalid syntax: {text}", "a double quote is not closed")
    if depth:
        raise ConfigError(f"Invalid syntax: {text}", "a square bracket has no partner")
    if text:
        parts.append(text[start:])
    return parts


def parse(text: str, keys: Mapping[str, Converter], bare: Mapping[str, T] | None = None) -> dict[str, Any]:
    """The options of one string by key, converted; what is not given, or given empty, is absent.

    bare: words that stand without `=`, each with the value that is then stored under the word itself.
    Raises ConfigError for an unknown key, a key given twice, a token without `=`, an unconvertible value.
    """
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for token in split(text.strip()):
        key, equals, value = token.partition("=")
        key = key.strip()
        if not equals:
            if bare is None or key not in bare:
                raise ConfigError(f"Invalid syntax: {token or text}", _expected_token(keys, bare))
            value = ""
        elif key not in keys:
            raise ConfigError(f"Unknown option: {key}", f"known: {', '.join(_public(keys))}")
        if key in seen:
            raise ConfigError(f"Invalid syntax: {text}", f"{key} is given twice")
        seen.add(key)
        if not equals and bare is not None:
            found[key] = bare[key]
        elif value:
            found[key] = keys[key](key, value)
    return found


def _public(keys: Mapping[str, object]) -> list[str]:
    return [key for key in keys if not key.startswith("_")]


def _expected_token(keys: Mapping[str, object], bare: Mapping[str, object] | None) -> str:
    words = [*(bare or ()), *(f"{key}=…" for key in _public(keys))]
    return f"expected {', '.join(words)}"


def unquoted(value: str) -> str:
    return value.replace('"', "")


def _refuse(key: str, value: str, expected: str) -> ConfigError:
    return ConfigError(f"Unable to convert {value} for {key}", f"expected {expected}")


def string(key: str, value: str) -> str:
    return unquoted(value)


def path(key: str, value: str) -> str:
    """A path; a leading `~/` is the home directory, since not every shell expands it after `key=`."""
    return expand_home(unquoted(value))


def expand_home(value: str) -> str:
    return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value


def toggle(key: str, value: str) -> bool:
    try:
        return _TOGGLES[unquoted(value).lower()]
    except KeyError:
        raise ConfigError(f"Invalid value: {value}", f"{key} is on, off, true or false") from None


def _number(text: str) -> int | None:
    """int() without its liberties (blanks, underscores, other scripts' digits, signs); None for what is no
    u64.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        return None
    value = int(text)
    return value if value <= U64_MAX else None


def integer(key: str, value: str) -> int:
    number = _number(unquoted(value))
    if number is None:
        raise _refuse(key, value, "a whole number")
    return number


def byte_size(key: str, value: str) -> int:
    """`4096`, `512K`, `512M`, `1G`: binary multiples, in bytes, below 2**64."""
    text = unquoted(value)
    shift = _SUFFIXES.get(text[-1:], 0)
    number = _number(text[:-1] if shift else text)
    if number is None or number << shift > U64_MAX:
        raise _refuse(key, value, "bytes, or a number with K, M or G such as 512M")
    return number << shift


def colon_list(count: int) -> Converter:
    """`2:2:1:1`: exactly `count` numbers."""

    def convert(key: str, value: str) -> tuple[int, ...]:
        numbers = [_number(part) for part in unquoted(value).split(":")]
        if len(numbers) != count or None in numbers:
            raise _refuse(key, value, f"{count} numbers with colons between them")
        return tuple(number for number in numbers if number is not None)

    return convert


def choice(**values: T) -> Converter:
    """One of some words (in any case; `_` of the names given stands for `-`)."""
    words = {name.replace("_", "-"): value for name, value in values.items()}

    def convert(key: str, value: str) -> T:
        try:
            return words[unquoted(value).lower()]
        except KeyError:
            raise ConfigError(f"Invalid value: {value}", f"{key} is one of {', '.join(words)}") from None

    return convert


def _bracketed(value: str) -> str | None:
    value = value.strip()
    return value[1:-1] if value.startswith("[") and value.endswith("]") else None


def integer_list(key: str, value: str) -> tuple[int, ...]:
    """`[0,2-4]` is (0, 2, 3, 4); a single number needs no brackets."""
    expected = "a number or a list such as [0,2-4]"
    inner = _bracketed(value)
    numbers: list[int] = []
    for token in split(value if inner is None else inner):
        first, dash, last = token.strip().partition("-")
        low, high = _number(first), _number(last if dash else first)
        if low is None or high is None or high < low or high - low + len(numbers) >= MAX_LIST:
            raise _refuse(key, value, expected)
        numbers.extend(range(low, high + 1))
    if inner is None and len(numbers) != 1:
        raise _refuse(key, value, expected)
    return tuple(numbers)


def string_list(key: str, value: str) -> tuple[str, ...]:
    """`[a,"b,c"]` is ("a", "b,c"); a single string needs no brackets."""
    inner = _bracketed(value)
    return (unquoted(value),) if inner is None else tuple(unquoted(token) for token in split(inner))


def tuple_list(first: Callable[[str, str], T], second: Converter) -> Converter:
    """`[a@[1,2],b@[3]]` or `[a@3]`: pairs, each half with a converter of its own."""

    def convert(key: str, value: str) -> tuple[tuple[T, Any], ...]:
        inner = _bracketed(value)
        if inner is None:
            raise _refuse(key, value, "a list of pairs such as [0@[1,2],1@[3]]")
        pairs = []
        for token in split(inner):
            left, at, right = token.strip().partition("@")
            if not at or not left or not right:
                raise _refuse(key, value, "pairs such as 0@[1,2]")
            pairs.append((first(key, left), second(key, right)))
        return tuple(pairs)

    return convert


def not_yet(convert: Converter = string, harmless: object = None) -> Converter:
    """A key that Cloud Hypervisor knows and this version lacks: only the value that changes nothing passes."""

    def check(key: str, value: str) -> Any:
        converted = convert(key, value)
        if converted != harmless:
            raise ConfigError(
                f"{key}={value} is not available yet in this version of Flotilla", f"leave {key} out"
            )
        return converted

    return check
