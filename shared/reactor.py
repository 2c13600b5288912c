"""One thread, one epoll set, plain coroutines: the main loop of every Flotilla process.

It is small on purpose. asyncio would do the same work, but its import alone costs more than the whole time from exec to
the guest's first serial byte (docs/adr/0001-reactor.md has the figures).

    Reactor     epoll set, timers and the queue of callbacks that run next
    Future      a value that is not there yet; awaiting it suspends the coroutine
    Task        a Future whose value is a coroutine's; cancel() throws Cancelled into it

Callbacks run to completion. An exception that leaves a callback, or a task that nobody awaits, goes to
`Reactor.on_error`, which by default ends `run()` with that exception: errors are never dropped.
"""

from __future__ import annotations

import heapq
import os
import select
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator

from shared.errors import FlotillaError, Timeout
from shared.typed import Any, Generic, TypeVar, cast

T = TypeVar("T")
Callback = Callable[[], None]
# More than an answer takes from its descriptor through tasks that wait for tasks.
SETTLED_ROUNDS = 6
_ERROR_EVENTS = select.EPOLLHUP | select.EPOLLERR


class Cancelled(BaseException):
    """Thrown into a cancelled task. Not an Exception, so that `except Exception` does not swallow it."""


class Future(Generic[T]):
    """A result that arrives later, once. Unlike asyncio's it needs no loop until somebody awaits it."""

    __slots__ = ("_callbacks", "_done", "_error", "_value")

    def __init__(self) -> None:
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Future[T]], None]] = []

    def done(self) -> bool:
        return self._done

    def result(self) -> T:
        """The value, or raises what set_exception() was given. The future must be done."""
        assert self._done, "result() of a future that is not done"
        if self._error is not None:
            raise self._error
        return cast("T", self._value)

    def exception(self) -> BaseException | None:
        return self._error

    def set_result(self, value: T) -> None:
        if not self._done:
            self._value = value
            self._finish()

    def set_exception(self, error: BaseException) -> None:
        if not self._done:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self._done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def add_done_callback(self, callback: Callable[[Future[T]], None]) -> None:
        if self._done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def remove_done_callback(self, callback: Callable[[Future[T]], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def __await__(self) -> Generator[Future[T], None, T]:
        if not self._done:
            yield self
        return self.result()


class Task(Future[T]):
    """Drives a coroutine; itself a future of the coroutine's result."""

    __slots__ = ("_awaited", "_cancelled", "_coroutine", "_reactor", "_waiting", "name")

    def __init__(self, reactor: Reactor, coroutine: Coroutine[Any, Any, T], name: str) -> None:
        super().__init__()
        self.name = name
        self._reactor = reactor
        self._coroutine = coroutine
        self._waiting: Future[Any] | None = None
        self._awaited = False
        self._cancelled = False

    def add_done_callback(self, callback: Callable[[Future[T]], None]) -> None:
        self._awaited = True
        super().add_done_callback(callback)

    def __await__(self) -> Generator[Future[T], None, T]:
        self._awaited = True
        return super().__await__()

    def cancel(self) -> None:
        """Throw Cancelled into the coroutine at its await. A finished task stays as it is."""
        if self._done or self._cancelled:
            return
        self._cancelled = True
        if self._waiting is not None:  # otherwise a step is queued already and will see the flag
            self._waiting.remove_done_callback(self._wake)
            self._waiting = None
            self._reactor.call_soon(self._step)

    def _wake(self, _: Future[Any]) -> None:
        self._waiting = None
        # Through the queue, not at once: completing a future must never run a stranger's code inside the caller.
        self._reactor.call_soon(self._step)

    def _step(self) -> None:
        try:
            if self._cancelled:
                self._cancelled = False
                waiting = self._coroutine.throw(Cancelled())
            else:
                waiting = self._coroutine.send(None)
        except StopIteration as stop:
            self.set_result(stop.value)
        except Cancelled as error:
            self._awaited = True
            self.set_exception(error)
        except Exception as error:
            self.set_exception(error)
            if not self._awaited:
                self._reactor.on_error(error, f"task {self.name}")
        else:
            self._waiting = waiting
            waiting.add_done_callback(self._wake)


class Timer:
    """What call_later() returns; cancel() is idempotent."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback | None) -> None:
        self.when = when
        self.callback = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class Reactor:
    """The loop. One per process, made after any fork."""

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._ready: deque[Callback] = deque()
        self._timers: list[Timer] = []
        self._exit_code: int | None = None
        self._failure: BaseException | None = None
        self.on_error: Callable[[BaseException, str], None] = self._fail

    def close(self) -> None:
        self._epoll.close()

    def _fail(self, error: BaseException, _where: str) -> None:
        self._failure = error
        self._exit_code = 1

    def _update(self, fd: int, was_known: bool) -> None:
        mask = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if not mask:
            try:
                self._epoll.unregister(fd)
            except (FileNotFoundError, OSError):
                pass  # the owner closed the fd first, which took it out of the set
        elif was_known:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)

    def _add(self, callbacks: dict[int, Callback], fd: int, callback: Callback) -> None:
        known = fd in self._readers or fd in self._writers
        callbacks[fd] = callback
        try:
            self._update(fd, known)
        except OSError:
            del callbacks[fd]  # the next file with this number would be taken for one that is in the set
            raise

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call back whenever the fd is readable or hung up (level-triggered). PermissionError: it is a plain file."""
        self._add(self._readers, fd, callback)

    def remove_reader(self, fd: int) -> None:
        if self._readers.pop(fd, None) is not None:
            self._update(fd, True)

    def add_writer(self, fd: int, callback: Callback) -> None:
        self._add(self._writers, fd, callback)

    def remove_writer(self, fd: int) -> None:
        if self._writers.pop(fd, None) is not None:
            self._update(fd, True)

    def call_soon(self, callback: Callback) -> None:
        self._ready.append(callback)

    def call_settled(self, callback: Callback, rounds: int = SETTLED_ROUNDS) -> None:
        """Call back when what has come by now has reached whoever waits for it. For deadlines: timers go before what
        the same round's descriptors wake."""
        if rounds:
            self.call_soon(lambda: self.call_settled(callback, rounds - 1))
        else:
            callback()

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str = "") -> Task[T]:
        task = Task(self, coroutine, name or getattr(coroutine, "__qualname__", "task"))
        self._ready.append(task._step)
        return task

    def stop(self, code: int = 0) -> None:
        """Make run() return `code` after the present round of callbacks."""
        if self._exit_code is None:
            self._exit_code = code

    def run(self) -> int:
        """Run until stop(). Raises what on_error was given unless it was replaced."""
        while self._exit_code is None:
            self._round()
        code, self._exit_code = self._exit_code, None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return code

    def run_until(self, awaitable: Awaitable[T], timeout: float | None = None) -> T:
        """Drive one awaitable to its end and return its value; Timeout after `timeout` seconds."""

        async def main() -> T:
            if timeout is None:
                return await awaitable
            return await within(self, timeout, awaitable, "run_until")

        task = self.spawn(main(), "run_until")
        task.add_done_callback(lambda _: self.stop())
        self.run()
        return task.result()

    def _round(self) -> None:
        if self._ready:
            timeout = 0.0
        elif self._timers:
            timeout = max(0.0, self._timers[0].when - time.monotonic())
        else:
            timeout = -1.0
        for fd, events in self._epoll.poll(timeout):
            if events & (select.EPOLLIN | _ERROR_EVENTS) and (callback := self._readers.get(fd)):
                self._call(callback)
            if events & (select.EPOLLOUT | _ERROR_EVENTS) and (callback := self._writers.get(fd)):
                self._call(callback)
        if self._timers:
            now = time.monotonic()
            while self._timers and self._timers[0].when <= now:
                timer = heapq.heappop(self._timers)
                if timer.callback is not None:
                    self._call(timer.callback)
        for _ in range(len(self._ready)):
            self._call(self._ready.popleft())

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception as error:
            self.on_error(error, getattr(callback, "__qualname__", repr(callback)))


async def sleep(reactor: Reactor, seconds: float) -> None:
    future: Future[None] = Future()
    timer = reactor.call_later(seconds, lambda: future.set_result(None))
    try:
        await future
    finally:
        timer.cancel()


async def _ready_fd(
    add: Callable[[int, Callback], None], remove: Callable[[int], None], fd: int
) -> None:
    future: Future[None] = Future()
    add(fd, lambda: future.set_result(None))
    try:
        await future
    finally:
        remove(fd)


async def readable(reactor: Reactor, fd: int, timeout: float | None = None) -> None:
    """Wait until the fd is readable or hung up. The fd must have no other reader. Raises Timeout."""
    await within(reactor, timeout, _ready_fd(reactor.add_reader, reactor.remove_reader, fd), f"fd {fd}")


async def writable(reactor: Reactor, fd: int, timeout: float | None = None) -> None:
    """Wait until the fd takes data or hung up. Raises Timeout."""
    await within(reactor, timeout, _ready_fd(reactor.add_writer, reactor.remove_writer, fd), f"fd {fd}")


async def within(reactor: Reactor, seconds: float | None, awaitable: Awaitable[T], what: str) -> T:
    """The awaitable's value; after `seconds` it is cancelled and Timeout says what was waited for. An answer that came
    while this process stood still beyond the time is in time: who stood still is not the one to complain."""
    if seconds is None:
        return await awaitable
    task = reactor.spawn(_await(awaitable), what)
    late: list[bool] = []

    def expire() -> None:
        if not task.done():
            late.append(True)
            task.cancel()

    timer = reactor.call_later(seconds, lambda: reactor.call_settled(expire))
    try:
        return await task
    except Cancelled:
        if late:
            raise Timeout(f"no answer within {seconds:g} s: {what}") from None
        task.cancel()
        raise
    finally:
        timer.cancel()


async def gather(reactor: Reactor, *awaitables: Awaitable[T]) -> list[T]:
    """All values in order. Waits for all of them, then raises the first failure, if any: nothing runs on unseen."""
    tasks = [reactor.spawn(_await(a), "gather") for a in awaitables]
    for task in tasks:
        task.add_done_callback(lambda _: None)
    try:
        for task in tasks:
            if not task.done():
                waiter: Future[None] = Future()
                task.add_done_callback(lambda _, w=waiter: w.set_result(None))  # type: ignore[misc]
                await waiter
    except Cancelled:
        for task in tasks:
            task.cancel()
        raise
    return [task.result() for task in tasks]


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


class Event:
    """A flag that coroutines can wait for; set() wakes all, clear() re-arms."""

    __slots__ = ("_flag", "_waiters")

    def __init__(self) -> None:
        self._flag = False
        self._waiters: list[Future[None]] = []

    def is_set(self) -> bool:
        return self._flag

    def set(self) -> None:
        self._flag = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set_result(None)

    def clear(self) -> None:
        self._flag = False

    async def wait(self) -> None:
        if not self._flag:
            waiter: Future[None] = Future()
            self._waiters.append(waiter)
            await waiter


class Lock:
    """Serialises coroutines, first come first served: `async with lock:`."""

    __slots__ = ("_held", "_waiters")

    def __init__(self) -> None:
        self._held = False
        self._waiters: deque[Future[None]] = deque()

    @property
    def held(self) -> bool:
        return self._held

    async def __aenter__(self) -> None:
        if self._held:
            waiter: Future[None] = Future()
            self._waiters.append(waiter)
            try:
                await waiter
            except Cancelled:
                # Handed over in the very round in which we are cancelled: pass it on, or nobody gets it.
                if waiter.done():
                    await self.__aexit__()
                else:
                    self._waiters.remove(waiter)
                raise
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        if self._waiters:
            self._waiters.popleft().set_result(None)
        else:
            self._held = False


def drain_eventfd(fd: int) -> int:
    """Read an eventfd without waiting; 0 if it was not signalled."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def describe(error: BaseException) -> str:
    """One line for a log: the type is named unless it is one of ours."""
    return str(error) if isinstance(error, FlotillaError) else f"{type(error).__name__}: {error}"
