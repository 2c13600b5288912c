"""Bodies and URLs of vm.send-migration and vm.receive-migration, checked. Raises ConfigError that names the key.

What bounds the rounds of a remote migration (downtime_ms, timeout_s, timeout_strategy) holds for a local one anyway: it
has no rounds. Keys of Cloud Hypervisor that would change what is done are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shared.errors import ConfigError
from shared.listening import MAX_PATH

DOWNTIME_MS = 300
TIMEOUT_S = 3600
_BOUNDS = ("downtime_ms", "timeout_s", "timeout_strategy")
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "connections": (None, 1),
    "preserve_source": (None, False),
    "memory_mode": (None, "Precopy", "precopy"),
    "tls_dir": (None,),
    "vfio_fds": (None, []),
    "iommufd_fd": (None,),
    "zone_updates": (None, []),
    "net_fds": (None, []),
}


class Strategy(StrEnum):
    """When the guest writes faster than the network carries, until the time is up."""

    CANCEL = "cancel"  # the guest stays
    IGNORE = "ignore"  # it goes, whatever the pause takes


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long the guest may stand still, and how long all may take.

    `strict`: somebody asked for this downtime_ms. The default is a wish: where pausing and starting alone take longer,
    or the guest dirties what the network carries, it moves all the same (rounds.py).
    """

    downtime_ms: int = DOWNTIME_MS
    timeout_s: int = TIMEOUT_S
    strategy: Strategy = Strategy.CANCEL
    strict: bool = True


UNASKED = Bounds(strict=False)  # of a send that says nothing about them


@dataclass(frozen=True, slots=True)
class Url:
    """Where a migration goes: `path` of a unix socket, or `host` and `port`."""

    text: str
    path: str = ""
    host: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True)
class SendArguments:
    url: str
    local: bool
    bounds: Bounds = UNASKED


def parse_send(body: Any) -> SendArguments:
    """{"destination_url": …, "local": …, …}."""
    given = _known(body, "vm.send-migration", ("destination_url", "local", *_BOUNDS))
    local = given.get("local", False)
    if not isinstance(local, bool):
        raise ConfigError("vm.send-migration: local is not a boolean")
    url = _url(given, "destination_url")
    return SendArguments(url, local, _bounds(given))


def _bounds(given: dict[str, Any]) -> Bounds:
    numbers = {"downtime_ms": DOWNTIME_MS, "timeout_s": TIMEOUT_S}
    for key in numbers:
        if given.get(key) is not None:
            value = given[key]
            if type(value) is not int or value < 1:
                raise ConfigError(f"vm.send-migration: {key} is not a whole number of at least 1")
            numbers[key] = value
    strategy = given.get("timeout_strategy") or "cancel"
    if not isinstance(strategy, str) or strategy.lower() not in set(Strategy):
        raise ConfigError("vm.send-migration: timeout_strategy is neither Cancel nor Ignore")
    strict = given.get("downtime_ms") is not None
    return Bounds(numbers["downtime_ms"], numbers["timeout_s"], Strategy(strategy.lower()), strict)


def parse_receive(body: Any) -> str:
    """{"receiver_url": …}; the URL."""
    return _url(_known(body, "vm.receive-migration", ("receiver_url",)), "receiver_url")


def _known(body: Any, request: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ConfigError(f"{request}: the body is not an object")
    for key, value in body.items():
        if key in keys:
            continue
        if key not in _HARMLESS:
            raise ConfigError(f"{request}: unknown field {key}", f"known: {', '.join(keys)}")
        if value not in _HARMLESS[key]:
            raise ConfigError(f"{request}: {key} is not available yet in this version", f"leave {key} out")
    return body


def _url(body: dict[str, Any], key: str) -> str:
    url = body.get(key)
    if not isinstance(url, str):
        raise ConfigError(f"{key} is missing", f"give {key} as unix:<path> or tcp:<host>:<port>")
    return url


def parse_url(url: str) -> Url:
    """Raises ConfigError that says what is wrong with it."""
    scheme, _, rest = url.partition(":")
    if scheme == "unix" and rest and "\0" not in rest:
        if len(rest.encode()) > MAX_PATH:
            raise ConfigError(f"migration URL {url}: a unix socket's path has {MAX_PATH} bytes at most")
        return Url(url, path=rest)
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536:
        return Url(url, host=host.strip("[]"), port=int(port))
    raise ConfigError(f"migration URL {url!r}: expected unix:<path> or tcp:<host>:<port>")


def unix_path(url: str) -> str:
    """The path of the URL of a local migration, whose descriptors pass by a unix socket only. Raises ConfigError."""
    path = parse_url(url).path
    if not path:
        raise ConfigError(f"migration URL {url}: a local migration needs unix:<path>", "leave local out")
    return path


def parse_resolve(body: Any) -> bool:
    """{"guest": "here" | "there"} of vm.migration-resolve; whether it is here."""
    guest = _known(body, "vm.migration-resolve", ("guest",)).get("guest")
    if guest not in ("here", "there"):
        raise ConfigError("vm.migration-resolve: guest is neither here nor there")
    return bool(guest == "here")
