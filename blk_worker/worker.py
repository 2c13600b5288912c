"""The disk behind the contract of every worker (shared/worker.py)."""

from __future__ import annotations

from typing import Any

from blk_worker.backend import BlockBackend
from shared.errors import ProtocolError
from shared.vhost_backend import Server


class BlockWorker:
    """`bases` of quiesce are keyed by queue index. `server` is set once a front end is connected."""

    kind = "blk_worker"
    version = 1

    def __init__(self, backend: BlockBackend) -> None:
        self.backend = backend
        self.server: Server | None = None
        self._quiet = False

    def quiesce(self) -> dict[str, Any]:
        """Waits for everything in flight: afterwards nothing of this process writes to guest memory or disk."""
        self.backend.request_stop()
        bases = self.server.suspend() if self.server is not None else {}
        self._quiet = True
        return {"bases": bases}

    def save(self) -> dict[str, Any]:
        if not self._quiet:
            raise ProtocolError("save before quiesce")
        return self.backend.save()

    def load(self, state: dict[str, Any]) -> None:
        self.backend.load(state)

    def resume(self) -> None:
        self._quiet = False
        if self.server is not None:
            self.server.resume()

    def stats(self) -> dict[str, int]:
        return self.backend.stats()

    def epoch(self) -> int:
        return self.backend.epoch()

    def fault(self, what: str, value: int) -> None:
        self.backend.fault(what, value)
