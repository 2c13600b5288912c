"""A line on a terminal that says how far a migration is; on anything but a terminal, nothing."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from ch_remote.http import Connection
from ch_remote.verbs import VERBS
from shared.errors import FlotillaError

TICK_SECONDS = 0.25
# An answer costs the VMM's host as much CPU as it takes time. Where that is slow the guest needs it more: the next
# question comes so many times later, but for an answer that was slow only once.
REST, MOST_REST_SECONDS = 20, 10.0
_CELLS = 20
_PAGE_BYTES = 4096
_ARRIVING = ("building", "built")  # a remote migration's RAM comes meanwhile
_CLEAR = "\r\033[K"


def line(progress: dict[str, Any], width: int = 80) -> str:
    """One line of at most `width` characters from an answer of vm.migration-progress."""
    phase = str(progress.get("phase", progress.get("state", "")))
    total, left = _number(progress, "ram_bytes"), _number(progress, "remaining_bytes")
    words = [phase]
    if total and progress.get("direction") == "send" and phase == "copying":
        words = [_cells(1 - left / total), f"round {_number(progress, 'round'):.0f}"]
        words.append(f"{_size(_number(progress, 'throughput_bytes_per_s'))}/s")
        words.append(f"dirty {_size(_number(progress, 'dirty_bytes_per_s'))}/s")
        if isinstance(progress.get("estimated_downtime_ms"), (int, float)):
            words.append(f"pause ~{progress['estimated_downtime_ms']:.0f} ms")
        if isinstance(progress.get("time_left_s"), (int, float)):
            words.append(f"{progress['time_left_s']:.0f} s left")
    elif total and progress.get("direction") == "receive" and phase in _ARRIVING:
        # Pages that come again in a later round are counted again: how much is left only the source knows.
        moved = (_number(progress, "pages") + _number(progress, "zero_pages")) * _PAGE_BYTES
        words = [_cells(moved / total), f"{_size(_number(progress, 'page_bytes'))} of RAM moved"]
    elif total:
        words.append(f"{_size(_number(progress, 'page_bytes'))} of RAM moved")
    return "  ".join(words)[: width - 1]


def _cells(share: float) -> str:
    done = max(0.0, min(1.0, share))
    full = round(done * _CELLS)
    return f"[{'#' * full}{'.' * (_CELLS - full)}] {done:4.0%}"


def _number(progress: dict[str, Any], key: str) -> float:
    value = progress.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def rest(began: float) -> float:
    """Seconds from one question to the next, when the answer to one of `began` (time.monotonic()) has just come."""
    return min(REST * (time.monotonic() - began), MOST_REST_SECONDS)


class Bar:
    """Asks the VMM at `path` and draws at each tick(); clear() leaves an empty line."""

    def __init__(self, path: str, stream: TextIO | None = None) -> None:
        self._path = path
        self._stream = sys.stderr if stream is None else stream
        self._drawn = ""
        self._rest_until = 0.0
        self.visible = self._stream.isatty()

    def tick(self) -> None:
        """Never raises: a VMM that has other worries is asked again at a later tick."""
        began = time.monotonic()
        if began >= self._rest_until:
            self._ask()
            self._rest_until = time.monotonic() + rest(began)

    def _ask(self) -> None:
        import json

        verb = VERBS["migration-progress"]
        try:
            with Connection(self._path) as connection:
                progress = json.loads(connection.request(verb.method, verb.target).body)
        except (FlotillaError, OSError, ValueError, RecursionError):
            return
        if isinstance(progress, dict):
            self.draw(progress)

    def draw(self, progress: dict[str, Any]) -> None:
        text = line(progress, self._width())
        if text != self._drawn:
            self._stream.write(_CLEAR + text)
            self._stream.flush()
            self._drawn = text

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def clear(self) -> None:
        if self._drawn:
            self._stream.write(_CLEAR)
            self._stream.flush()
            self._drawn = ""
