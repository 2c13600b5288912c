"""Questions to a running VMM, by the ways that a user has: ch-remote, its API socket, /proc."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.demo.report import DemoError

ASK_SECONDS = 120.0
_POLL_SECONDS = 0.05


def ch_remote(api: str, verb: str, seconds: float = ASK_SECONDS) -> Any:
    """The JSON answer of `ch-remote VERB`. Raises DemoError."""
    command = ["ch-remote", f"--api-socket={api}", verb]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise DemoError(f"no answer within {seconds:.0f} s: {' '.join(command)}") from None
    if done.returncode:
        raise DemoError(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr.strip()}")
    return json.loads(done.stdout) if done.stdout.strip() else None


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(api: str, endpoint: str) -> dict[str, Any]:
    """The JSON answer of the API socket itself, without the cost of a ch-remote; empty when the VMM does not answer."""
    connection = _Connection(api, ASK_SECONDS)
    try:
        connection.request("GET", f"/api/v1/{endpoint}")
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else {}


def ram_identity(pid: int) -> set[str]:
    """Device and inode of every guest RAM file that a controller has mapped."""
    mapped = Path(f"/proc/{pid}/maps").read_text()
    return set(re.findall(r"([0-9a-f]+:[0-9a-f]+ \d+) +/memfd:ch_ram", mapped))


def listens(port: int) -> bool:
    """Whether this machine has a listening TCP socket (state 0A) on the port, on every address."""
    return f" 00000000:{port:04X} 00000000:0000 0A " in Path("/proc/net/tcp").read_text()


def await_true(what: str, seconds: float, condition: Callable[[], bool]) -> None:
    """Raises DemoError when the condition is not met in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise DemoError(f"no {what} within {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)
