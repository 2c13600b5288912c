"""The live-migration document's local example with stock Debian, as it stands and hop after hop.

deploy/demo/inside.py goes through the steps and checks each; what it reports is checked here once more.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.lab.lab import Lab

DOCUMENT = Path(__file__).with_name("scripts") / "document.sh"
NAMESPACES = Path(__file__).with_name("scripts") / "namespaces.sh"
NETEM = Path(__file__).with_name("scripts") / "netem.py"
TRIES = int(os.environ.get("FLOTILLA_NETEM", "30"))
LIMIT = 600
HOPS = 5
MOST_STATE = 256 << 10  # bytes: that of devices and vCPUs, without RAM
# 20 hops in all: two vCPUs, a disk that is written and verified all the time, RAM of different kinds.
ROWS = {
    "1G": "1G,shared=on",
    "4G": "4G,shared=on",
    "without_shared": "1G",
    "512M": "512M,shared=on",
}


def perform(lab: Lab, *options: str, memory: str = "4G") -> dict[str, Any]:
    """The report of one run of the example. Fails the test, with consoles and stderr, unless all of it went well."""
    script = f"exec python3 -m deploy.demo.inside {shlex.join(options)}"
    done = lab.run(script, limit=LIMIT, memory=memory).must_succeed()
    report: dict[str, Any] = json.loads((done.out / "report.json").read_text())
    print(json.dumps(report, indent=1))
    return report


def check(report: dict[str, Any], hops: int, *, ram_stays: bool = True) -> None:
    assert report["ok"]
    assert [hop["hop"] for hop in report["hops"]] == list(range(1, hops + 1))
    for hop in report["hops"]:
        assert (hop["send"], hop["receive"], hop["source_exit"]) == (0, 0, 0), hop
        assert hop["ram_stayed"] is ram_stays, hop
        assert hop["bytes_transferred"] > 0
        assert (hop["bytes_transferred"] < MOST_STATE) is ram_stays, hop
        assert hop["downtime_ms"] > 0, hop
    assert report["equal"] > 0
    assert report["not_equal"] == 0
    assert len(set(report["boot_id"])) == 1
    before, after = report["uptime_s"]
    assert after > before
    assert report["destination_exit"] == 0


def kinds(report: dict[str, Any]) -> list[str]:
    return sorted(row["kind"] for row in report["processes"])


@pytest.mark.timeout(2 * LIMIT)
def test_the_documents_four_commands_in_a_script(lab: Lab) -> None:
    """Nothing but the commands, a shell, and what it can see."""
    done = lab.run(DOCUMENT.read_text(), limit=LIMIT).must_succeed()
    assert done.stdout.splitlines() == ["send 0", "receive 0", "source 0", "state Running", "destination 0"]
    source, destination = ((done.out / name).read_text(errors="replace") for name in ("source", "destination"))
    assert "not equal" not in source + destination
    first, second = (re.findall(r"boot=([0-9a-f-]{36})", said) for said in (source, destination))
    assert len(first) == 1 and second
    assert set(first) == set(second)


@pytest.mark.timeout(2 * LIMIT)
def test_document_example(lab: Lab) -> None:
    """Its four commands as they stand: one vCPU, 1G, one disk."""
    report = perform(lab, "--disks", "1")
    check(report, 1)
    assert kinds(report).count("blk") == 1
    assert {"vcpu", "console"} <= set(kinds(report))


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("memory", ROWS.values(), ids=ROWS)
def test_five_hops_under_verified_disk_load(lab: Lab, memory: str) -> None:
    options = ["--hops", str(HOPS), "--equal", "2", "--cpus", "2", "--disks", "3", "--memory", memory]
    options += ["--cmdline", "root=/dev/vda1 console=ttyS0 quiet"]
    report = perform(lab, *options, memory="7G" if memory.startswith("4G") else "4G")
    check(report, HOPS)
    assert report["verified"] >= HOPS
    assert kinds(report).count("blk") == 3
    assert kinds(report).count("vcpu") == 2
    assert len({row["pid"] for row in report["processes"] if row["kind"] == "blk"}) == 3


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_five_remote_hops_under_verified_disk_load(lab: Lab, way: str) -> None:
    """RAM is copied while the guest writes, as if to another host."""
    options = ["--hops", str(HOPS), "--equal", "2", "--cpus", "2", "--disks", "3", "--memory", "512M", "--way", way]
    options += ["--cmdline", "root=/dev/vda1 console=ttyS0 quiet"]
    report = perform(lab, *options)
    check(report, HOPS, ram_stays=False)
    assert report["verified"] >= HOPS


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
def test_iperf3_and_ping_go_on_while_debian_moves_between_hosts(lab: Lab) -> None:
    done = lab.run(NAMESPACES.read_text(), limit=LIMIT).must_succeed()
    print(done.stderr)
    what = ("send", "receive", "source", "iperf3", "ping", "destination")
    assert done.stdout.splitlines() == [f"{each} 0" for each in what]
    assert "error" not in (done.out / "iperf3").read_text()
    assert re.search(r"longest silence of pings: \d+ ms", done.stderr)


@pytest.mark.soak
@pytest.mark.timeout(4 * LIMIT + 100 * TRIES)
def test_debian_moves_between_hosts_over_a_cable_that_netem_makes_bad(lab: Lab) -> None:
    """Each of the tries arrives or leaves the guest running at the source; the seed is printed."""
    seed = int(os.environ.get("FLOTILLA_SEED", "1"))
    script = f"exec python3 /lab/netem.py {seed} {TRIES}"
    done = lab.run(script, limit=LIMIT + 100 * TRIES, puts={"netem.py": NETEM}).must_succeed()
    print(done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == TRIES
    assert {(row["send"] == 0, row["receive"] == 0) for row in rows} <= {(True, True), (False, False)}
    assert any(row["send"] == 0 for row in rows)
    report = json.loads((done.out / "report.json").read_text())
    assert report["ok"] and report["not_equal"] == 0 and len(set(report["boot_id"])) == 1
