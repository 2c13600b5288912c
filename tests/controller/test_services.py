"""controller.services: the real API process and the real janitor around a controller that is this test."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys

import pytest

from controller.api_socket import ApiSocket
from controller.leavings import Leavings
from controller.service_process import LAST_DELAY
from controller.services import Services
from shared.errors import StateError, Timeout
from shared.reactor import Event, readable, sleep
from tests.controller.processes import SECONDS, running
from tests.vmm import REMOTE, environment


class Rig:
    def __init__(self, reactor, fleet, folder):
        self.reactor, self.fleet = reactor, fleet
        self.path = folder / "api"
        self.release = Event()
        self.entered = Event()
        runtime = folder / "run"
        runtime.mkdir()
        verbs = {"vmm.ping": self._ping, "vm.info": self._wait, "vm.pause": self._refuse, "vm.add-net": self._keep}
        self.leavings = Leavings(str(runtime))
        api = ApiSocket.listen(str(self.path))
        self.services = Services(reactor, fleet, str(runtime), self.leavings, api, verbs)
        self.runtime = runtime

    async def _ping(self, _):
        return {"version": "v0", "pid": os.getpid()}

    async def _wait(self, _):
        self.entered.set()
        await self.release.wait()
        return {"state": "Running"}

    async def _refuse(self, _):
        raise StateError("VM can't be paused", "boot it first") from ValueError("because")

    async def _keep(self, body):
        return {"fds": body["fds"]}

    def run(self, awaitable):
        return self.reactor.run_until(awaitable, SECONDS)

    async def remote(self, *words):
        """ch-remote in a process of its own: (exit code, stdout, stderr)."""
        command = [sys.executable, "-c", REMOTE, "--api-socket", str(self.path), *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        pidfd = os.pidfd_open(process.pid)
        try:
            await readable(self.reactor, pidfd, SECONDS)
        finally:
            os.close(pidfd)
            process.kill()
            out, err = process.communicate()
        return process.returncode, out, err

    def process(self, kind):
        return next((process for process in self.fleet.processes if process.kind == kind), None)

    async def successor(self, kind, pid=0):
        """Until a process of that kind with another pid is there: it may serve before its pid is known."""
        while (now := self.process(kind)) is None or now.pid == pid:
            await sleep(self.reactor, 0.01)
        return now


@pytest.fixture
def rig(tmp_path):
    with running(str(tmp_path)) as (reactor, fleet):
        made = Rig(reactor, fleet, tmp_path)
        made.run(made.services.start())
        yield made
        made.release.set()
        made.run(made.services.stop())


def test_requests_run_side_by_side(rig):
    slow = rig.reactor.spawn(rig.remote("info"))
    rig.run(rig.entered.wait())
    code, out, _ = rig.run(rig.remote("ping"))
    assert code == 0 and json.loads(out) == {"version": "v0", "pid": os.getpid()}
    assert not slow.done()
    rig.release.set()
    code, out, _ = rig.run(slow)
    assert code == 0 and json.loads(out) == {"state": "Running"}


def test_an_error_reaches_the_client_with_its_causes(rig):
    code, _, err = rig.run(rig.remote("pause"))
    assert code == 1
    assert "Server responded with InternalServerError" in err
    assert "VM can't be paused (boot it first)" in err and "because" in err


def test_killed_api_process_is_replaced_and_no_client_is_refused(rig):
    rig.run(rig.remote("ping"))
    pid = rig.run(rig.successor("api")).pid
    os.kill(pid, signal.SIGKILL)
    code, _, err = rig.run(rig.remote("ping"))
    assert code == 0, err
    assert rig.run(rig.successor("api", pid)).restarts == 1


def test_api_process_whose_endpoint_cannot_be_made_is_tried_again_until_it_can(rig, monkeypatch, capfd):
    """zmq's bind fails, with an error of zmq's."""
    monkeypatch.setattr("controller.service_process.LAST_DELAY", 0.05)
    rig.run(rig.remote("ping"))
    away = rig.runtime.rename(rig.runtime.with_name("away"))
    said = ""

    async def told():
        nonlocal said
        while said.count("No such file or directory; trying again") < 2:
            await sleep(rig.reactor, 0.01)
            said += capfd.readouterr().err

    os.kill(rig.run(rig.successor("api")).pid, signal.SIGKILL)
    rig.run(told())
    away.rename(rig.runtime)
    code, _, err = rig.run(rig.remote("ping"))
    assert code == 0, err


@pytest.mark.parametrize("when", ["dies with the request", "died and has a successor"])
def test_descriptors_of_an_api_process_that_ended_before_they_were_fetched_are_an_error(rig, when):
    rig.run(rig.remote("ping"))
    api = rig.run(rig.successor("api"))
    before = set(os.listdir("/proc/self/fd"))
    # The controller has the request, and no turn of its reactor has looked at it yet.
    answer = rig.services._answer({"method": "PUT", "path": "vm.add-net", "body": b"{}", "fds": [0, 1]})
    os.kill(api.pid, signal.SIGKILL)
    if when == "died and has a successor":
        rig.run(rig.successor("api", api.pid))
        rig.run(rig.remote("ping"))
    else:
        rig.services._api._delay = LAST_DELAY  # no successor opens anything meanwhile
        assert select.select([api.pidfd], [], [], SECONDS)[0]
    told = rig.run(answer)
    assert told["status"] == 500
    assert b"ended" in told["body"] or b"No such process" in told["body"], told
    if when == "dies with the request":
        assert set(os.listdir("/proc/self/fd")) <= before


def test_descriptors_are_fetched_from_an_api_process_whose_pid_is_not_known_yet(rig, monkeypatch):
    """It serves before the zygote's answer has been read."""
    rig.run(rig.remote("ping"))
    pid, read, fork, forked = rig.run(rig.successor("api")).pid, Event(), rig.fleet.zygote.fork, []

    async def late(*request):
        forked.append(await fork(*request))
        await read.wait()
        return forked[0]

    api, before = rig.services._api, rig.services._api.channel

    async def dialled():
        while api.channel in (None, before) or not api.channel._peers:
            await sleep(rig.reactor, 0.01)

    monkeypatch.setattr(rig.fleet.zygote, "fork", late)
    os.kill(pid, signal.SIGKILL)
    rig.run(dialled())
    request = {"method": "PUT", "path": "vm.add-net", "body": b"{}", "fds": [0, 1]}
    answer = rig.reactor.spawn(rig.services._answer(request))
    rig.run(sleep(rig.reactor, 0))
    assert rig.process("api") is None
    read.set()
    told = rig.run(answer)
    assert told["status"] == 200, told
    fds = json.loads(told["body"])["fds"]
    theirs = [os.stat(f"/proc/{forked[0]}/fd/{number}") for number in (0, 1)]
    assert all(os.path.samestat(os.fstat(fd), there) for fd, there in zip(fds, theirs, strict=True))
    for fd in fds:
        os.close(fd)


