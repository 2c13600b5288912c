"""The janitor: outlives the controller by a moment and removes what SIGKILL left behind.

It holds a pidfd of the controller and a list of paths (sockets, runtime directory) and terminal settings. A clean end
tells it "done"; any other end of the controller makes it tidy up by itself. Updates are one msgpack datagram each:
{"add": path} {"remove": path} {"termios": attributes, null: as they were} {"done": true}.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import termios
import time
from typing import Any

import msgpack

from controller.cgroups import PREFIX, remove
from shared.worker import Start

MAX_UPDATE = 65536
PATIENCE_SECONDS = 5.0


def main(start: Start) -> int:
    """Wait for the controller's end, then remove what is still on the list."""
    os.setsid()  # a terminal's hang-up must not take the cleaner with it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    paths: list[str] = list(start.spec["paths"])
    terminals: dict[int, list[Any]] = {}
    if "termios" in start.spec:
        terminals[start.fds["tty"]] = start.spec["termios"]
    controller, updates = start.fds["controller"], start.fds["updates"]
    start.sandbox.seal()
    poll = select.poll()
    poll.register(controller, select.POLLIN)
    poll.register(updates, select.POLLIN)
    watching = True
    while watching:
        for fd, _ in poll.poll():
            if fd == controller:
                watching = False
            elif (data := os.read(updates, MAX_UPDATE)) == b"":
                poll.unregister(updates)
            else:
                update = msgpack.unpackb(data)
                _update(update, paths, terminals, start)
                watching = not update.get("done", False)
    _drain(updates, paths, terminals, start)
    for fd, attributes in terminals.items():
        _restore(fd, attributes)
    for path in reversed(paths):
        _remove(path)
    return 0


def _update(message: dict[str, Any], paths: list[str], terminals: dict[int, list[Any]], start: Start) -> None:
    if "add" in message:
        paths.append(message["add"])
    if "remove" in message and message["remove"] in paths:
        paths.remove(message["remove"])
    if "termios" in message:
        if message["termios"] is None:
            terminals.clear()
        else:
            terminals[start.fds["tty"]] = message["termios"]


def _drain(updates: int, paths: list[str], terminals: dict[int, list[Any]], start: Start) -> None:
    """What the controller said in its last moment still counts."""
    os.set_blocking(updates, False)
    try:
        while data := os.read(updates, MAX_UPDATE):
            _update(msgpack.unpackb(data), paths, terminals, start)
    except BlockingIOError:
        pass


def _restore(fd: int, attributes: list[Any]) -> None:
    # A background process that sets a terminal gets SIGTTOU, which the zygote's signal setting ignores for us.
    try:
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
    except (OSError, termios.error):
        pass


def _remove(path: str) -> None:
    """Only a socket or a directory of ours is removed: a path that became something else is not ours any more."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISSOCK(mode) or path.endswith(".lock"):
            os.unlink(path)
        elif stat.S_ISDIR(mode):
            if os.path.basename(path).startswith(PREFIX):
                _remove_cgroup(path)  # its parent is the user's
                return
            _remove_tree(path)
            os.rmdir(os.path.dirname(path))  # refused while other VMs live there
    except OSError:
        pass


def _remove_cgroup(path: str) -> None:
    """The others are dying too: a cgroup can be removed once they have."""
    end = time.monotonic() + PATIENCE_SECONDS
    while os.path.isdir(path):
        remove(path)
        if time.monotonic() > end:
            return
        time.sleep(0.01)


def _remove_tree(path: str) -> None:
    """shutil.rmtree without its open() of a directory as if it were a file, which is not on this process's list."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(path)
