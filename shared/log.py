"""Log lines in Cloud Hypervisor's shape: `cloud-hypervisor: 0.012345s: <vmm> INFO:controller/vm.py:123 -- text`.

error: something a user asked for failed. warn: abnormal, no impact. info: rare state changes. debug, trace: developers.
The time counts from the start of the VMM (workers are told it). Standard library's logging costs 15 ms of import and is
not used. One write(2) per line, so that lines of several processes never mix. A pipe that nobody reads loses lines and
stops nobody; how many is said as soon as there is room again.

A text may quote a worker, a guest or a migration's peer: whatever it holds, it stays on its line, moves no terminal's
cursor and is at most MAX_TEXT letters.
"""

from __future__ import annotations

import os
import select
import sys
import time
from enum import IntEnum

from shared.visible import visible

MAX_TEXT = 1024
INDENT = "    "  # of what follows a line: it can't be taken for one


class Level(IntEnum):
    ERROR = 0
    WARN = 1
    INFO = 2
    DEBUG = 3
    TRACE = 4


_level = Level.WARN
_fd = 2
_thread = "vmm"
_began = time.monotonic()
_lost = 0  # lines that there was no room for


def configure(level: Level, fd: int = 2, thread: str = "vmm", began: float | None = None) -> None:
    """Where and how much to log in this process. `began`: the VMM's start on CLOCK_MONOTONIC, in seconds."""
    global _level, _fd, _thread, _began, _lost
    _level, _fd, _thread, _lost = level, fd, thread, 0
    if began is not None:
        _began = began


def set_level(name: str) -> None:
    """Raises ValueError for a name that is no level."""
    global _level
    try:
        _level = Level[name.upper()]
    except KeyError:
        raise ValueError(f"log level {name!r}: one of {', '.join(level.name.lower() for level in Level)}") from None


def settings() -> dict[str, object]:
    """What a child process needs to log like this one."""
    return {"level": int(_level), "fd": _fd, "began": _began}


def wanted(level: Level) -> bool:
    """Whether a line of this level is written: for a text that costs something."""
    return level <= _level


def _room() -> bool:
    """Whether a line can be written without a wait: a pipe that polls as writable takes PIPE_BUF bytes."""
    poll = select.poll()
    poll.register(_fd, select.POLLOUT)
    return bool(poll.poll(0))


def _write(level: Level, text: str, more: str = "") -> None:
    global _lost
    if not wanted(level):
        return
    if not _room():
        _lost += 1
        return
    frame = sys._getframe(2)
    path = frame.f_code.co_filename.rsplit("/", 2)
    where = f"{'/'.join(path[-2:])}:{frame.f_lineno}"
    missing, _lost = (f" ({_lost} lines before this one were lost)" if _lost else ""), 0
    began = f"cloud-hypervisor: {time.monotonic() - _began:.6f}s: <{_thread}>"
    lines = [f"{began} {level.name}:{where} -- {visible(text, MAX_TEXT)}{missing}\n"]
    lines += [f"{INDENT}{visible(line, MAX_TEXT)}\n" for line in more.splitlines()]
    data = "".join(lines).encode(errors="replace")
    try:
        for start in range(0, len(data), select.PIPE_BUF):
            if start and not _room():  # a pipe that had room for so many may have none for more
                _lost += 1
                break
            os.write(_fd, data[start : start + select.PIPE_BUF])
    except OSError:
        _lost += 1  # a full disk or a closed terminal must not take the VM with it


def error(text: str, more: str = "") -> None:
    """`more`: lines of ours that follow, as a traceback's."""
    _write(Level.ERROR, text, more)


def warn(text: str) -> None:
    _write(Level.WARN, text)


def info(text: str) -> None:
    _write(Level.INFO, text)


def debug(text: str) -> None:
    _write(Level.DEBUG, text)


def trace(text: str) -> None:
    _write(Level.TRACE, text)
