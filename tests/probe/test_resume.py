"""Guests that are to go on, and workers that do not: after a pause, after a pause that fails, and at a destination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.netpeer import ping
from tests.other_worker import RELUCTANT, program
from tests.probe.net.rig import GUEST
from tests.probe.test_migration import hop
from tests.probe.test_worker_upgrade import PATIENCE, fleet, guest, upgraded
from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe

WORKERS = ("_disk0", "_net1", "console")
LIES = """
from shared import vhost_backend as backend
stop = backend._HANDLERS[11]
backend._HANDLERS[11] = lambda server, message: stop(server, message) and bytes((7, 0, 0, 0, 5, 0, 0, 0))
"""
# In the zygote, so in all of its workers: the first one of each device refuses its rings, however often it is asked.
REFUSES_ONCE = """
import mmap, os
from shared import vhost_backend as backend
from shared.errors import ProtocolError
start, before = backend._HANDLERS[12], mmap.mmap(-1, 4096)
me = []
def started(server, message):
    at = sum(type(server._backend).__module__.encode()) % 4096
    if not before[at]:
        before[at] = 1
        me.append(at)
    if me:
        raise ProtocolError("not yet")
    return start(server, message)
backend._HANDLERS[12] = started
"""
DESTINATION = f"""
import sys
from controller import spawn
exec_python = spawn.exec_python
def changed(code, *rest):
    return exec_python("exec(" + repr({REFUSES_ONCE!r}) + ", dict());" + code if "zygote" in code else code, *rest)
spawn.exec_python = changed
from controller.main import main
sys.exit(main())
"""


def replaced(vmm: Vmm, name: str, before: int) -> None:
    """Wait for the successor of a worker that refused, which had been restarted `before` times."""

    def again() -> Any:
        row = fleet(vmm).get(name, {"restarts": 0})
        return row["restarts"] > before and row["state"] in ("running", "degraded") and row

    row = poll(again, PATIENCE)
    assert row["last_cause"] == "refused", row


def test_guest_goes_on_after_a_pause_without_workers_that_do_not(tmp_path: Path) -> None:
    """A disk refuses its rings, card and console the control request; the next process of each serves."""
    with guest(tmp_path) as vmm:
        for name in WORKERS:
            change = RELUCTANT.format(rings=name == "_disk0")
            upgraded(vmm, name, "--exec", program(tmp_path, change, f"reluctant-{name}"))
        vmm.ask("pause")
        vmm.ask("resume")
        assert vmm.ask("info")["state"] == "Running"
        for name in WORKERS:
            replaced(vmm, name, 0)
            assert f"{name}: " in vmm.errors
        assert vmm.errors.count("the guest goes on and waits for its device") >= len(WORKERS)
        ping(GUEST)


def test_guest_goes_on_after_a_pause_that_a_worker_refuses(tmp_path: Path) -> None:
    """Its rings may have been stopped: its successor starts them."""
    with guest(tmp_path) as vmm:
        upgraded(vmm, "_disk0", "--exec", program(tmp_path, LIES))
        done = vmm.remote("pause")
        assert done.returncode == 1 and "asked for queue 0, told of 7" in done.stderr
        assert vmm.ask("info")["state"] == "Running"
        row = poll(lambda: (now := fleet(vmm)["_disk0"])["restarts"] == 1 and now["last_stall_ms"] and now)
        assert row["last_cause"] == "refused"


def test_guest_goes_on_at_a_destination_whose_workers_refuse_its_rings(tmp_path: Path) -> None:
    """There is no way back when they are asked; the next process of each serves."""
    mode = "mode=blkload,net,rng,console depth=8 net.pairs=2"
    with (
        Vmm(tmp_path, name="two", program=DESTINATION) as other,
        guest(tmp_path, "--cpus", "boot=2", mode=mode, net=",num_queues=4", name="one") as vmm,
    ):
        hop(vmm, other, tmp_path / "sock")
        for name in WORKERS:
            replaced(other, name, 0)
        other.more("blk ok ", PATIENCE)
        ping(GUEST)
        vmm.more, vmm.expect = other.more, other.expect  # type: ignore[method-assign]  # what the guest says, it says there
    assert b"BAD" not in other.output
