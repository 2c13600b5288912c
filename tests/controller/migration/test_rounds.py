"""controller.migration.rounds: when to go on, when to pause, when to give up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.migration.arguments import Bounds, Strategy
from controller.migration.rounds import Flushes, Next, Rounds

MB = 1_000_000
PAGE = 4096


def after(rounds: Rounds, sent: int, seconds: float, dirty_pages: int, *, turn: float = 0.001) -> Rounds:
    rounds.sent(sent, seconds, turn)
    rounds.found(dirty_pages, seconds)
    return rounds


def test_the_estimate_is_what_is_left_and_the_fixed_costs():
    rounds = after(Rounds(Bounds(), fixed_ms=20), 1000 * MB, 1.0, 25000, turn=0.002)
    assert rounds.throughput == 1000 * MB
    assert rounds.downtime_ms == pytest.approx(25000 * PAGE / (1000 * MB) * 1000 + 20 + 6)
    assert rounds.dirty_rate == 25000 * PAGE


def test_an_idle_guest_is_paused_after_its_first_round_once_the_destination_is_built():
    rounds = after(Rounds(Bounds()), 100 * MB, 0.1, 3)
    assert rounds.next(0.1, built=False) is Next.ROUND
    assert rounds.next(0.1, built=True) is Next.PAUSE


def test_a_round_that_shrinks_a_lot_is_worth_another_though_the_bound_is_met():
    rounds = after(Rounds(Bounds(downtime_ms=300)), 1000 * MB, 1.0, 40000)  # 160 ms
    assert rounds.next(1.0, built=True) is Next.ROUND
    after(rounds, 160 * MB, 0.16, 6000)  # 25 ms
    assert rounds.next(1.2, built=True) is Next.ROUND
    after(rounds, 25 * MB, 0.025, 5900)  # as good as it gets
    assert rounds.next(1.3, built=True) is Next.PAUSE


def test_a_guest_that_writes_too_fast_never_fits_until_the_time_is_up():
    for strategy, outcome in ((Strategy.CANCEL, Next.GIVE_UP), (Strategy.IGNORE, Next.PAUSE)):
        rounds = Rounds(Bounds(downtime_ms=100, timeout_s=10, strategy=strategy))
        for _ in range(5):
            after(rounds, 1000 * MB, 1.0, 244200)
            assert rounds.next(5.0, built=True) is Next.ROUND
        assert not rounds.converges and rounds.time_left_s is None
        assert rounds.next(10.0, built=True) is outcome


@pytest.mark.parametrize("strict", [True, False])
def test_turn_of_the_network_that_is_longer_than_a_bound_nobody_asked_for_does_not_keep_the_guest(strict):
    rounds = after(Rounds(Bounds(downtime_ms=300, strict=strict)), 100 * MB, 100.0, 1000, turn=0.2)  # 1 MB/s: 4 s
    assert rounds.overhead_ms == pytest.approx(640)
    assert rounds.next(100.0, built=True) is Next.ROUND
    after(rounds, 4 * MB, 4.0, 160, turn=0.2)  # 655 ms
    assert rounds.next(104.0, built=True) is Next.ROUND
    after(rounds, 4 * MB, 4.0, 150, turn=0.2)  # 614 ms
    assert rounds.next(112.0, built=True) is (Next.ROUND if strict else Next.PAUSE)


@pytest.mark.parametrize(("strict", "ends"), [(False, 250), (True, None)])
def test_guest_that_dirties_what_the_network_carries_is_paused_for_a_hundredth_of_the_time_unless_bounded(
    strict: bool, ends: int | None
) -> None:
    """0.5 MB/s of both for ever, 1.25 MB in each round; the first took 100 s."""
    rounds = after(Rounds(Bounds(downtime_ms=300, strict=strict)), 50 * MB, 100.0, 305, turn=0.01)
    clock = 100.0
    while rounds.next(clock, built=True) is Next.ROUND and clock < 3500:
        after(rounds, MB * 5 // 4, 2.5, 305, turn=0.01)
        clock += 2.5
    assert clock == ends if ends else clock >= 3500
    if ends:
        assert rounds.copy_ms == pytest.approx(2500, rel=0.01)


def test_default_bound_grows_no_further_than_five_seconds() -> None:
    """A guest that rewrites 6 s' worth all the time."""
    rounds = after(Rounds(Bounds(downtime_ms=300, strict=False)), 1000 * MB, 1.0, 1_500_000)
    for clock in (100.0, 1000.0, 3500.0):
        after(rounds, 6000 * MB, 6.0, 1_500_000)
        assert rounds.next(clock, built=True) is Next.ROUND
    after(rounds, 6000 * MB, 6.0, 1_200_000)  # 4.9 s
    assert rounds.next(3510.0, built=True) is Next.PAUSE


