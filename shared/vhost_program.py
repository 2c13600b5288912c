"""A vhost-user back end as a program for foreign front ends (QEMU, Cloud Hypervisor).

"Backend program conventions" of vhost-user.rst: --socket-path, --fd, --print-capabilities, SIGTERM ends it, it never
becomes a daemon.

One front end at a time. After a disconnect the next one is accepted, so a front end that reconnects finds its device;
a connected socket given by --fd is served to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from shared import log
from shared.errors import ConfigError, FlotillaError
from shared.listening import listen_as
from shared.reactor import Reactor
from shared.vhost_worker import VhostWorker

Make = Callable[[argparse.Namespace, Reactor, contextlib.ExitStack], VhostWorker]


def run(arguments: Sequence[str], parser: argparse.ArgumentParser, capabilities: str, needs: str, make: Make) -> int:
    """Parse, make the worker, serve. `needs` is the option that must be given. Returns the exit code."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", help="listen here; a stale socket is replaced")
    where.add_argument("--fd", type=int, metavar="N", help="inherited socket, listening or connected")
    parser.add_argument("--print-capabilities", action="store_true", help="say in JSON what this back end can do")
    options = parser.parse_args(arguments)
    if options.print_capabilities:
        print(capabilities)
        return 0
    if not getattr(options, needs):
        parser.error(f"--{needs} is missing")
    if options.fd is None and not options.socket_path:
        parser.error("neither --socket-path nor --fd is given")
    log.configure(log.Level.INFO, thread=parser.prog)
    try:
        return _serve(options, make)
    except (FlotillaError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _serve(options: argparse.Namespace, make: Make) -> int:
    reactor = Reactor()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(reactor.close)
        worker = make(options, reactor, cleanup)
        cleanup.callback(worker.detach)
        _stop_on_signals(reactor)
        if options.fd is not None:
            sock = socket.socket(fileno=options.fd)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                worker.attach(reactor, sock, reactor.stop)
                return reactor.run()
            cleanup.enter_context(sock)
        else:
            sock = cleanup.enter_context(_listen(options.socket_path))
            cleanup.callback(os.unlink, options.socket_path)
        _accept_next(worker, reactor, sock)
        return reactor.run()


def _accept_next(worker: VhostWorker, reactor: Reactor, listener: socket.socket) -> None:
    def accept() -> None:
        connection, _ = listener.accept()
        reactor.remove_reader(listener.fileno())
        worker.attach(reactor, connection, wait)

    def wait() -> None:
        reactor.add_reader(listener.fileno(), accept)

    wait()


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        listen_as(listener, path, 1)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--socket-path {path}: {os.strerror(error.errno or 0)}") from error
    return listener


def _is_stale(path: str) -> bool:
    """A socket that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _stop_on_signals(reactor: Reactor) -> None:
    """SIGTERM and SIGINT as a byte in a pipe: a Python handler alone would not wake epoll_wait."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    reactor.add_reader(read_end, reactor.stop)
