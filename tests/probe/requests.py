"""What the tests of bad input share: plain requests to a VMM, and the proof that its guest goes on."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from tests.vmm import SECONDS, Vmm, probe


def ask(vmm: Vmm, method: str, name: str, body: bytes | str | None = None) -> tuple[int, list[str]]:
    """One request as bytes: the status and the error array."""
    connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(SECONDS)
    connection.sock.connect(str(vmm.api))
    try:
        connection.request(method, f"/api/v1/{name}", body)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    return response.status, json.loads(content) if content else []


def config(**changes: Any) -> str:
    """A VmConfig that boots the probe guest, changed."""
    plain = {
        "payload": {"kernel": probe(), "cmdline": "mode=tick"},
        "memory": {"size": 128 << 20},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    }
    return json.dumps({**plain, **changes})


def goes_on(vmm: Vmm) -> None:
    assert vmm.ask("info")["state"] == "Running"
    vmm.more("tick ")
