"""The disk behind the contract of every worker (shared/worker.py)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from blk_worker.backend import BlockBackend
from shared import log
from shared.errors import ProtocolError
from shared.reactor import Reactor, describe
from shared.vhost_backend import Server


class BlockWorker:
    """`bases` of quiesce are keyed by queue index."""

    kind = "blk_worker"
    version = 1

    def __init__(self, backend: BlockBackend) -> None:
        self.backend = backend
        self._server: Server | None = None
        self._quiet = False

    def attach(self, reactor: Reactor, sock: socket.socket, gone: Callable[[], None] = lambda: None) -> None:
        """Serve the front end at the other end of a connected socket; `gone()` when it has closed."""

        def closed(error: Exception | None) -> None:
            self._server = None
            self.backend.on_broken = lambda index: None
            if error is not None:
                log.error(f"disk path={self.backend.disk.path}: front end: {describe(error)}")
            gone()

        self._server = Server(reactor, sock, self.backend, closed)
        self.backend.on_broken = self._server.queue_failed
        if self._quiet:
            self._server.suspend()

    def detach(self) -> None:
        """Stop all rings and close the connection, if there is one."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def quiesce(self) -> dict[str, Any]:
        """Waits for everything in flight: afterwards nothing of this process touches guest memory or disk."""
        self._quiet = True
        self.backend.request_stop()
        return {"bases": self._server.suspend() if self._server is not None else {}}

    def save(self) -> dict[str, Any]:
        if not self._quiet:
            raise ProtocolError("save before quiesce")
        return self.backend.save()

    def load(self, state: dict[str, Any]) -> None:
        self.backend.load(state)

    def resume(self) -> None:
        self._quiet = False
        if self._server is not None:
            self._server.resume()

    def flush(self) -> dict[str, Any]:
        """Completed writes are on stable storage when this returns. Waits as long as the disk takes. Raises OSError."""
        disk = self.backend.disk
        if not disk.readonly:
            os.fdatasync(disk.fd)
        return {}

    def stats(self) -> dict[str, int]:
        return self.backend.stats()

    def epoch(self) -> int:
        return self.backend.epoch()

    def fault(self, what: str, value: int) -> None:
        self.backend.fault(what, value)
