"""controller.migration.estimate: the forecast from two looks at what a guest has written."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from controller.migration import estimate as module
from controller.migration.arguments import UNASKED, Bounds, parse_send
from controller.migration.estimate import Dirtying, estimate, forecast, sample
from controller.migration.fixed_cost import FIRST_GUESS_MS, GUESSES, FixedCost
from shared.pages import Bitmap
from shared.reactor import Cancelled, Event, Reactor

MB = 1_000_000


def test_a_guest_that_writes_nothing_takes_its_ram_by_the_speed():
    answer = forecast(Dirtying(0, 0, 1000 * MB), 8, Bounds())
    assert answer["converges"] and answer["why"] == ""
    assert 1.0 < answer["total_s"] < 1.2 and answer["downtime_ms"] < 100


def test_a_guest_that_writes_faster_than_the_network_does_not_converge_and_it_says_why():
    answer = forecast(Dirtying(100 * MB, 900 * MB, 4000 * MB), 1, Bounds())
    assert not answer["converges"] and answer["total_s"] is None and answer["downtime_ms"] is None
    assert "125 MB/s carried" in answer["why"]


def test_a_working_set_that_is_written_again_and_again_is_sent_once_more_not_often():
    """20 MB, over and over: at 10 Gbit/s that is a pause of its own size."""
    answer = forecast(Dirtying(20 * MB, 20 * MB, 1000 * MB), 10, Bounds())
    assert answer["converges"] and answer["downtime_ms"] < 100


def test_what_pausing_and_starting_take_is_part_of_the_forecast():
    cheap, dear = (forecast(Dirtying(0, 0, 1000 * MB), 10, Bounds(), fixed_ms) for fixed_ms in (10, 200))
    assert dear["downtime_ms"] - cheap["downtime_ms"] == 190
    over = forecast(Dirtying(0, 0, 1000 * MB), 10, Bounds(downtime_ms=100, strict=True), 200)
    assert not over["converges"] and "would not fall below 203 ms" in over["why"]


def test_a_step_counts_as_it_was_last_seen_and_as_guessed_before():
    cost = FixedCost()
    assert cost.total_ms == FIRST_GUESS_MS and cost.report()["guessed"] == ["pause", "save", "load", "start"]
    cost.took("pause", 50)
    cost.took("pause", 30)
    assert cost.total_ms == FIRST_GUESS_MS - GUESSES["pause"] + 30
    report = cost.report()
    assert report["measured_ms"] == {"pause": 30} and report["guessed"] == ["save", "load", "start"]


@pytest.mark.parametrize("said", [None, "7", -1.0, math.inf, math.nan, True, [7]])
def test_what_a_peer_says_that_is_no_duration_is_passed_over(said):
    cost = FixedCost()
    cost.heard("load", said)
    assert cost.total_ms == FIRST_GUESS_MS
    cost.heard("load", 7)
    assert cost.report()["measured_ms"] == {"load": 7}


def test_more_is_never_dirty_than_ram_holds():
    assert Dirtying(100, 900, 1000).after(1e6) == 1000
    assert Dirtying(100, 1000, 5000).after(0.05) == 50


def test_forecast_converges_where_a_send_that_names_no_bound_would_pause():
    """Pausing and starting take longer than the wish of 300 ms, which keeps no guest."""
    assert parse_send({"destination_url": "tcp:h:1"}).bounds == UNASKED
    guest = Dirtying(0, 0, 1000 * MB)
    default = forecast(guest, 10, UNASKED, 400)
    assert default["converges"] and default["downtime_ms"] > 400 and default["why"] == ""
    assert not forecast(guest, 10, Bounds(downtime_ms=300), 400)["converges"]


def test_copy_that_outlasts_the_time_limit_does_not_converge_and_it_says_why():
    answer = forecast(Dirtying(0, 0, 1000 * MB), 1, Bounds(timeout_s=5))
    assert not answer["converges"] and answer["why"] == "125 MB/s carried: copying would take longer than 5 s"


class Log:
    """Of a guest that writes nothing."""

    def __init__(self) -> None:
        self.on = Event()
        self.stopped = self.closed = False

    async def start(self) -> None:
        self.on.set()

    def mark_all(self, into: Bitmap) -> None:
        into.set(0, MB // 4096 * 4096)

    def harvest(self, into: Bitmap) -> None:
        pass

    async def stop(self) -> None:
        assert not self.closed
        self.stopped = True

    def close(self) -> None:
        self.closed = True


def machine(log: Log, **more: float) -> SimpleNamespace:
    cost = FixedCost()
    for step, milliseconds in more.items():
        cost.took(step, milliseconds)
    return SimpleNamespace(memory_parts=lambda: ([(0, MB, 0, 0)], [-1]), dirty_pages=lambda: log, fixed_cost=cost)


@pytest.fixture
def reactor():
    loop = Reactor()
    yield loop
    loop.close()


def test_estimate_counts_with_the_bounds_of_a_send_that_names_none(reactor, monkeypatch):
    monkeypatch.setattr(module, "LOOKS", (0.001, 0.01))
    answer = reactor.run_until(estimate(reactor, machine(Log(), start=400.0)), 20)
    assert all(row["converges"] for row in answer["forecasts"])


def test_logs_are_off_when_whoever_asked_has_gone(reactor, monkeypatch):
    monkeypatch.setattr(module, "LOOKS", (1e6, 2e6))
    log = Log()

    async def ask_and_leave() -> None:
        task = reactor.spawn(sample(reactor, machine(log)), "sample")
        await log.on.wait()
        task.cancel()
        with pytest.raises(Cancelled):
            await task

    reactor.run_until(ask_and_leave(), 20)
    assert log.stopped and log.closed
