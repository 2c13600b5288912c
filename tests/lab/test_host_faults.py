"""A host that misbehaves under a Debian guest: clock, network interface, out-of-memory killer, a disk that is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.lab import Lab

SCRIPT = Path(__file__).with_name("scripts") / "host_faults.sh"
LIMIT = 900


@pytest.mark.timeout(2 * LIMIT)
def test_guest_goes_on_when_clock_steps_interface_is_down_memory_is_out_and_a_disk_is_pulled(lab: Lab) -> None:
    done = lab.run(SCRIPT.read_text(), limit=LIMIT)
    seen = f"{done.stdout}\n{done.stderr}\n{(done.out / 'stderr').read_text(errors='replace')}"
    assert done.stdout.splitlines() == [
        "clock: 0 restarts", "interface: 0 restarts", "out of memory: 1 restarts", "disk: told", "vmm: 0"
    ], seen  # fmt: skip
    assert '"worker-restarted"' in (done.out / "events").read_text()
    done.must_succeed()
