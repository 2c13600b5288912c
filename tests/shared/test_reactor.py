"""shared.reactor: the loop, its futures and its cancellation."""

from __future__ import annotations

import os
import socket
import time

import pytest

from shared.errors import Timeout
from shared.reactor import Cancelled, Event, Future, Lock, Reactor, gather, readable, sleep, within


@pytest.fixture
def reactor():
    loop = Reactor()
    yield loop
    loop.close()


def test_run_until_returns_the_coroutines_value(reactor):
    async def main():
        await sleep(reactor, 0)
        return 7

    assert reactor.run_until(main(), 30) == 7


def test_readable_wakes_when_the_fd_has_data(reactor):
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    reactor.call_later(0.01, lambda: os.eventfd_write(fd, 3))

    async def main():
        await readable(reactor, fd, 30)
        return os.eventfd_read(fd)

    assert reactor.run_until(main(), 30) == 3
    os.close(fd)


def test_file_that_can_not_be_waited_for_is_refused_and_leaves_nothing_behind(reactor, tmp_path):
    with (tmp_path / "file").open("wb") as file:
        number = file.fileno()
        for add in (reactor.add_reader, reactor.add_writer):
            with pytest.raises(PermissionError):
                add(number, lambda: None)
    read_end, write_end = os.pipe()
    os.dup2(read_end, number)  # the next file with this number
    os.write(write_end, b"x")
    seen = []
    reactor.add_reader(number, lambda: seen.append(reactor.stop()))
    reactor.run()
    assert seen
    for fd in {read_end, write_end, number}:
        os.close(fd)


def test_within_says_what_was_waited_for(reactor):
    with pytest.raises(Timeout, match="the answer of life"):
        reactor.run_until(within(reactor, 0.01, Future(), "the answer of life"), 30)


def test_answer_that_came_while_this_process_stood_still_beyond_the_time_is_in_time(reactor):
    here, there = socket.socketpair()
    with here, there:
        there.send(b"the answer")

        async def main():
            answer = reactor.spawn(readable(reactor, here.fileno(), 0.01))
            await sleep(reactor, 0)
            stood_still = time.monotonic() + 0.02
            while time.monotonic() < stood_still:
                pass
            await answer

        reactor.run_until(main(), 30)


def test_cancel_runs_finally_blocks_and_a_later_result_does_not_step_again(reactor):
    seen = []
    gate: Future[None] = Future()

    async def victim():
        try:
            await gate
        finally:
            seen.append("cleaned")

    async def main():
        task = reactor.spawn(victim())
        await sleep(reactor, 0)
        task.cancel()
        gate.set_result(None)
        with pytest.raises(Cancelled):
            await task

    reactor.run_until(main(), 30)
    assert seen == ["cleaned"]


def test_cancel_of_a_task_whose_future_just_completed_is_not_lost(reactor):
    gate: Future[None] = Future()
    never: Future[None] = Future()

    async def victim():
        await gate
        await never

    async def main():
        task = reactor.spawn(victim())
        await sleep(reactor, 0)
        gate.set_result(None)
        task.cancel()
        with pytest.raises(Cancelled):
            await task

    reactor.run_until(main(), 30)


def test_gather_waits_for_all_before_it_raises(reactor):
    finished = []

    async def good():
        await sleep(reactor, 0.02)
        finished.append(True)

    async def bad():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        reactor.run_until(gather(reactor, bad(), good()), 30)
    assert finished == [True]


def test_an_error_in_a_task_nobody_awaits_ends_run(reactor):
    async def bad():
        raise ValueError("unseen")

    reactor.spawn(bad())
    with pytest.raises(ValueError, match="unseen"):
        reactor.run()


def test_lock_is_fair_and_event_wakes_all(reactor):
    order = []
    lock, event = Lock(), Event()

    async def holder(name):
        await event.wait()
        async with lock:
            order.append(name)
            await sleep(reactor, 0)

    async def main():
        tasks = [reactor.spawn(holder(n)) for n in "abc"]
        await sleep(reactor, 0)
        event.set()
        await gather(reactor, *tasks)

    reactor.run_until(main(), 30)
    assert order == ["a", "b", "c"]


def test_timers_fire_in_order_and_cancelled_ones_do_not(reactor):
    fired = []
    reactor.call_later(0.02, lambda: fired.append(2))
    reactor.call_later(0.01, lambda: fired.append(1))
    reactor.call_later(0.015, lambda: fired.append(0)).cancel()
    reactor.run_until(sleep(reactor, 0.03), 30)
    assert fired == [1, 2]
