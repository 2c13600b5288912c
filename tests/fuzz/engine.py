"""Runs a target on inputs: from a seed or from a file, each bounded in time and memory.

An input is a finding when the target lets an exception out that is not of shared/errors.py's tree, says that a
property does not hold (AssertionError), takes longer than SECONDS or more memory than MEMORY. The input's bytes are
all that decides what happens, so the file that is kept replays it.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from shared import log
from shared.errors import FlotillaError

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
REGRESSIONS = HERE / "regressions"
FINDINGS = HERE / "findings"
SECONDS = 5  # of processor time, for one input
MEMORY = 512 << 20  # beyond what the process has mapped when the target is ready
MAX_INPUT = 2048
GROWN = 256  # inputs that led to something new, kept during a run


@dataclass(frozen=True, slots=True)
class Target:
    """`open` makes what the target needs and gives the function that takes one input; leaving it takes that apart."""

    name: str
    open: Callable[[], Iterator[Callable[[bytes], None]]]
    seeds: Callable[[], list[bytes]] = list
    about: str = ""


class TooSlow(BaseException):
    """Not an Exception: no handler of the product's may swallow it."""


@dataclass(frozen=True, slots=True)
class Finding:
    target: str
    data: bytes
    why: str
    trace: str

    def keep(self) -> Path:
        folder = FINDINGS / self.target
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / hashlib.sha256(self.data).hexdigest()[:16]
        path.write_bytes(self.data)
        return path


@contextmanager
def bounded() -> Iterator[None]:
    """Memory for everything within. The limit is the process's address space, so the kernel's to keep."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlow


def attempt(name: str, run: Callable[[bytes], None], data: bytes) -> Finding | None:
    """One input. Within bounded()."""
    former = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        run(data)
    except FlotillaError:
        return None
    except TooSlow:
        return Finding(name, data, f"takes longer than {SECONDS} s", traceback.format_exc())
    except Exception as error:
        return Finding(name, data, f"{type(error).__name__}: {str(error)[:300]}", traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
    return None


def files(target: str) -> list[Path]:
    """Corpus and regression inputs of a target by its name, in an order that stays the same."""
    folders = (CORPUS / target, REGRESSIONS / target)
    return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir())


def mutate(choice: random.Random, pool: list[bytes]) -> bytes:
    """An input of the pool, changed; now and then one of nothing but chance."""
    if choice.random() < 0.1:
        return choice.randbytes(choice.randrange(1, 200))
    data = bytearray(choice.choice(pool))
    for _ in range(1 + choice.randrange(8)):
        at, count = choice.randrange(len(data) + 1), choice.randrange(1, 17)
        match choice.randrange(6):
            case 0:
                data[at:at] = choice.randbytes(count)
            case 1:
                del data[at : at + count]
            case 2:
                data[at:at] = data[at : at + count]
            case 3:
                other = choice.choice(pool)
                start = choice.randrange(len(other) + 1)
                data[at:at] = other[start : start + 4 * count]
            case 4 if at < len(data):
                data[at] = choice.randrange(256)
            case _ if at < len(data):
                data[at] ^= 1 << choice.randrange(8)
    return bytes(data[:MAX_INPUT])


@dataclass(slots=True)
class Coverage:
    """Lines of the product that some input has reached: what makes an input worth keeping for a run."""

    packages: tuple[str, ...]
    seen: set[tuple[str, int]]
    fresh: bool = False

    def _call(self, frame: FrameType, _event: str, _argument: object) -> Callable[..., object] | None:
        return self._line if frame.f_code.co_filename.startswith(self.packages) else None

    def _line(self, frame: FrameType, event: str, _argument: object) -> Callable[..., object]:
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            if place not in self.seen:
                self.seen.add(place)
                self.fresh = True
        return self._line

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.fresh = False
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)


def product() -> Coverage:
    root = HERE.parent.parent
    packages = ("shared", "controller", "migration_agent", "console_worker", "net_worker", "blk_worker", "vcpu_worker")
    return Coverage(tuple(f"{root}/{name}/" for name in packages), set())


@dataclass(slots=True)
class Run:
    """What a run of a target came to."""

    target: str
    seed: int
    inputs: int = 0
    lines: int = 0
    finding: Finding | None = None
    grown: list[bytes] = field(default_factory=list)  # inputs that reached something new


def fuzz(
    target: Target, *, seed: int, inputs: int | None = None, seconds: float | None = None,
    say: Callable[[str], None] = lambda _text: None, every: int = 4,
) -> Run:  # fmt: skip
    """Until the first finding, or so many inputs, or so long. Each `every`-th input is traced for what it reaches."""
    done, choice, coverage = Run(target.name, seed), random.Random(seed), product()
    began = said = time.monotonic()
    with _opened(target) as run:
        pool = [path.read_bytes() for path in files(target.name)] + target.seeds() or [b"\0"]
        queue = list(pool)
        with bounded():
            while inputs is None or done.inputs < inputs:
                now = time.monotonic()
                if seconds is not None and now - began >= seconds:
                    break
                if now - said >= 30:
                    said = now
                    say(f"{target.name}: {done.inputs} inputs, {len(coverage.seen)} lines, {now - began:.0f} s")
                data = queue.pop() if queue else mutate(choice, pool)
                if done.inputs % every == 0:
                    with coverage.watch():
                        done.finding = attempt(target.name, run, data)
                    if coverage.fresh and len(done.grown) < GROWN:
                        pool.append(data)
                        done.grown.append(data)
                else:
                    done.finding = attempt(target.name, run, data)
                done.inputs += 1
                if done.finding is not None:
                    break
    done.lines = len(coverage.seen)
    return done


def replay(target: Target, path: Path) -> Finding | None:
    """One file, anew."""
    with _opened(target) as run, bounded():
        return attempt(target.name, run, path.read_bytes())


@contextmanager
def _opened(target: Target) -> Iterator[Callable[[bytes], None]]:
    """The target, and nobody who logs what guests and peers do wrong."""
    before, nowhere = log.settings(), os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    log.configure(log.Level.TRACE, nowhere)
    try:
        with contextmanager(target.open)() as run:
            yield run
    finally:
        log.configure(log.Level(int(str(before["level"]))), int(str(before["fd"])))
        os.close(nowhere)
