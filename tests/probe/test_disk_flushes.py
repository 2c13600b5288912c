"""The flushes of a remote migration's disks: one takes longer than any other answer may, or its worker dies of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.probe.test_remote_migration import Receiver, hop, tcp
from tests.vmm import PROGRAM, Vmm

pytestmark = [pytest.mark.probe, pytest.mark.timeout(300)]

# What is asked without a time limit of its own must be answered soon; a real disk would have 10 s.
HURRIED = f"""
from controller.fleet import Process
call = Process.call
async def hurried(self, verb, timeout=..., **arguments):
    if timeout is ...:
        timeout = 0.2 if verb == "flush" else 10.0
    return await call(self, verb, timeout, **arguments)
Process.call = hurried
{PROGRAM}
"""
# A pause that has no time for the disks, however soon they would answer. While the guest runs a flush has no limit.
IMPATIENT = f"""
from controller.fleet import Process
from shared.errors import Timeout
call = Process.call
async def impatient(self, verb, timeout=10.0, **arguments):
    if verb == "flush" and timeout is not None:
        raise Timeout("no answer within 0 s: flush")
    return await call(self, verb, timeout, **arguments)
Process.call = impatient
{PROGRAM}
"""


def guest(folder: Path, program: str) -> Vmm:
    (folder / "disk.raw").write_bytes(os.urandom(16 << 20))
    options = ["--disk", f"path={folder}/disk.raw", "--allow-fault-injection"]
    return Vmm.guest(folder, "mode=blkload depth=4 report_ms=200", *options, name="one", program=program)


@pytest.mark.parametrize("fault", ["hang,duration_ms=1000", "kill"], ids=["slow", "dies"])
def test_flush_takes_as_long_as_the_disk_does_and_goes_on_with_a_successor(tmp_path: Path, fault: str) -> None:
    with guest(tmp_path, HURRIED) as source, Vmm(tmp_path, name="two") as destination, tcp(tmp_path) as urls:
        source.expect("blk ok ")
        source.wait_api()
        source.ask("fault-inject", f"process=_disk0,fault={fault},message=flush")
        hop(source, destination, urls)
        destination.expect("blk ok ")
        assert b"BAD" not in source.output + destination.output


def test_disk_that_is_not_flushed_during_the_pause_is_named(tmp_path: Path) -> None:
    with guest(tmp_path, IMPATIENT) as source, Vmm(tmp_path, name="two") as destination, tcp(tmp_path) as urls:
        source.expect("blk ok ")
        source.wait_api()
        receiver = Receiver(destination, urls[1])
        sent = source.remote("send-migration", urls[0])
        assert sent.returncode == 1 and "_disk0: what the guest has written could not be flushed" in sent.stderr
        assert receiver.end()[0] == 1
        assert source.ask("info")["state"] == "Running"
        source.more("blk ok ")
