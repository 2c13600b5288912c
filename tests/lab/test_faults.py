"""Every kind of process is struck while Debian works: deploy/demo/faults.py goes through it and checks."""

from __future__ import annotations

import json

import pytest

from deploy.demo.example_faults import PROCESSES
from tests.lab.lab import Lab

LIMIT = 1500  # seconds; a tenth of that on an idle machine


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("process", PROCESSES)
def test_debian_notices_nothing_when_processes_are_killed_and_stopped(lab: Lab, process: str) -> None:
    done = lab.run(f"exec python3 -m deploy.demo.faults {process}", limit=LIMIT).must_succeed()
    report = json.loads((done.out / "report.json").read_text())
    print(json.dumps(report, indent=1))
    assert report["ok"]
    assert [(each["fault"], each["recovered"]) for each in report["strikes"]] == [("kill", 20), ("stop", 5)]
    assert (report["lost"], report["guest_errors"], report["vmm_exit"]) == (0, 0, 0)
    assert report["fio_passes"] > 2
    assert report["net_bytes"] > 0
