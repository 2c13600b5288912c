"""The metrics exporter's listening socket, made by the controller before anything runs and kept by it.

While the exporter is being replaced, clients wait instead of being refused.
"""

from __future__ import annotations

import errno
import socket

from controller.api_socket import BACKLOG, ApiSocket
from controller.config.metrics import MetricsTarget
from shared.errors import HostError

_WHY = {
    errno.EADDRINUSE: "another program listens there; choose another port",
    errno.EAFNOSUPPORT: "this host has no IPv6",
    errno.EADDRNOTAVAIL: "this host has no such address",
    errno.EACCES: "ports below 1024 are for root; choose another",
}


def listen(target: MetricsTarget) -> ApiSocket:
    """Raises HostError that names the flag and what is in the way."""
    if target.path is not None:
        return ApiSocket.listen(target.path, "--metrics-socket", "Metrics socket")
    sock: socket.socket | None = None
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in target.host else socket.AF_INET, socket.SOCK_STREAM)
        # Connections of a VMM that has just ended keep the port for a minute, but nobody from listening.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((target.host, target.port))
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise HostError(f"{target.flag}: {error.strerror}", _WHY.get(error.errno or 0, "")) from error
    return ApiSocket(sock, None, None)
