"""The worker's start.

`Start.spec`: {"console": {"mode", "path"}, "rng": {"src"}}, either may be missing.
`Start.fds`: `console` and `rng`, connected vhost-user sockets; `console.in`, `console.out`, `console.slave`,
`console.listen`, the host end's descriptors as far as the mode has them (shared/chardev.py).
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from functools import partial

from console_worker.console import Console
from console_worker.device import RingDevice
from console_worker.rng import Rng, open_source
from console_worker.worker import ConsoleWorker
from shared import log, vring
from shared.chardev import CharDev, Mode, host_end
from shared.reactor import Reactor
from shared.vhost_backend import Server
from shared.worker import Start, serve

TIOCSCTTY = 0x540E
HOST_PREFIX = "console."


def main(start: Start) -> int:
    vring.preload()
    reactor = Reactor()
    console = _console(start, reactor)
    rng = None
    if "rng" in start.spec:
        rng = Rng(reactor, "__rng", open_source(start.spec["rng"]["src"]))
    worker = ConsoleWorker(console, rng)
    for name, device in worker.devices.items():
        sock = socket.socket(fileno=start.fds[name])
        worker.sockets.append(sock)
        device.server = Server(reactor, sock, device, partial(_disconnected, device))
    return serve(start, worker, reactor)


def _console(start: Start, reactor: Reactor) -> Console | None:
    if "console" not in start.spec:
        return None
    spec = start.spec["console"]
    fds = {name.removeprefix(HOST_PREFIX): fd for name, fd in start.fds.items() if name.startswith(HOST_PREFIX)}
    end = host_end(spec["mode"], fds, spec.get("path", ""))
    console = Console(reactor, "__console", CharDev(reactor, end))
    if end.mode in (Mode.TTY, Mode.PTY):
        if end.mode is Mode.PTY:
            _take_terminal(end.fds["slave"])
        _watch_resize(reactor, console)
        console.resized()  # of a resize since its making nobody was told
    return console


def _take_terminal(slave: int) -> None:
    """Make the PTY our controlling terminal: the kernel reports its resizes only to a session of its own."""
    try:
        os.setsid()
        fcntl.ioctl(slave, TIOCSCTTY, 0)
    except OSError as error:
        log.debug(f"resizes of the console's PTY will not be seen: {error}")


def _watch_resize(reactor: Reactor, console: Console) -> None:
    """SIGWINCH, as a byte in a pipe: a Python handler alone would not wake epoll_wait."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGWINCH, lambda _number, _frame: None)

    def resized() -> None:
        try:
            while os.read(read_end, 512):
                pass
        except BlockingIOError:
            pass
        console.resized()

    reactor.add_reader(read_end, resized)


def _disconnected(device: RingDevice, error: Exception | None) -> None:
    """The front end closed this device. It never comes back to this process: a respawn gets new sockets."""
    if error is not None:
        log.error(f"{device.name}: {error}")
