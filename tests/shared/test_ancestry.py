"""shared.ancestry: a worker in a pid namespace of its own knows its number and its parent's death."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.vmm import environment

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace takes CAP_SYS_ADMIN, which this run has not")

# A controller; a zygote that makes its sibling, as controller/zygote.py does; and that sibling, which looks for its
# parent only when it has ended.
LATE = """
import os, select, sys
from controller.zygote import _fork_for_parent
from shared.ancestry import Ancestry, parent_in_proc
from shared.sandbox import CLONE_NEWPID
controller = os.getpid()
told, tell = os.pipe()
if os.fork() == 0:
    in_proc, life = parent_in_proc(), os.pidfd_open(controller)
    pid = _fork_for_parent(CLONE_NEWPID)
    if pid:
        os._exit(0)
    ancestry = Ancestry(controller, in_proc)
    assert (os.getpid(), os.getppid()) == (1, 0)
    os.write(tell, b"%d" % ancestry.pid)
    if sys.argv[1] == "late":
        select.select([life], [], [])
    ancestry.die_with_parent()
    os._exit(0)
print(os.read(told, 20).decode(), flush=True)
if sys.argv[1] == "late":
    os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(2)))
"""


@pytest.mark.parametrize(("when", "code"), [("early", 0), ("late", 125)])
def test_a_parent_that_died_before_the_tie_is_noticed(when: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LATE, when], env=environment(), stdout=subprocess.PIPE, text=True
    ) as controller:
        assert controller.stdout is not None
        pid = int(controller.stdout.readline())
        assert controller.wait(30) == 0
    assert pid > 1
    if when == "late":
        ended = os.waitid(os.P_PID, pid, os.WEXITED)  # this test run is its reaper now
        assert ended is not None and ended.si_status == code


# A controller in a pid namespace whose /proc is still that of the namespace above.
BELOW = """
import os, sys
from controller import fleet as fleets
from controller.fleet import WorkerSpec
from shared.linux import libc
from shared.sandbox import CLONE_NEWPID
from tests.controller.processes import SECONDS, running
assert libc.unshare(CLONE_NEWPID) == 0
child = os.fork()
if child == 0:
    assert os.getpid() == 1
    fleets.STOP_SECONDS = SECONDS
    with running(sys.argv[1]) as (reactor, fleet):
        spec = WorkerSpec("toy", "_toy0", "tests.toy_worker", "worker")
        process = reactor.run_until(fleet.start(spec, {}, lambda _: None), SECONDS)
        reactor.run_until(fleet.stop(process), SECONDS)
    os._exit(process.exit_status)
_, status = os.waitpid(child, 0)
os._exit(os.waitstatus_to_exitcode(status))
"""


def test_a_proc_of_another_namespace_keeps_no_worker_from_starting(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BELOW, str(tmp_path)], env=environment(), timeout=60, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr
