"""controller.migration.estimate: the forecast from two looks at what a guest has written."""

from __future__ import annotations

import math

import pytest

from controller.migration.arguments import Bounds
from controller.migration.estimate import Dirtying, forecast
from controller.migration.fixed_cost import FIRST_GUESS_MS, GUESSES, FixedCost

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
