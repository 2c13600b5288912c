"""`--metrics ADDRESS:PORT` and `--metrics-socket PATH`: where figures are served."""

from __future__ import annotations

from shared.errors import ConfigError
from shared.records import Record

FORM = "give an address of this host and a port, as 127.0.0.1:9100 or [::1]:9100"
V4_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0.0.0.0 listens on every address, too


class MetricsTarget(Record):
    """A unix socket's path, or a numeric address and a port."""

    path: str | None = None
    host: str = ""
    port: int = 0

    @property
    def flag(self) -> str:
        """As the user wrote it."""
        if self.path is not None:
            return f"--metrics-socket {self.path}"
        return f"--metrics [{self.host}]:{self.port}" if ":" in self.host else f"--metrics {self.host}:{self.port}"


def parse_path(text: str) -> MetricsTarget:
    """Raises ConfigError."""
    if not text:
        raise ConfigError("Error parsing --metrics-socket: the path is empty")
    return MetricsTarget(path=text)


def parse_address(text: str) -> MetricsTarget:
    """One address, so that nobody opens a port to the world by leaving something out. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or bracketed is not (":" in host):
        raise ConfigError(f"Error parsing --metrics {text}", FORM)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"Error parsing --metrics {text}: port {port!r} is not within 1 to 65535", FORM)
    packed = _packed(host, bracketed)
    if packed is None:
        raise ConfigError(f"Error parsing --metrics {text}: {host} is no numeric address", FORM)
    if not any(packed.removeprefix(V4_MAPPED)):
        raise ConfigError(f"Error parsing --metrics {text}: {host} is every address of this host", FORM)
    return MetricsTarget(host=host, port=int(port))


def _packed(host: str, ipv6: bool) -> bytes | None:
    import socket

    try:
        return socket.inet_pton(socket.AF_INET6 if ipv6 else socket.AF_INET, host)
    except OSError:
        return None
