"""The host side of a serial port or console: a terminal, pseudo terminal, file, socket or nothing.

It has two halves, because a console's worker can die and its pseudo terminal must not:

    HostEnd     the open descriptors and the terminal's settings; whoever owns the VM opens it (`open_host_end`),
                passes its descriptors on and restores the terminal
    CharDev     reads and writes such an end on a reactor; never blocks, keeps a bounded backlog

`open_chardev` is both at once.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable, Mapping
from enum import StrEnum

from shared.errors import ConfigError, HostError
from shared.reactor import Reactor
from shared.records import Record, field
from shared.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import socket

TIOCGWINSZ = 0x5413
READ_SIZE = 4096
BACKLOG_LIMIT: Final = 1 << 20
STDIN, STDOUT = 0, 1


class Mode(StrEnum):
    OFF = "off"
    NULL = "null"
    TTY = "tty"
    PTY = "pty"
    FILE = "file"
    SOCKET = "socket"


class HostEnd(Record, frozen=False):
    """Open descriptors, by role: `in` and `out` (one and the same for a PTY), `slave` and `listen`."""

    mode: Mode
    fds: dict[str, int] = field(default_factory=dict)
    path: str = ""  # of the PTY's slave, the file or the socket
    termios: list[Any] | None = None  # of the user's terminal before it was made raw
    unlink: bool = False  # the path is a socket of ours

    @property
    def terminal(self) -> int:
        """The user's terminal, -1 if this end has none."""
        return self.fds["in"] if self.termios is not None else -1

    def restore(self) -> None:
        """Give the user's terminal its settings back. Idempotent; a terminal that is gone is no error."""
        if self.termios is not None:
            import termios

            try:
                termios.tcsetattr(self.fds["in"], termios.TCSANOW, self.termios)
            except (termios.error, OSError):
                pass
            self.termios = None

    def close(self) -> None:
        """Restore, close, and remove the socket's name. Idempotent."""
        self.restore()
        for fd in set(self.fds.values()):
            os.close(fd)
        self.fds = {}
        if self.unlink:
            self.unlink = False
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass


def open_host_end(mode: str, file: str = "", socket_path: str = "") -> HostEnd:
    """Open the end that `--serial` or `--console` names. Raises ConfigError for what is missing, HostError."""
    kind = Mode(mode.lower())
    try:
        if kind is Mode.TTY:
            return _open_tty()
        if kind is Mode.PTY:
            return _open_pty()
        if kind is Mode.FILE:
            return _open_file(file)
        if kind is Mode.SOCKET:
            return _open_socket(socket_path)
    except OSError as error:
        raise HostError(f"{mode.lower()} {file or socket_path}: {error.strerror}") from error
    return HostEnd(kind)


def _open_tty() -> HostEnd:
    end = HostEnd(Mode.TTY)
    end.fds["out"] = _reopen(STDOUT, os.O_WRONLY)
    try:
        end.fds["in"] = _reopen(STDIN, os.O_RDONLY)
    except OSError:
        return end  # a VM in the background, standard input closed: output only
    if os.isatty(end.fds["in"]):
        import termios
        import tty

        # From the background, tcsetattr and read would stop us until `fg`: a shell's `&` must not stop the VM.
        if _in_foreground(end.fds["in"]):
            end.termios = termios.tcgetattr(end.fds["in"])
            tty.setraw(end.fds["in"], termios.TCSANOW)
        else:
            os.close(end.fds.pop("in"))
    return end


def _in_foreground(terminal: int) -> bool:
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True  # not our controlling terminal, so there is no job control


