"""A card whose vhost-user back end somebody else runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.netns import ip
from tests.netpeer import Echo, ping
from tests.probe.net.rig import GUEST, HOST, guest
from tests.vmm import environment, poll

pytestmark = pytest.mark.probe


@pytest.fixture
def foreign(tmp_path):
    """Our own worker as a program, which is a stranger to the VMM; started again, if it was ended."""
    ip("tuntap", "add", "theirs", "mode", "tap")
    ip("address", "add", f"{HOST}/24", "dev", "theirs")
    ip("link", "set", "theirs", "up")
    path, running = tmp_path / "net.sock", []

    def start():
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "net_worker", "--socket-path", str(path), "--tap", "theirs"]
        running.append(subprocess.Popen(command, env=environment()))
        poll(path.exists)
        return running[-1]

    start.path = path
    yield start
    for process in running:
        process.kill()
        process.wait()
    path.unlink(missing_ok=True)


def test_foreign_back_end_and_its_successor(tmp_path, foreign):
    first = foreign()
    net = [f"vhost_user=on,socket={foreign.path},mac=12:34:56:78:90:ab"]
    with guest(tmp_path, "mode=net lost_irq_ticks=100", net=net) as vmm:
        ping(GUEST)
        assert vmm.expect(r"net open .* mac=(\w+)")[1] == b"1234567890ab"
        with Echo(GUEST) as echo:
            echo.until_answered(20)
            first.kill()
            first.wait()
            foreign()
            echo.until_answered(20)
        assert b"BAD" not in vmm.output


@pytest.mark.timeout(300)
def test_foreign_back_end_that_is_not_there(tmp_path):
    with guest(tmp_path, net=[f"vhost_user=on,socket={tmp_path}/none"]) as vmm:
        assert vmm.wait(60) == 1
        assert f"{tmp_path}/none" in vmm.errors
