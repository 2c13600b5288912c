"""deploy/fuzz.sh: its arguments, and what it makes of a run with a finding. The targets' tests are in tests/fuzz."""

from __future__ import annotations

import threading

import pytest

from deploy import fuzz


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "how many minutes"),
        (["soon"], "how many minutes"),
        (["0"], "0 minutes?"),
        (["-1"], "-1 minutes?"),
        (["nan"], "nan minutes?"),
        (["1", "nothing"], "no target is called nothing; there are vring, "),
        (["--jobs"], "--jobs : how many targets at a time? 1 to 64"),
        (["--jobs", "0", "1"], "--jobs 0: how many"),
        (["--jobs", "many", "1"], "--jobs many: how many"),
        (["--jobs", "2"], "how many minutes"),
    ],
)
def test_bad_arguments_are_named_and_nothing_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "run_one", lambda name, minutes: pytest.fail(f"{name} ran"))
    assert fuzz.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_list_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"vring", "blk", "net", "pages", "vcpu", "control", "pci", "guest"} <= set(names)
    assert len(set(names)) == len(names)


def test_a_finding_fails_the_whole_and_the_other_targets_still_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(fuzz, "run_one", lambda name, minutes: ran.append(name) or name != "cli")
    assert fuzz.main(["1", "options", "cli", "config"]) == 1
    assert ran == ["options", "cli", "config"] and "findings in cli" in capsys.readouterr().out


def test_so_many_targets_run_at_a_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(fuzz, "run_one", lambda name, minutes: together.wait() >= 0)
    assert fuzz.main(["--jobs", "2", "1", "options", "cli"]) == 0
    assert "fuzz: 2 targets, findings in none" in capsys.readouterr().out


def test_a_python_target_runs_for_its_time() -> None:
    assert fuzz.run_one("options", 0.01)
