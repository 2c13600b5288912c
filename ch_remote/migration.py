"""The argument of send-migration and receive-migration, in every syntax that Cloud Hypervisor has had.

    unix:/tmp/sock                               up to v52 (send: with --local before or after it)
    destination_url=unix:/tmp/sock,local=on      send, from v52 on
    receiver_url=unix:/tmp/sock                  receive, from v53 on

Results are the JSON bodies of the API. Raises ConfigError that names the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shared.errors import ConfigError

Converter = Callable[[str, str], Any]
_SCHEMES = ("unix:", "tcp:")


def send_body(argument: str, local_flag: bool = False) -> dict[str, Any]:
    """Body of vm.send-migration: destination_url and local, and of the other keys those that were given."""
    given = _options(argument, "destination_url", _SEND)
    if local_flag and given.get("local") is False:
        raise ConfigError("--local and local=off contradict each other", "leave one of them out")
    given["local"] = local_flag or given.get("local", False)
    if given["local"] and not given["destination_url"].startswith("unix:"):
        raise ConfigError(
            f"A local migration needs a unix: URL, not {given['destination_url']}",
            "file descriptors pass no other way",
        )
    return {key: value for key, value in given.items() if key not in _IMPLIED}


def receive_body(argument: str) -> dict[str, Any]:
    """Body of vm.receive-migration."""
    given = _options(argument, "receiver_url", _RECEIVE)
    return {key: value for key, value in given.items() if key not in _IMPLIED}


def _options(argument: str, url_key: str, keys: dict[str, Converter]) -> dict[str, Any]:
    if argument.startswith(_SCHEMES):
        _check_bare(argument, url_key, keys)
        return {url_key: _url(url_key, argument)}
    found: dict[str, Any] = {}
    for token in _split(argument):
        key, equals, value = token.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(
                f"Invalid syntax: {token or argument}", f"expected {url_key}=unix:<path>, or unix:<path>"
            )
        if key not in keys:
            raise ConfigError(f"Unknown option: {key}", f"known: {', '.join(keys)}")
        if key in found:
            raise ConfigError(f"Invalid syntax: {argument}", f"{key} is given twice")
        if value:
            found[key] = keys[key](key, value.replace('"', ""))
    if url_key not in found:
        raise ConfigError(f"{url_key} is missing", f"give {url_key}=unix:<path>")
    return found


def _check_bare(argument: str, url_key: str, keys: dict[str, Converter]) -> None:
    """`unix:/sock,local=on` mixes both syntaxes: taken literally it would be a path that nobody meant."""
    for part in argument.split(",")[1:]:
        if part.partition("=")[0] in keys:
            raise ConfigError(f"Invalid syntax: {argument}", f"with options, write {url_key}={argument}")


def _split(text: str) -> list[str]:
    """Cut at commas outside double quotes."""
    tokens = [""]
    quoted = False
    for character in text:
        if character == '"':
            quoted = not quoted
        if character == "," and not quoted:
            tokens.append("")
        else:
            tokens[-1] += character
    if quoted:
        raise ConfigError(f"Invalid syntax: {text}", "a double quote is not closed")
    return tokens


def _number(text: str, least: int, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most


def _url(key: str, value: str) -> str:
    scheme, _, rest = value.partition(":")
    host, _, port = rest.rpartition(":")
    if scheme == "unix" and rest:
        return value
    if scheme == "tcp" and host and _number(port, 1, 65535):
        return value
    raise ConfigError(f"Invalid value for {key}: {value}", "expected unix:<path> or tcp:<host>:<port>")


def _toggle(key: str, value: str) -> bool:
    words = {"on": True, "true": True, "off": False, "false": False}
    if value.lower() not in words:
        raise ConfigError(f"Invalid value: {value}", f"{key} is on, off, true or false")
    return words[value.lower()]


def _positive(key: str, value: str) -> int:
    if not _number(value, 1, (1 << 64) - 1):
        raise ConfigError(f"Unable to convert {value} for {key}", "expected a whole number, at least 1")
    return int(value)


def _strategy(key: str, value: str) -> str:
    words = {"cancel": "Cancel", "ignore": "Ignore"}
    if value.lower() not in words:
        raise ConfigError(f"Invalid value: {value}", f"{key} is cancel or ignore")
    return words[value.lower()]


def _not_yet(*harmless: str) -> Converter:
    """A key of Cloud Hypervisor that this version lacks: only values that change nothing pass."""

    def check(key: str, value: str) -> str:
        if value.lower() not in harmless:
            raise ConfigError(
                f"{key}={value} is not available yet in this version of Flotilla", f"leave {key} out"
            )
        return value

    return check


# Keys that were checked and say what is the case anyway.
_IMPLIED: dict[str, Converter] = {
    "preserve_source": _not_yet("off", "false"),
    "connections": _not_yet("1"),
    "tls_dir": _not_yet(),
    "memory_mode": _not_yet("precopy"),
    "vfio_fds": _not_yet(),
    "iommufd_fd": _not_yet(),
    "zone_updates": _not_yet(),
}
_SEND: dict[str, Converter] = {
    "destination_url": _url,
    "local": _toggle,
    "downtime_ms": _positive,
    "timeout_s": _positive,
    "timeout_strategy": _strategy,
    **{key: _IMPLIED[key] for key in ("preserve_source", "connections", "tls_dir", "memory_mode")},
}
_RECEIVE: dict[str, Converter] = {
    "receiver_url": _url,
    **{key: _IMPLIED[key] for key in ("tls_dir", "memory_mode", "vfio_fds", "iommufd_fd", "zone_updates")},
}
