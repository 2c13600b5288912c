"""bench.migrate_remote: what each round sent beside what a simulation says, for rounds that are known."""

from __future__ import annotations

import pytest

from bench import migrate_remote, report

COPIED = {
    "rounds": [{"bytes": 512_000_000, "ms": 1000.0}, {"bytes": 60_000_000, "ms": 117.0}],
    "final_pages": 2000,
}


def test_each_round_sends_what_was_written_during_the_one_before():
    assert migrate_remote.simulate(1000, 100, 50, 400, 4) == [1000, 400, 200, 100]


def test_guest_that_writes_faster_than_the_network_sends_its_working_set_each_time():
    assert migrate_remote.simulate(1000, 100, 150, 400, 4) == [1000, 400, 400, 400]


def test_the_simulation_takes_over_the_first_round_and_has_as_many():
    rounds = migrate_remote.rounds_of(COPIED, "1G", 50)
    assert rounds["sent_mb"] == [512, 60, 8.192]
    assert rounds["simulated_mb"] == pytest.approx([512, 52.429, 5.369], abs=0.001)


def test_guest_that_is_told_to_write_nothing_writes_a_little():
    assert "ram.rate=1 " in migrate_remote.words("1G", 0)
    assert migrate_remote.rounds_of(COPIED, "1G", 0) == migrate_remote.rounds_of(COPIED, "1G", 1)


def test_rounds_are_printed_beside_the_simulated_ones(capsys):
    rows = [report.Row("flotilla", "1G tcp 50"), report.Row("qemu-microvm", "1G tcp 50")]
    rows[0].details["rounds"] = [migrate_remote.rounds_of(COPIED, "1G", 50)]
    notes = migrate_remote.round_notes(rows)
    report.show(report.result("migrate-remote", "ms", rows, "downtime_ms", notes), as_json=False)
    said = "rounds of flotilla 1G tcp 50, MB: 512.0 60.0 8.2; simulated: 512.0 52.4 5.4"
    assert f"note: {said}" in capsys.readouterr().out.splitlines()


def test_of_many_rounds_the_first_and_the_last_are_printed():
    row = report.Row("flotilla", "1G tcp 500")
    row.details["rounds"] = [{"sent_mb": [float(each) for each in range(12)], "simulated_mb": [1.0]}]
    (note,) = migrate_remote.round_notes([row])
    assert note.endswith("MB: 0.0 1.0 2.0 3.0 4.0 5.0 6.0 … 4 more … 11.0; simulated: 1.0")
