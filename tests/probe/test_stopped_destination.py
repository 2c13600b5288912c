"""A destination that is stopped (SIGSTOP) while it holds the claim on the guest: both VMMs are the real ones."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.vmm import PROGRAM, Vmm, poll

pytestmark = pytest.mark.probe

# The moment is between two instructions of the destination, so the destination stops itself.
STOPS_ITSELF = f"""
import os, signal
from controller.migration.ownership import Owner, Ownership
move = Ownership.move
def stop_after_the_claim(self, before, after):
    moved = move(self, before, after)
    if moved and after is Owner.CLAIMED:
        os.kill(os.getpid(), signal.SIGSTOP)
    return moved
Ownership.move = stop_after_the_claim
{PROGRAM}
"""


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL], ids=["goes-on", "is-killed"])
def test_source_names_the_stopped_destination_until_it(tmp_path: Path, end: signal.Signals) -> None:
    path = tmp_path / "sock"
    with (
        Vmm.guest(tmp_path, "mode=rng", name="one") as source,
        Vmm(tmp_path, name="two", program=STOPS_ITSELF) as destination,
    ):
        source.expect("rng ok 1")
        source.wait_api()
        destination.wait_api()
        receive = destination.start_remote("receive-migration", f"unix:{path}")
        poll(path.exists)
        send = source.start_remote("send-migration", "--local", f"unix:{path}", stderr=subprocess.PIPE)
        pid = destination.process.pid
        poll(lambda: is_stopped(pid))
        words = f"the destination (pid {pid}) has claimed the guest and does not go on"
        cancel = source.remote("cancel-migration")
        assert cancel.returncode == 1 and words in cancel.stderr and f"kill -CONT {pid}" in cancel.stderr
        send.send_signal(signal.SIGINT)
        assert send.stderr is not None
        said = b""
        while words.encode() not in said:
            line = send.stderr.readline()
            assert line, said
            said += line
        progress = source.ask("migration-progress")
        assert (progress["state"], progress["phase"]) == ("ongoing", "settling")
        assert words in progress["waits_for"] and f"kill -KILL {pid}" in progress["waits_for"]
        assert words in source.errors
        os.kill(pid, end)
        if end is signal.SIGCONT:
            assert receive.wait(30) == 0
            assert source.wait() == 0
            destination.expect("rng ok ")
        else:
            source.more("rng ok ")
            assert source.ask("info")["state"] == "Running"
            receive.wait(30)
        assert send.wait(30) == 130
        send.stderr.close()
