"""The live-migration document's nested example: deploy/demo/nested.py goes through its steps and checks each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.lab import Lab

COMMANDS = Path(__file__).with_name("scripts") / "nested.sh"
LIMIT = 2700  # seconds; a third of that on an idle machine


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
def test_guest_moves_between_two_vms_through_two_socats(lab: Lab) -> None:
    done = lab.run("exec python3 -m deploy.demo.nested", limit=LIMIT, nested=True).must_succeed()
    report = json.loads((done.out / "report.json").read_text())
    print(json.dumps(report, indent=1))
    assert report["ok"]
    assert report["ping"][0] == report["ping"][1] > 0
    (hop,) = report["hops"]
    assert (hop["send"], hop["receive"], hop["source_exit"]) == (0, 0, 0)
    assert hop["bytes_transferred"] > 1 << 20, "RAM travels, too"
    assert report["equal"] > 0
    assert report["not_equal"] == 0
    assert len(set(report["boot_id"])) == 1
    assert report["destination_exit"] == 0
    assert report["hosts"] == [0, 0]
    assert {"blk", "net", "vcpu"} <= {row["kind"] for row in report["processes"]}


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
def test_the_documents_nested_commands_in_a_script(lab: Lab) -> None:
    """Nothing but the commands, a shell, and what it can see."""
    done = lab.run(COMMANDS.read_text(), "quiet", limit=LIMIT, nested=True).must_succeed()
    print(done.stderr)
    ends = ["ping 0", "send 0", "source 0", "receive 0", "destination 0", "vm-1 0", "vm-2 0"]
    assert done.stdout.splitlines() == ends
