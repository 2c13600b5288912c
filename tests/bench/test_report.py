"""Figures, ratios and reasons: what a report says for samples that are known."""

from __future__ import annotations

import json

import pytest

from bench import report
from bench.__main__ import lab_memory, parse


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
    assert answer["rows"][0]["figures"] == {"ms": {"n": 3, "min": 10.0, "median": 20.0, "max": 30.0}}
    assert answer["ratios"] == {"qemu 512M": 0.5}
    assert [row["missing"] for row in answer["rows"]] == [None, None, "no binary given"]
    assert answer["host"]["kernel"] and answer["notes"] == ["a note"]


def test_table_names_a_missing_peer_with_its_reason(capsys):
    report.show(report.result("boot", "ms", rows(), "ms"), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["flotilla", "512M", "ms", "3", "10.0", "20.0", "30.0"] for line in lines)
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
