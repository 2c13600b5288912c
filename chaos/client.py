"""The API over its unix socket: one request per connection, as ch-remote asks."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, Final

from shared.errors import FlotillaError, HostError

SECONDS: Final = 60.0


class Refused(FlotillaError):
    """The VMM said no; the message is its own."""


class Gone(FlotillaError):
    """No answer: the connection ended, or nobody listens. The API process may be on its way back."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Api:
    """Requests to the VMM at `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get(self, name: str) -> Any:
        return self._ask("GET", name, None)

    def put(self, name: str, body: dict[str, Any] | None = None) -> Any:
        return self._ask("PUT", name, body)

    def check(self) -> None:
        """Raises HostError when nobody listens at all."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self.path)
            except OSError as error:
                why = error.strerror or str(error)
                raise HostError(f"--api-socket {self.path}: {why}", "is a VMM running with it?") from error

    def _ask(self, method: str, name: str, body: dict[str, Any] | None) -> Any:
        connection = _Connection(self.path)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, f"/api/v1/{name}", data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Gone(f"{name}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise Refused(_reason(answer))
        return json.loads(answer) if answer else None


def _reason(answer: bytes) -> str:
    try:
        messages = json.loads(answer)
    except ValueError:
        return answer.decode(errors="replace")
    return ": ".join(map(str, messages[1:])) if isinstance(messages, list) else str(messages)
