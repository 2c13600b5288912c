"""Bodies of vm.send-migration and vm.receive-migration, checked. Raises ConfigError that names the key.

What bounds the rounds of a remote migration (downtime_ms, timeout_s, timeout_strategy) holds for a local one anyway: it
has no rounds. Keys of Cloud Hypervisor that would change what is done are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shared.errors import ConfigError

MAX_PATH = 107  # bytes of a unix socket's path
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


@dataclass(frozen=True, slots=True)
class SendArguments:
    url: str
    local: bool
    options: dict[str, Any] = field(default_factory=dict)


def parse_send(body: Any) -> SendArguments:
    """{"destination_url": …, "local": …, …}."""
    given = _known(body, "vm.send-migration", ("destination_url", "local", *_BOUNDS))
    local = given.get("local", False)
    if not isinstance(local, bool):
        raise ConfigError("vm.send-migration: local is not a boolean")
    url = _url(given, "destination_url")
    return SendArguments(url, local, {key: given[key] for key in _BOUNDS if key in given})


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
        raise ConfigError(f"{key} is missing", f"give {key} as unix:<path>")
    return url


def unix_path(url: str) -> str:
    """The path of a URL that names a unix socket. Raises ConfigError that says what is wrong with it."""
    scheme, _, path = url.partition(":")
    if scheme == "tcp":
        raise ConfigError(f"{url}: remote migration is not available yet", "use a unix: URL on the same host")
    if scheme != "unix" or not path or "\0" in path:
        raise ConfigError(f"migration URL {url!r}: expected unix:<path>")
    if len(path.encode()) > MAX_PATH:
        raise ConfigError(f"migration URL {url}: a unix socket's path has {MAX_PATH} bytes at most")
    return path


def require_local(url: str, local: bool) -> None:
    """Raises ConfigError for a send that would have to copy RAM."""
    if not local:
        raise ConfigError(
            f"{url}: remote migration is not available yet in this version", "use --local (local=on) on the same host"
        )
