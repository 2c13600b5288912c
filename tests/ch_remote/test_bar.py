"""ch_remote.bar: what the line says, and that only a terminal sees it."""

from __future__ import annotations

import io

import pytest

from ch_remote.bar import Bar, line

COPYING = {
    "direction": "send", "phase": "copying", "round": 3, "ram_bytes": 1 << 30, "remaining_bytes": 1 << 28,
    "throughput_bytes_per_s": 1.5 * (1 << 30), "dirty_bytes_per_s": 50 << 20, "estimated_downtime_ms": 61.4,
    "time_left_s": 2.2,
}  # fmt: skip


def test_a_round_shows_share_rates_and_estimates():
    assert line(COPYING, 200) == (
        "[###############.....]  75%  round 3  1.5 GiB/s  dirty 50 MiB/s  pause ~61 ms  2 s left"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"phase": "building"}, "[###############.....]  75%  3 MiB of RAM moved"),
        ({"pages": 1 << 20}, "[####################] 100%  3 MiB of RAM moved"),  # a page may come again
        ({"pages": None}, "[##########..........]  50%  3 MiB of RAM moved"),
        ({"phase": "loading"}, "loading  3 MiB of RAM moved"),
        ({"ram_bytes": 0}, "built"),  # a local migration moves none
    ],
)
def test_what_has_arrived_is_a_share_of_ram(changes, text):
    received = {
        "direction": "receive", "phase": "built", "ram_bytes": 4 << 20, "pages": 256, "zero_pages": 512,
        "page_bytes": 3 << 20,
    }  # fmt: skip
    assert line({**received, **changes}) == text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        ({"state": "none"}, "none"),
        ({"phase": "listening", "direction": "receive"}, "listening"),
        ({"phase": "built", "ram_bytes": 1, "page_bytes": 3 << 20}, "built  3 MiB of RAM moved"),
        ({"phase": "copying", "direction": "send", "ram_bytes": "?", "round": None}, "copying"),
    ],
)
def test_what_is_not_known_is_left_out(progress, text):
    assert line(progress) == text


def test_a_line_fits_the_terminal():
    assert len(line(COPYING, 30)) == 29


def test_only_a_terminal_sees_it():
    stream = io.StringIO()
    bar = Bar("/nowhere", stream)
    assert not bar.visible
    bar.tick()  # nobody is there, which is nobody's error here
    bar.clear()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("answer_seconds", "asked"), [(0.005, 40), (0.1, 4), (1.0, 1)])
def test_vmm_that_takes_long_to_answer_is_asked_less_often(monkeypatch, answer_seconds, asked):
    """Ten seconds of ticks, a quarter of a second apart, beside what the answers themselves take."""
    now, questions = 1000.0, []
    monkeypatch.setattr("ch_remote.bar.time.monotonic", lambda: now)
    bar = Bar("/nowhere", io.StringIO())

    def ask():
        nonlocal now
        questions.append(now)
        now += answer_seconds

    monkeypatch.setattr(bar, "_ask", ask)
    for _ in range(40):
        bar.tick()
        now += 0.25
    assert len(questions) in (asked, asked + 1)


def test_vmm_that_was_slow_once_is_asked_again_after_a_while(monkeypatch):
    now, questions = 1000.0, []
    monkeypatch.setattr("ch_remote.bar.time.monotonic", lambda: now)
    bar = Bar("/nowhere", io.StringIO())

    def ask():
        nonlocal now
        now += 0.001 if questions else 30.0  # stopped for half a minute
        questions.append(now)

    monkeypatch.setattr(bar, "_ask", ask)
    while len(questions) < 2:
        bar.tick()
        now += 0.25
    assert questions[1] - questions[0] < 11


def test_line_that_has_not_changed_is_not_drawn_again():
    stream = io.StringIO()
    bar = Bar("/nowhere", stream)
    bar.draw(COPYING)
    first = stream.getvalue()
    bar.draw(COPYING)
    assert stream.getvalue() == first
    bar.draw({**COPYING, "round": 4})
    assert "round 4" in stream.getvalue()[len(first) :]
    bar.clear()
    bar.draw(COPYING)
    assert stream.getvalue().endswith(line(COPYING))