def test_default_bound_is_kept_as_long_as_rounds_get_shorter():
    """Though what no round makes shorter takes most of it: 190 of 300 ms."""
    rounds = Rounds(Bounds(downtime_ms=300, strict=False))
    after(rounds, 100 * MB, 100.0, 1000, turn=0.05)  # 1 MB/s
    after(rounds, 4 * MB, 4.0, 60, turn=0.05)
    assert rounds.overhead_ms == pytest.approx(190)
    assert rounds.next(104.0, built=True) is Next.ROUND
    after(rounds, MB, 1.0, 40, turn=0.05)  # 164 ms: less than 190, but the bound of 110 is within reach
    assert rounds.next(105.0, built=True) is Next.ROUND
    after(rounds, MB, 1.0, 38, turn=0.05)  # and now it is not
    assert rounds.next(106.0, built=True) is Next.PAUSE


def test_nothing_is_paused_before_the_destination_is_built():
    rounds = after(Rounds(Bounds(timeout_s=1, strategy=Strategy.IGNORE)), 100 * MB, 0.1, 0)
    assert rounds.next(5.0, built=False) is Next.ROUND


def test_a_slow_small_round_says_nothing_about_throughput():
    rounds = after(Rounds(Bounds()), 1000 * MB, 1.0, 1)
    after(rounds, PAGE, 1.0, 1)
    assert rounds.throughput == 1000 * MB


def test_a_fast_small_round_counts_for_what_is_as_small_until_the_next_large_one():
    """The last large round had a bad moment. Without this no small one would ever end the copy."""
    rounds = after(Rounds(Bounds()), 2 * MB, 10.0, 40)
    after(rounds, MB // 2, 0.5, 40)
    assert rounds.throughput == MB
    assert rounds.next(10.5, built=True) is Next.PAUSE
    rounds.found(1000, 1.0)
    assert rounds.throughput == MB / 5
    after(rounds, 4 * MB, 2.0, 40)
    assert rounds.throughput == 2 * MB


def test_round_after_a_flush_is_the_last_however_long_it_took():
    flushes = Flushes(5.0)
    assert not flushes.will_do(Next.PAUSE, 60.0)
    flushes.made(70.0)
    assert flushes.will_do(Next.PAUSE, 130.0)


def test_flush_is_repeated_when_it_is_old_by_the_time_that_the_bound_is_met_again():
    flushes = Flushes(5.0)
    flushes.made(0.0)
    assert not flushes.will_do(Next.ROUND, 3.0)
    assert flushes.will_do(Next.PAUSE, 4.0)
    assert not flushes.will_do(Next.PAUSE, 6.0)


def test_disks_and_ram_that_take_turns_come_to_an_end():
    """A guest that dirties during each flush what takes two rounds of 20 s."""
    flushes, clock = Flushes(5.0), 0.0
    fresh = []
    for _ in range(5):
        flushes.made(clock)
        assert not flushes.will_do(Next.ROUND, clock + 20)
        fresh.append(flushes.will_do(Next.PAUSE, clock + 40))
        clock += 50
    assert fresh == [False, False, False, False, True]  # at most 5, 10, 20, 40, 80 s old


@given(st.integers(10, 2000), st.integers(0, 900), st.integers(50, 1000))
def test_a_guest_slower_than_the_network_ends_within_the_bound(network_mb, dirty_mb, downtime_ms):
    """A simulation that knows the dirty rate: a geometric series, which always fits in the end."""
    dirty_mb = min(dirty_mb, network_mb * 0.8)
    rounds = Rounds(Bounds(downtime_ms=downtime_ms), fixed_ms=10)
    left, clock = 4096 * MB, 0.0
    for _ in range(200):
        seconds = max(left / (network_mb * MB), 0.001)
        clock += seconds
        dirty = int(dirty_mb * MB * seconds / PAGE)
        after(rounds, left, seconds, dirty, turn=0.0001)
        left = dirty * PAGE
        if rounds.next(clock, built=True) is Next.PAUSE:
            break
    else:
        pytest.fail(f"{rounds} does not come to an end")
    assert left / (network_mb * MB) * 1000 + 10 <= downtime_ms
