"""`--event-monitor`: one pretty-printed JSON record per event and a blank line, as Cloud Hypervisor writes them.

The time counts from the start of the VMM. A reader that is too slow loses events, never stops the VM: the file is
non-blocking.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from shared import log
from shared.errors import HostError
from shared.typed import Any


class EventMonitor:
    """emit() also goes to whoever subscribed in this process (the API's progress, the migration)."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._fd: int | None = None
        self.subscribers: list[Callable[[str, str, dict[str, Any] | None], None]] = []

    def open(self, path: str | None = None, fd: int | None = None) -> None:
        """Raises HostError that names the flag."""
        if path is not None:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise HostError(f"--event-monitor path={path}: {error.strerror}") from error
        elif fd is not None:
            try:
                os.set_blocking(fd, False)
                os.set_inheritable(fd, False)
            except OSError as error:
                raise HostError(f"--event-monitor fd={fd}: {error.strerror}") from error
            self._fd = fd

    def emit(self, source: str, event: str, properties: dict[str, Any] | None = None) -> None:
        log.info(f"Event: source = {source} event = {event}")
        for subscriber in self.subscribers:
            subscriber(source, event, properties)
        if self._fd is None:
            return
        import json  # not on the boot path of a VM without a monitor

        nanoseconds = int((time.monotonic() - self._began) * 1e9)
        record = {
            "timestamp": {"secs": nanoseconds // 10**9, "nanos": nanoseconds % 10**9},
            "source": source,
            "event": event,
            "properties": properties,
        }
        try:
            os.write(self._fd, json.dumps(record, indent=2).encode() + b"\n\n")
        except OSError as error:
            log.warn(f"--event-monitor: event {event} lost: {error.strerror}")
