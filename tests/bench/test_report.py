"""Figures, ratios and reasons: what a report says for samples that are known."""

from __future__ import annotations

import json

import pytest

from bench import faults, report
from bench.__main__ import lab_memory, parse
from bench.recorder import Heard
from guest.lines import Tick


def rows():
    own, peer, gone = report.Row("flotilla", "512M"), report.Row("qemu", "512M"), report.Row("other", "512M")
    for value in (30.0, 10.0, 20.0):
        own.add(ms=value, extra=None)
        peer.add(ms=value * 2)
    gone.missing = "no binary given"
    return [own, peer, gone]


def test_spread_ratio_and_reason_are_in_the_json(capsys):
    report.show(report.result("boot", "ms", rows(), "ms", ["a note"]), as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"][0]["figures"] == {"ms": {"n": 3, "min": 10.0, "median": 20.0, "p99": 30.0, "max": 30.0}}
    assert answer["ratios"] == {"qemu 512M": 0.5}
    assert [row["missing"] for row in answer["rows"]] == [None, None, "no binary given"]
    assert answer["host"]["kernel"] and answer["notes"] == ["a note"]


def test_table_names_a_missing_peer_with_its_reason(capsys):
    report.show(report.result("boot", "ms", rows(), "ms"), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["flotilla", "512M", "ms", "3", "10.0", "20.0", "30.0", "30.0"] for line in lines)
    assert any(line.startswith("other") and "missing: no binary given" in line for line in lines)
    assert "flotilla / qemu 512M: 0.50" in lines


WRONG = ["boot --runs 0", "migrate-local --sizes 1T", "boot --runs x", "net --lab --debian", ""]


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words.split())
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["--debian", "--lab"])
def test_cases_of_the_probe_guest_are_refused_for_debian(where, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["net", where, "--cases", "rtt 98 x1"])
    assert end.value.code == 2 and "--cases are the probe guest's" in capsys.readouterr().err


def test_lab_machine_holds_the_largest_guest():
    assert [lab_memory(sizes) for sizes in (["256M", "1G"], ["256M", "4G"], [])] == ["4096M", "6144M", "4096M"]


def test_stall_of_a_vcpu_is_that_of_the_clock_which_saw_it():
    def tick(at: float, gap_us: int, gap_tsc: int) -> Heard:
        return Heard(at, "guest", Tick(0, "tick", 1, gap_us, 0, gap_tsc))

    class Recorded:
        events = [tick(1.0, 40_000, 84_000_000), tick(2.1, 30, 42_000_000), tick(2.6, 1, 2_000), tick(3.6, 1, 2_000)]

        def until(self, wanted, _seconds, _what):
            return next(n for n, heard in enumerate(self.events) if wanted(heard))

    before, stall = faults.reported(Recorded(), 1.0, Tick, 2.0, 2.5)
    assert (before, stall) == (40.0, 20.0)
