"""controller.janitor: the real process, and what is left when the controller that it watches is killed."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import termios
import tty

import msgpack
import pytest

from controller.fleet import WorkerSpec
from tests.controller.processes import SECONDS, running


class Rig:
    """A janitor for `victim`, a process that stands for the controller."""

    def __init__(self, reactor, fleet, paths=(), terminal=None, settings=None):
        self.reactor, self.fleet = reactor, fleet
        self.victim = subprocess.Popen(["sleep", "60"])
        self.updates, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.pidfd_open(self.victim.pid)
        fds = {"controller": pidfd, "updates": theirs.fileno()}
        if terminal is not None:
            fds["tty"] = terminal
        known = {"paths": [str(path) for path in paths]} | ({} if settings is None else {"termios": settings})
        spec = WorkerSpec("janitor", "janitor", "controller.janitor", "janitor", known, orphan=True, control=False)
        self.process = reactor.run_until(fleet.start(spec, fds, lambda _: None), SECONDS)
        theirs.close()
        os.close(pidfd)

    def tell(self, **update):
        self.updates.send(msgpack.packb(update))

    def kill_victim(self):
        self.victim.kill()
        self.victim.wait()

    def ended(self):
        self.reactor.run_until(self.process.ended.wait(), SECONDS)
        return self.process.exit_status

    def close(self):
        self.kill_victim()
        self.ended()
        self.updates.close()


@pytest.fixture
def start(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    rigs = []
    with running(str(folder)) as (reactor, fleet):

        def make(*paths, **terminal):
            rigs.append(Rig(reactor, fleet, paths, **terminal))
            return rigs[-1]

        yield make
        for rig in rigs:
            rig.close()


def socket_file(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
    return path


def test_killed_controller_leaves_neither_socket_nor_lock_nor_directory(start, tmp_path):
    base = tmp_path / "run"
    runtime = base / "vm.1"
    runtime.mkdir(parents=True)
    (runtime / "endpoint").touch()
    api = socket_file(tmp_path / "api")
    lock = tmp_path / "api.lock"
    lock.touch()
    rig = start(runtime, api, lock)
    rig.kill_victim()
    assert rig.ended() == 0
    assert not base.exists() and not api.exists() and not lock.exists()


def test_the_base_stays_while_another_vm_lives_there(start, tmp_path):
    base = tmp_path / "run"
    (base / "vm.1").mkdir(parents=True)
    (base / "vm.2").mkdir()
    rig = start(base / "vm.1")
    rig.kill_victim()
    rig.ended()
    assert os.listdir(base) == ["vm.2"]


def test_a_path_that_became_something_else_is_left_alone(start, tmp_path):
    path = tmp_path / "api"
    path.write_text("precious")
    rig = start(path)
    rig.kill_victim()
    assert rig.ended() == 0
    assert path.read_text() == "precious"


def test_what_was_said_last_before_the_kill_counts(start, tmp_path):
    early, late = socket_file(tmp_path / "early"), socket_file(tmp_path / "late")
    rig = start(early)
    os.kill(rig.process.pid, 19)  # SIGSTOP: the words and the death arrive together
    rig.tell(remove=str(early))
    rig.tell(add=str(late))
    rig.kill_victim()
    os.kill(rig.process.pid, 18)
    rig.ended()
    assert early.exists() and not late.exists()
    early.unlink()


def test_done_ends_it_while_the_controller_lives(start):
    rig = start()
    rig.tell(done=True)
    assert rig.ended() == 0
    assert rig.victim.poll() is None


def test_a_closed_line_alone_is_no_reason_to_tidy_up(start, tmp_path):
    path = socket_file(tmp_path / "api")
    rig = start(path)
    rig.updates.shutdown(socket.SHUT_RDWR)
    assert path.exists() and rig.process.exit_status is None
    rig.kill_victim()
    assert rig.ended() == 0
    assert not path.exists()


@pytest.mark.parametrize("told", ["at its start", "later"])
@pytest.mark.parametrize("forgotten", [False, True], ids=["raw", "restored by the controller"])
def test_a_raw_terminal_gets_its_settings_back(start, forgotten, told):
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    rig = start(terminal=terminal, settings=before if told == "at its start" else None)
    tty.setraw(terminal)
    raw = termios.tcgetattr(terminal)
    assert raw != before
    if told == "later":
        rig.tell(termios=before)
    if forgotten:
        rig.tell(termios=None)
    rig.kill_victim()
    assert rig.ended() == 0
    assert termios.tcgetattr(terminal) == (raw if forgotten else before)
    os.close(user)
    os.close(terminal)
