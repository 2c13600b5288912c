"""The two devices of one process behind the contract of every worker (shared/worker.py)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from console_worker.console import Console
from console_worker.device import RingDevice
from console_worker.rng import Rng
from shared.errors import ProtocolError
from shared.rehearsal import GARBAGE, NOTHING, stand_still
from shared.state_versions import KINDS


class ConsoleWorker:
    """`bases` of quiesce are keyed "console.0", "console.1" and "rng.0"."""

    states = KINDS["console_worker"]

    def __init__(self, console: Console | None, rng: Rng | None) -> None:
        self._console = console
        self._rng = rng
        self._pulse = 0
        self._quiet = False
        self.sockets: list[socket.socket] = []  # the servers', for a rehearsed fault
        self.devices: dict[str, RingDevice] = {}
        if console is not None:
            self.devices["console"] = console
        if rng is not None:
            self.devices["rng"] = rng

    def quiesce(self) -> dict[str, Any]:
        """Nothing is ever in flight here, so this answers at once."""
        bases: dict[str, int] = {}
        for name, device in self.devices.items():
            if device.server is not None:
                bases.update({f"{name}.{index}": base for index, base in device.server.suspend().items()})
        if self._console is not None:
            self._console.hold()
        self._quiet = True
        return {"bases": bases}

    def save(self) -> dict[str, Any]:
        if not self._quiet:
            raise ProtocolError("save before quiesce")
        return {"console": self._console.save()} if self._console is not None else {}

    def load(self, state: dict[str, Any]) -> None:
        if self._console is not None and "console" in state:
            try:
                self._console.load(state["console"])
            except (KeyError, TypeError, ValueError) as error:
                raise ProtocolError("the console's state can't be read") from error

    def resume(self) -> None:
        self._quiet = False
        if self._console is not None:
            self._console.release()
        for device in self.devices.values():
            if device.server is not None:
                device.server.resume()

    def stats(self) -> dict[str, int]:
        counters: dict[str, int] = {}
        for name, device in self.devices.items():
            counters[f"{name}_requests"] = device.requests
            counters[f"{name}_errors"] = device.errors
        if self._console is not None:
            counters["console_bytes_in"] = self._console.bytes_in
            counters["console_bytes_out"] = self._console.bytes_out
        if self._rng is not None:
            counters["rng_bytes"] = self._rng.bytes
        return counters

    def epoch(self) -> int:
        """There is no native loop: that the main loop answers is the proof."""
        self._pulse += 1
        return self._pulse

    def fault(self, what: str, value: int, options: Mapping[str, Any] = NOTHING) -> None:
        """Misbehave on request: `exit` with a code, `hang` for milliseconds (0: for ever), `freeze`: the same once
        this is answered, `delay` every look at a ring by
        milliseconds until `clear`, `corrupt-vhost`. Raises ProtocolError."""
        faults: dict[str, Callable[[int], object]] = {
            "exit": os._exit,
            "hang": stand_still,
            "freeze": self._freeze,
            "delay": self._delay,
            "clear": lambda _: self._delay(0),
            "corrupt-vhost": lambda _: self._garble(),
        }
        if what not in faults or options:
            raise ProtocolError(f"fault {what!r}: one of {', '.join(sorted(faults))}, without options")
        faults[what](value)

    def _freeze(self, ms: int) -> None:
        for device in self.devices.values():
            device.reactor.call_soon(partial(stand_still, ms))  # behind the answer
            break

    def _delay(self, ms: int) -> None:
        for device in self.devices.values():
            device.delay_ms = ms

    def _garble(self) -> None:
        for sock in self.sockets:
            sock.send(GARBAGE)


