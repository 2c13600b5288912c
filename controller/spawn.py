"""Starting processes: the zygote, a fresh interpreter, and everything else through it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping

from shared import log
from shared.errors import WorkerError, WorkerLost
from shared.linux import recv_fds, send_fds
from shared.reactor import Lock, Reactor, readable
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

MAX_ANSWER = 4096
SPAWN_SECONDS = 30.0
# The name of the descriptor on which a worker that can't go on says why, in at most so many bytes.
LAST_WORDS = "last-words"
LAST_WORDS_BYTES = 1024


def interpreter(code: str, *arguments: str) -> list[str]:
    """argv that runs `code` with this interpreter as it was started (`-m` would import runpy, 5 ms)."""
    flags = [f"-{letter}" for letter, on in _flags() if on]
    # It must find our packages where this one did, also when -I or -S keep it from looking at the environment.
    return [sys.executable, *flags, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}", *arguments]


def _flags() -> list[tuple[str, bool]]:
    return [("I", bool(sys.flags.isolated)), ("S", bool(sys.flags.no_site)), ("E", bool(sys.flags.ignore_environment))]


def exec_python(code: str, arguments: list[str], fds: Mapping[int, int]) -> int:
    """posix_spawn a fresh interpreter; `fds` maps its descriptor numbers (3 and up) to ours. The pid.

    posix_spawn and not fork: the controller has gigabytes mapped, and its vCPUs share its address space.
    """
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in fds.items()]
    argv = interpreter(code, *arguments)
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE])


class Zygote:
    """The controller's end. Requests are answered in order; a dead zygote is started again at the next request."""

    def __init__(self) -> None:
        self.pid = 0
        self.starts = 0
        self.on_start: Callable[[int], None] = lambda _pid: None
        self._lock = Lock()
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Exec it, unless that has been done. From the main thread: PDEATHSIG watches the thread, not the process."""
        if self._socket is not None:
            return
        import socket

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = "import sys; from controller.zygote import main; sys.exit(main(3, int(sys.argv[1])))"
        self.pid = exec_python(code, [str(os.getpid())], {3: theirs.fileno()})
        self.starts += 1
        self.on_start(self.pid)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours

    @property
    def running(self) -> bool:
        """As far as is known: its death is noticed at the next request, or by the watchdog."""
        return self._socket is not None

    def stop(self) -> None:
        """End the zygote and reap it. It holds nothing that a SIGKILL could harm."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            os.kill(self.pid, signal.SIGKILL)
            _reap(self.pid)

    def kill(self) -> None:
        """It hangs: whoever waits for its answer gets its end instead."""
        if self._socket is not None:
            os.kill(self.pid, signal.SIGKILL)

    def renew(self) -> bool:
        """Start another in a dead one's place; False while somebody is at it already."""
        if self._lock.held:
            return False
        self.stop()
        self.start()
        return True

    async def fork(self, reactor: Reactor, request: dict[str, Any], fds: Mapping[str, int]) -> int:
        """The pid of a new worker, a child of ours. Raises WorkerError."""
        import msgpack

        data = msgpack.packb({**request, "fds": list(fds), "log": log.settings()})
        async with self._lock:
            for attempt in (1, 2):
                if self._socket is None:
                    self.start()
                assert self._socket is not None
                cause: OSError | None = None
                try:
                    send_fds(self._socket, data, list(fds.values()))
                    await readable(reactor, self._socket.fileno(), SPAWN_SECONDS)
                    answer, _ = recv_fds(self._socket, MAX_ANSWER)
                except OSError as error:
                    answer, cause = b"", error
                if answer:
                    pid = int(msgpack.unpackb(answer)["pid"])
                    if pid <= 0:
                        raise WorkerError(f"{request['name']}: the zygote could not fork")
                    return pid
                # The zygote died. Whether it had forked is not known: a worker whose pid nobody learnt finds
                # its control endpoint unclaimed and its vhost socket closed, and ends.
                self.stop()
                log.warn(f"the zygote ended (attempt {attempt}); starting another")
            raise WorkerLost(f"{request['name']}: no zygote to fork it") from cause


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