def _reopen(fd: int, access: int) -> int:
    """A non-blocking description of our own for a terminal, pipe or file; a plain duplicate of anything else.

    O_NONBLOCK belongs to the description, and the original is shared with the shell that started us: it would find
    its terminal non-blocking after we have gone.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        flags = access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:
            pass  # another user's terminal, as under su: then the duplicate has to do
    return os.dup(fd)


def _open_pty() -> HostEnd:
    import tty

    # The slave stays open: without any, reads of the master fail with EIO until somebody attaches.
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    return HostEnd(Mode.PTY, {"in": master, "out": master, "slave": slave}, os.ttyname(slave))


def _open_file(path: str) -> HostEnd:
    if not path:
        raise ConfigError("file= is missing", "give file=PATH")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    return HostEnd(Mode.FILE, {"out": os.open(path, flags, 0o644)}, path)


def _open_socket(path: str) -> HostEnd:
    import socket

    from shared.listening import listen_as

    if not path:
        raise ConfigError("socket= is missing", "give socket=PATH")
    if os.path.exists(path):
        _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        listen_as(sock, path, 1, 0o600)
        return HostEnd(Mode.SOCKET, {"listen": sock.detach()}, path, unlink=True)


def _remove_stale(path: str) -> None:
    """A socket that nobody listens on any more is left from a killed VM; anything else is not ours to remove."""
    import socket

    if stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
    raise HostError(f"socket={path}: exists and is in use", "choose another path")


def host_end(mode: str, fds: Mapping[str, int], path: str = "") -> HostEnd:
    """A HostEnd from descriptors that another process opened and passed on."""
    return HostEnd(Mode(mode.lower()), dict(fds), path)


class CharDev:
    """A host end at work.

    `on_input(data)` gets what the user types; `pause_input(True)` holds it back. What `write()` can't deliver at
    once waits in a backlog; when that is full, the oldest bytes go, except that `full` tells a writer who can wait to
    do so until `on_drain()`. A PTY or socket that nobody reads never gets `full`: its guest must not hang for it.
    """

    def __init__(self, reactor: Reactor, end: HostEnd, limit: int = BACKLOG_LIMIT) -> None:
        self._reactor = reactor
        self._limit = limit
        self.end = end
        self.on_input: Callable[[bytes], None] = lambda _data: None
        self.on_drain: Callable[[], None] = lambda: None
        self._backlog = bytearray()
        self._paused = False
        self._held = False  # no use of the host at all
        self._input_over = False
        self._client: socket.socket | None = None
        self._listening = False
        self._reading = -1
        self._writing = -1
        self.dropped = 0
        out = end.fds.get("out", end.fds.get("listen", -1))
        self._to_socket = out >= 0 and stat.S_ISSOCK(os.fstat(out).st_mode)
        self._watch()

    @property
    def path(self) -> str:
        return self.end.path

    @property
    def full(self) -> bool:
        return self._waits and len(self._backlog) >= self._limit

    @property
    def _waits(self) -> bool:
        return self.end.mode in (Mode.TTY, Mode.FILE)

    def size(self) -> tuple[int, int]:
        """(columns, rows) of the terminal; (0, 0) where there is none."""
        if self.end.mode not in (Mode.TTY, Mode.PTY):
            return (0, 0)
        try:
            packed = fcntl.ioctl(self.end.fds.get("slave", self.end.fds["out"]), TIOCGWINSZ, bytes(8))
        except OSError:
            return (0, 0)
        rows, columns, _, _ = struct.unpack("4H", packed)
        return (columns, rows)

    # Output -----------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Deliver, as far as the other side takes it; the rest waits."""
        if self.end.mode in (Mode.OFF, Mode.NULL):
            return
        self._backlog += data
        if self._writing < 0:
            self._flush()
        excess = len(self._backlog) - self._limit
        if excess > 0 and not self._waits:
            del self._backlog[:excess]
            self.dropped += excess

    @property
    def backlog(self) -> bytes:
        """What has not been delivered yet."""
        return bytes(self._backlog)

    def _output(self) -> int:
        if self._client is not None:
            return self._client.fileno()
        return self.end.fds.get("out", -1)

    def _flush(self) -> None:
        fd = self._output()
        if fd < 0 or self._held:
            return
        was_full = self.full
        while self._backlog:
            try:
                sent = self._send(fd, bytes(self._backlog[:READ_SIZE]))
            except BlockingIOError:
                self._want_write(fd)
                break
            except OSError:
                self._output_failed()
                break
            del self._backlog[:sent]
        if not self._backlog:
            self._want_write(-1)
        if was_full and not self.full:
            self._reactor.call_soon(self.on_drain)

    def _send(self, fd: int, data: bytes) -> int:
        if not self._to_socket:
            return os.write(fd, data)
        import socket

        # Standard output may be a socket that others use too: its blocking mode is not ours to change.
        sock = socket.socket(fileno=fd)
        try:
            return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            sock.detach()

    def _want_write(self, fd: int) -> None:
        if fd == self._writing:
            return
        if self._writing >= 0:
            self._reactor.remove_writer(self._writing)
        self._writing = fd
        if fd >= 0:
            self._reactor.add_writer(fd, self._flush)

    def _output_failed(self) -> None:
        """Nobody is there any more. A socket's next client gets what is left; a closed pipe or terminal has none."""
        self._want_write(-1)
        if self._client is not None:
            self._hang_up()
        else:
            self.dropped += len(self._backlog)
            self._backlog.clear()

    # Input ------------------------------------------------------------------------------------------------------

    def pause_input(self, paused: bool) -> None:
        """Leave input in the kernel's buffer, or take it again."""
        self._paused = paused
        self._watch()

    def hold(self) -> None:
        """No read, write or accept until release(): the VM is moving."""
        self._flush()
        self._held = True
        self._want_write(-1)
        self._watch()

    def release(self) -> None:
        self._held = False
        self._watch()
        self._flush()

    def _watch(self) -> None:
        """Make the reactor's interest match the state."""
        listen = self.end.fds.get("listen", -1)
        accept = listen >= 0 and not self._held and self._client is None
        if accept != self._listening:
            self._listening = accept
            if accept:
                self._reactor.add_reader(listen, self._accept)
            else:
                self._reactor.remove_reader(listen)
        if self._client is not None:
            fd = self._client.fileno()
        else:
            fd = -1 if self._input_over else self.end.fds.get("in", -1)
        wanted = -1 if self._held or self._paused else fd
        if wanted != self._reading:
            if self._reading >= 0:
                self._reactor.remove_reader(self._reading)
            self._reading = wanted
            if wanted >= 0:
                self._start_reading(wanted)

    def _start_reading(self, fd: int) -> None:
        try:
            self._reactor.add_reader(fd, self._read)
        except PermissionError:  # epoll takes no regular files: `< script.txt`
            self._reactor.call_soon(self._read)

    def _accept(self) -> None:
        import socket

        listener = socket.socket(fileno=self.end.fds["listen"])
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        finally:
            listener.detach()
        client.setblocking(False)
        self._client = client
        self._watch()
        self._flush()

    def _read(self) -> None:
        if self._reading < 0:
            return
        fd = self._reading
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._input_ended()
            return
        self.on_input(data)
        if stat.S_ISREG(os.fstat(fd).st_mode) and self._reading == fd:
            self._reactor.call_soon(self._read)

    def _input_ended(self) -> None:
        if self._client is not None:
            self._hang_up()
            return
        self._input_over = True
        self._watch()

    def _hang_up(self) -> None:
        """The socket's client has gone; wait for the next one."""
        client, self._client = self._client, None
        if self._writing >= 0:
            self._want_write(-1)
        self._watch()
        if client is not None:
            client.close()

    def close(self) -> None:
        """Stop, and close the host end. Idempotent."""
        self._held = True
        self._want_write(-1)
        self._watch()
        if self._client is not None:
            self._client.close()
            self._client = None
        self.end.close()


def open_chardev(mode: str, file: str, socket_path: str, reactor: Reactor) -> CharDev:
    """Open and serve in one process. Raises ConfigError and HostError."""
    return CharDev(reactor, open_host_end(mode, file, socket_path))
