"""Starting processes: the zygote, a fresh interpreter, and everything else through it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping

from shared import log
from shared.errors import Timeout, WorkerError, WorkerLost
from shared.linux import memfd, recv_fds, send_fds
from shared.reactor import Event, Lock, Reactor, describe, readable
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

MAX_ANSWER = 4096
# For an answer; twice as long each time that it was not enough, or a host on which Python needs longer to start would
# have one zygote after another.
SPAWN_SECONDS, MOST_SECONDS = 30.0, 600.0
# The name of the descriptor on which a worker that can't go on says why, in at most so many bytes.
LAST_WORDS = "last-words"
LAST_WORDS_BYTES = 1024
# Of a pid_t, in the memory in which the kernel notes the zygote's latest child.
NOTE_BYTES = 4


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
    """The controller's end. Requests are answered in order; one that is dead or silent is replaced at the next request.

    The kernel notes each new pid in memory that both share, in the very call that forks: a zygote that ends before it
    has answered leaves no process that nobody knows.
    """

    def __init__(self) -> None:
        self.pid = 0
        self.starts = 0
        self.on_start: Callable[[int], None] = lambda _pid: None
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._note = -1
        self._late = 0  # answers in a row that did not come in time
        self._released = Event()
        self._released.set()

    def start(self) -> None:
        """Exec it, unless that has been done. From the main thread: PDEATHSIG watches the thread, not the process."""
        if self._socket is not None:
            return
        import socket

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        note = memfd("forked", NOTE_BYTES)
        code = "import sys; from controller.zygote import main; sys.exit(main(3, int(sys.argv[1]), 4))"
        try:
            self.pid = exec_python(code, [str(os.getpid())], {3: theirs.fileno(), 4: note})
        except BaseException:
            os.close(note)
            raise
        self.starts += 1
        self.on_start(self.pid)
        theirs.close()
        ours.setblocking(False)
        self._socket, self._note = ours, note

    @property
    def running(self) -> bool:
        """As far as is known: its death is noticed at the next request, or by the watchdog."""
        return self._socket is not None

    def stop(self) -> int:
        """End the zygote and reap it: it holds nothing that a SIGKILL could harm. The pid of what it has forked for the
        latest request, 0 if nothing."""
        if self._socket is None:
            return 0
        self._socket.close()
        self._socket = None
        os.kill(self.pid, signal.SIGKILL)
        _reap(self.pid)
        if self._note < 0:
            return 0
        note, self._note = self._note, -1
        try:
            return int.from_bytes(os.pread(note, NOTE_BYTES, 0), sys.byteorder)
        finally:
            os.close(note)

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

    def hold(self) -> None:
        """Until release(), fork() serves only who is to outlive us: whoever tidies up is there before all others."""
        self._released.clear()

    def release(self) -> None:
        """Idempotent."""
        self._released.set()

    async def fork(self, reactor: Reactor, request: dict[str, Any], fds: Mapping[str, int]) -> int:
        """The pid of a new worker, a child of ours. Raises WorkerError, OSError; there is no new process then."""
        import msgpack

        data = msgpack.packb({**request, "fds": list(fds), "log": log.settings()})
        if not request["orphan"]:
            await self._released.wait()
        async with self._lock:
            for attempt in (1, 2):
                if self._socket is None:
                    self.start()
                cause: Exception | None = None
                try:
                    pid = await self._ask(reactor, data, list(fds.values()))
                except (OSError, Timeout) as error:
                    # Its answer may still come, and the next request would take it for its own.
                    pid, cause = self.stop(), error
                    log.warn(f"the zygote does not answer (attempt {attempt}): {describe(error)}; it is replaced")
                except BaseException:
                    end_child(self.stop())
                    raise
                if pid < 0:
                    raise WorkerError(f"{request['name']}: the zygote could not fork")
                if pid:
                    return pid
            raise WorkerLost(f"{request['name']}: no zygote to fork it") from cause

    async def _ask(self, reactor: Reactor, data: bytes, fds: list[int]) -> int:
        """The pid that it answers, -1 if it could not fork. Raises OSError and Timeout for one that is of no use."""
        import msgpack

        assert self._socket is not None
        if self._note >= 0:
            os.pwrite(self._note, bytes(NOTE_BYTES), 0)
        send_fds(self._socket, data, fds)
        try:
            await readable(reactor, self._socket.fileno(), min(SPAWN_SECONDS * 2**self._late, MOST_SECONDS))
        except Timeout:
            self._late += 1
            raise
        self._late = 0
        answer, _ = recv_fds(self._socket, MAX_ANSWER)
        if not answer:
            raise ConnectionResetError("it has ended")
        return int(msgpack.unpackb(answer)["pid"])


def end_child(pid: int) -> None:
    """One that nobody knows of yet, and nobody wants; 0: there is none."""
    if pid:
        os.kill(pid, signal.SIGKILL)
        _reap(pid)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
