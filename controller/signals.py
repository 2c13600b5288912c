"""Signals as reactor events: SIGTERM and SIGINT end the VM in order, SIGWINCH resizes its console."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from shared.reactor import Reactor


class Signals:
    """Calls `handlers[number]` on the reactor's thread, outside of any other callback."""

    def __init__(self, reactor: Reactor, handlers: dict[signal.Signals, Callable[[], None]]) -> None:
        self._reactor = reactor
        self._handlers = handlers
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in handlers:
            # The Python-level handler does nothing: the byte in the pipe wakes the reactor.
            signal.signal(number, lambda _number, _frame: None)
        reactor.add_reader(self._read, self._deliver)

    def _deliver(self) -> None:
        for number in os.read(self._read, 256):
            handler = self._handlers.get(signal.Signals(number))
            if handler is not None:
                handler()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)
        self._reactor.remove_reader(self._read)
        os.close(self._read)
        os.close(self._write)
