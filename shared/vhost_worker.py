"""One vhost-user device behind the contract of every worker (shared/worker.py)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from shared import log
from shared.errors import ProtocolError
from shared.reactor import Reactor, describe
from shared.rehearsal import GARBAGE, NOTHING
from shared.state_versions import KINDS
from shared.vhost_backend import Server
from shared.vhost_device import Backend


class Device(Backend, Protocol):
    """A back end as a process. `name` is what log lines call it."""

    name: str
    on_broken: Callable[[int], None]  # hears of a queue that the guest has made unusable
    on_config: Callable[[], None]  # the configuration space reads differently now

    def request_stop(self) -> None:
        """The process is about to go quiet: stop_queue() of every running queue follows."""

    def quiet(self) -> None:
        """Every queue is stopped; until resumed() the device does nothing of its own accord either."""

    def resumed(self) -> None: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def epoch(self) -> int: ...
    def fault(self, what: str, value: int, options: Mapping[str, Any] = NOTHING) -> None: ...


class VhostWorker:
    """`bases` of quiesce are keyed by queue index."""

    def __init__(self, kind: str, device: Device) -> None:
        self.states = KINDS[kind]
        self.device = device
        self._server: Server | None = None
        self._socket: socket.socket | None = None  # the server's, for a rehearsed fault
        self._quiet = False

    def attach(self, reactor: Reactor, sock: socket.socket, gone: Callable[[], None] = lambda: None) -> None:
        """Serve the front end at the other end of a connected socket; `gone()` when it has closed."""

        def closed(error: Exception | None) -> None:
            self._server = self._socket = None
            self._listen_to_nobody()
            if error is not None:
                log.error(f"{self.device.name}: front end: {describe(error)}")
            gone()

        self._server, self._socket = Server(reactor, sock, self.device, closed), sock
        self.device.on_broken = self._server.queue_failed
        self.device.on_config = self._server.config_changed
        if self._quiet:
            self._server.suspend()

    def detach(self) -> None:
        """Stop all rings and close the connection, if there is one."""
        if self._server is not None:
            self._server.close()
            self._server = self._socket = None
            self._listen_to_nobody()

    def _listen_to_nobody(self) -> None:
        self.device.on_broken = lambda index: None
        self.device.on_config = lambda: None

    def quiesce(self) -> dict[str, Any]:
        """Waits for everything in flight: afterwards nothing of this process touches guest memory or host resource."""
        self._quiet = True
        self.device.request_stop()
        bases = self._server.suspend() if self._server is not None else {}
        self.device.quiet()
        return {"bases": bases}

    def save(self) -> dict[str, Any]:
        if not self._quiet:
            raise ProtocolError("save before quiesce")
        return self.device.save()

    def load(self, state: dict[str, Any]) -> None:
        self.device.load(state)

    def resume(self) -> None:
        self._quiet = False
        self.device.resumed()
        if self._server is not None:
            self._server.resume()

    def stats(self) -> dict[str, int]:
        return self.device.stats()

    def epoch(self) -> int:
        return self.device.epoch()

    def fault(self, what: str, value: int, options: Mapping[str, Any] = NOTHING) -> None:
        """`corrupt-vhost`: bytes on the vhost-user connection that are no message; the others are the device's."""
        if what != "corrupt-vhost":
            self.device.fault(what, value, options)
        elif self._socket is not None:
            self._socket.send(GARBAGE)
