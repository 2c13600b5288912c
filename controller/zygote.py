"""The zygote: a warm interpreter that forks worker processes for the controller.

It is exec'd first, from the controller's main thread, while the controller still builds the VM. Every request is one
SOCK_SEQPACKET datagram (msgpack) with the worker's file descriptors; the answer is the new pid.

A worker is forked with CLONE_PARENT, which makes it the *controller's* child: it outlives the zygote, the
controller can wait for it, and PDEATHSIG ties it to the controller's main thread. With CLONE_NEWPID, where the host
allows it, it is pid 1 of a namespace of its own and can't name another process. No zmq context and no thread
may exist here before a fork: neither survives one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from controller.spawn import LAST_WORDS, NOTE_BYTES
from shared import log
from shared.ancestry import Ancestry, parent_in_proc
from shared.errors import HostError
from shared.linux import MADV_DONTFORK, die_with_parent, madvise, mmap_fd, recv_fds, set_name
from shared.worker_program import become, carry_out

MAX_REQUEST = 256 << 10
SYS_CLONE = 56
CLONE_PARENT, CLONE_PARENT_SETTID = 0x8000, 0x10_0000
# What a terminal or `timeout` sends to the whole process group is the controller's to answer, not a worker's.
TERMINAL_SIGNALS = tuple(
    getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "QUIT", "HUP", "TSTP", "TTIN", "TTOU")
)


def main(request_fd: int, controller: int, note_fd: int = -1) -> int:
    """Serve until the controller closes its end. `note_fd`: a file in which each child's pid is noted."""
    die_with_parent(controller)
    set_name("zygote")
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    requests = socket.socket(fileno=request_fd)
    note = _map_note(note_fd) if note_fd >= 0 else 0
    in_proc = parent_in_proc()
    import msgpack

    import shared.control
    import shared.sandbox
    import shared.seccomp
    import shared.vhost_backend
    import shared.worker

    shared.seccomp.load_all()
    gc.collect()
    gc.freeze()  # the children's collector must not touch, and so copy, these pages
    while True:
        data, fds = recv_fds(requests, MAX_REQUEST)
        if not data:
            return 0
        request = msgpack.unpackb(data)
        namespaces = shared.sandbox.PROFILES[request["sandbox"]].namespaces & shared.sandbox.CLONE_NEWPID
        pid = _fork_for_parent(namespaces, note)
        if pid == 0:
            requests.close()
            _become(request, fds, controller, in_proc)
        for fd in fds:
            os.close(fd)
        try:
            requests.send(msgpack.packb({"pid": pid}))
        except BrokenPipeError:
            return 0  # the controller is ending; PDEATHSIG takes the worker with it


def _map_note(fd: int) -> int:
    """The address. No child has it: what is noted there, the controller takes for a process of its own."""
    address = mmap_fd(fd, NOTE_BYTES)
    os.close(fd)
    madvise(address, NOTE_BYTES, MADV_DONTFORK)
    ctypes.memset(address, 0, NOTE_BYTES)  # so that the page is there when the kernel writes
    return address


def _fork_for_parent(namespaces: int, note: int = 0) -> int:
    """fork() with CLONE_PARENT. os.fork() can't pass flags; the interpreter is told by hand what os.fork() tells it.

    `namespaces`: CLONE_NEWPID or 0; a host that refuses it gets a worker without. `note`: where the kernel writes the
    pid, in the call and before the child runs; 0: nowhere.
    """
    python = ctypes.PyDLL(None)  # PyDLL: the GIL stays held across the call, as it is across os.fork()
    python.syscall.restype = ctypes.c_long
    flags, at = CLONE_PARENT | signal.SIGCHLD | (CLONE_PARENT_SETTID if note else 0), ctypes.c_void_p(note)
    python.PyOS_BeforeFork()
    pid: int = python.syscall(SYS_CLONE, flags | namespaces, 0, at, 0, 0)
    if pid < 0 and namespaces:
        pid = python.syscall(SYS_CLONE, flags, 0, at, 0, 0)
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return pid


def _become(request: dict[str, Any], fds: list[int], controller: int, in_proc: int) -> None:
    """In the child: run the worker and exit with its code. Never returns. The controller's pid, and as /proc has it."""
    named = dict(zip(request["fds"], fds, strict=True))
    last_words = named.pop(LAST_WORDS)
    carry_out(lambda: _worker(request, named, last_words, (controller, in_proc)), last_words)


def _worker(request: dict[str, Any], named: dict[str, int], last_words: int, parent: tuple[int, int]) -> int:
    from importlib import import_module

    from shared import sandbox
    from shared.worker import Start

    set_name(request["name"].lstrip("_") or request["kind"])
    settings, program = request["log"], request["program"]
    sandbox.keep_descriptors([*named.values(), last_words, settings["fd"]])
    ancestry = Ancestry(*parent, orphan=request["orphan"])
    ancestry.die_with_parent()
    log.configure(log.Level(settings["level"]), settings["fd"], request["name"], settings["began"])
    calls = sandbox.list_for(request["module"])
    box = sandbox.confine(
        request["sandbox"], calls, request["seccomp"], request["user"], ancestry.settle, execs=bool(program)
    )
    ancestry.die_with_parent()
    if program:
        _exec(request, {"fds": named, "last_words": last_words, "own_mounts": box.own_mounts, "parent": parent})
    module = import_module(request["module"])
    start = Start(
        request["kind"],
        request["name"],
        request["spec"],
        named,
        request["endpoint"],
        box,
        ancestry.pid,
        request["standby"],
    )
    code: int = module.main(start)
    return code


def _exec(request: dict[str, Any], more: dict[str, Any]) -> NoReturn:
    """Raises HostError."""
    fields = ("kind", "name", "module", "spec", "endpoint", "sandbox", "seccomp", "user", "standby", "log")
    try:
        become(request["program"], {**{field: request[field] for field in fields}, **more})
    except OSError as error:
        raise HostError(f"{request['program']} can't be executed: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
