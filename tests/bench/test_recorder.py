"""Serial output with its time of arrival, and what a hop's figures are made of."""

from __future__ import annotations

import os

import pytest

from bench.errors import BenchError
from bench.migrate_local import evaluate, guest_gap
from bench.recorder import Heard, Recorder
from guest.lines import Beat, Ready, Tick

SECONDS = 20.0


@pytest.fixture
def pipe():
    read, write = os.pipe()
    ends = {"read": read, "write": write}
    yield ends
    for fd in ends.values():
        os.close(fd)


def test_events_of_two_sources_come_in_order_of_arrival(pipe):
    read, write = os.pipe()
    try:
        with Recorder() as recorder:
            recorder.add(pipe["read"], "a")
            recorder.add(read, "b")
            os.write(pipe["write"], b"\x81probe: re")
            first = recorder.beat("a", 0.0, SECONDS)
            os.write(write, b"\x82")
            second = recorder.beat("b", 0.0, SECONDS)
            os.write(pipe["write"], b"ady tasks=1 cpus=1\n")
            third = recorder.until(lambda heard: isinstance(heard.event, Ready), SECONDS, "ready")
        assert first < second < third
        assert [heard.source for heard in recorder.events] == ["a", "b", "a"]
        assert recorder.events[0].at <= recorder.events[1].at <= recorder.events[2].at
    finally:
        os.close(read)
        os.close(write)


def test_guest_that_complains_ends_the_wait_with_its_words(pipe):
    with Recorder() as recorder:
        recorder.add(pipe["read"], "a")
        os.write(pipe["write"], b"blk BAD stale disk=0\n")
        with pytest.raises(BenchError, match="blk BAD stale disk=0"):
            recorder.beat("a", 0.0, SECONDS)


def test_guest_that_ends_ends_the_wait(pipe):
    with Recorder() as recorder:
        recorder.add(pipe["read"], "a")
        os.close(pipe.pop("write"))
        with pytest.raises(BenchError, match="no heartbeat of a before its end"):
            recorder.beat("a", 0.0, SECONDS)


def test_downtime_is_from_the_sources_last_beat_to_the_destinations_first():
    beats = [Heard(at, "source", Beat(0)) for at in (9.0, 9.25, 9.75, 10.5)]
    beats += [Heard(at, "destination", Beat(0)) for at in (10.75, 11.0)]
    figures = evaluate(beats, 10.0)
    assert figures == {"downtime_ms": 250.0, "guest_gap_ms": None, "steady_gap_ms": 500.0}


def test_a_side_without_a_beat_is_no_figure():
    with pytest.raises(BenchError, match="no heartbeat on one of the two sides"):
        evaluate([Heard(1.0, "source", Beat(0))], 1.0)


def test_guests_gap_comes_from_the_clock_that_ran_on():
    def tick(gap_us: int, gap_tsc: int) -> Heard:
        return Heard(0.0, "source", Tick(0, "", gap_us=gap_us, gap_tsc=gap_tsc))

    before = [tick(1000, 2_000_000), tick(500, 1_000_000)]
    assert guest_gap([*before, tick(100, 40_000_000)]) == 20.0  # kvmclock stood still
    assert guest_gap([*before, tick(30_000, 1)]) == 30.0  # the TSC did
    assert guest_gap([]) is None