def test_killed_janitor_is_replaced_and_knows_the_paths(rig, tmp_path):
    extra = ApiSocket.listen(str(tmp_path / "extra"))
    rig.leavings.path(str(tmp_path / "extra"), True)
    pid = rig.process("janitor").pid
    os.kill(pid, signal.SIGKILL)
    successor = rig.run(rig.successor("janitor", pid))
    rig.leavings.path(str(tmp_path / "extra.lock"), True)
    rig.run(rig.services.stop())
    rig.run(successor.ended.wait())
    assert successor.exit_status == 0
    assert not (tmp_path / "extra").exists() and not (tmp_path / "extra.lock").exists()
    extra.close()


def test_what_changes_while_the_janitor_is_being_forked_is_known_to_it(tmp_path):
    gone, late = ApiSocket.listen(str(tmp_path / "gone")), ApiSocket.listen(str(tmp_path / "late"))
    with running(str(tmp_path)) as (reactor, fleet):
        rig = Rig(reactor, fleet, tmp_path)
        rig.leavings.path(str(tmp_path / "gone"), True)
        start = reactor.spawn(rig.services.start())
        rig.run(sleep(reactor, 0))
        assert fleet.zygote.running and rig.process("janitor") is None
        rig.leavings.path(str(tmp_path / "gone"), False)
        rig.leavings.path(str(tmp_path / "late"), True)
        rig.run(start)
        janitor = rig.process("janitor")
        rig.run(rig.services.stop())
        rig.run(janitor.ended.wait())
    assert (tmp_path / "gone").exists() and not (tmp_path / "late").exists()
    gone.close()
    late.close()


def test_stop_answers_what_is_under_way_and_leaves_no_socket(rig, monkeypatch):
    monkeypatch.setattr("controller.services.GOODBYE_SECONDS", SECONDS)
    slow = rig.reactor.spawn(rig.remote("info"))
    rig.run(rig.entered.wait())
    rig.reactor.call_soon(rig.release.set)
    rig.run(rig.services.stop())
    code, _, err = rig.run(slow)
    assert code == 0, err
    assert not rig.path.exists()
    assert rig.process("api") is None and rig.process("janitor") is None


def test_stop_ends_all_when_the_api_process_ends_as_its_time_is_over(rig, monkeypatch):
    async def late(reactor, _, awaitable, what):
        await awaitable
        raise Timeout(what)

    rig.run(rig.remote("ping"))
    with monkeypatch.context() as patch:
        patch.setattr("controller.services.within", late)
        rig.run(rig.services.stop())
    assert rig.process("api") is None and rig.process("janitor") is None


def test_the_api_endpoint_leaves_no_name_behind(rig):
    rig.run(rig.remote("ping"))
    assert os.listdir(rig.runtime) == []
