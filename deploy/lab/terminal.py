"""A shell in the lab on this terminal: raw mode, the window's size, and everything put back at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import termios
import tty
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from deploy.lab.cache import lab_folder, say
from deploy.lab.machine import INTERRUPTED, Machine, Session, write_all
from deploy.lab.run import HOST_DIED, Job, collect, job_disk, needed


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Raw mode while inside, where there is a terminal at all. SIGTERM and SIGHUP leave by the same way."""
    if not os.isatty(fd):
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    saved = termios.tcgetattr(fd)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def shell(machine: Machine, puts: dict[str, Path], out: Path | None, nested: bool = False) -> int:
    """A shell until its exit; returns its exit code, or 125 when the lab machine died under it."""
    columns, rows = shutil.get_terminal_size()
    job = Job(puts=puts, rows=rows, columns=columns, nested=nested)
    ready = needed(job)
    with tempfile.TemporaryDirectory(prefix="run.", dir=lab_folder()) as folder:
        work = Path(folder)
        disk = job_disk(job, machine, work)
        say("starting (some 6 s); Ctrl-] pulls the plug")
        with open(work / "out.tar", "wb") as tar:
            session = Session(machine, {"tty": partial(write_all, sys.stdout.fileno()), "out": tar.write})

            def resized(*_: object) -> None:
                session.resize(*reversed(shutil.get_terminal_size()))

            signal.signal(signal.SIGWINCH, resized)
            try:
                with raw(sys.stdin.fileno()):
                    verdict = session.run(ready, disk, work, sys.stdin.fileno())
            except KeyboardInterrupt:
                say("ended by Ctrl-]")
                return INTERRUPTED
        if out:
            collect(work / "out.tar", out)
            (out / ".console").write_text(verdict.console)
    if verdict.died:
        say(f"the lab machine itself died: {verdict.died}")
        return HOST_DIED
    return verdict.code or 0
