"""shared.sandbox: what each profile leaves to a real process, forked by the real zygote, as /proc tells it."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tty
from contextlib import contextmanager, suppress

import pytest

from controller import doctor_sandbox
from controller.config.worker_uid import WorkerUid
from controller.fleet import WorkerSpec
from controller.injection import Captive
from controller.sandbox_report import look
from controller.supervision import process_state
from controller.users import Users
from shared import sandbox
from shared.sandbox import PROFILES, confine, list_for
from tests.controller.processes import SECONDS, running
from tests.vmm import environment, poll

TIOCSPTLCK = 0x4004_5431
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(
    not ROOT, reason="namespaces of its own need CAP_SYS_ADMIN, which this run has not got"
)
NAMES = {
    sandbox.CLONE_NEWNET: "net",
    sandbox.CLONE_NEWNS: "mnt",
    sandbox.CLONE_NEWIPC: "ipc",
    sandbox.CLONE_NEWUTS: "uts",
    sandbox.CLONE_NEWPID: "pid",
}


@pytest.fixture
def start(tmp_path):
    with running(str(tmp_path)) as (reactor, fleet):

        def make(profile, seccomp="true", fds=None, user=None):
            fleet.seccomp = seccomp
            fleet.users = Users(user)
            spec = WorkerSpec("toy", "_toy0", "tests.toy_worker", profile)
            return reactor.run_until(fleet.start(spec, fds or {}, lambda _: None), SECONDS).pid

        yield make


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_profile(start, profile):
    found = look(start(profile))
    assert found["no_new_privs"] is True
    assert (found["core"], found["open_files"]) == (0, PROFILES[profile].open_files)
    assert (found["seccomp"], found["filters"]) == ("filter", 1)


@pytest.mark.parametrize(
    ("value", "wanted"), [("true", "filter"), ("errno", "filter"), ("log", "filter"), ("false", "none")]
)
def test_every_value_of_seccomp(start, value, wanted):
    assert look(start("worker", value))["seccomp"] == wanted


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_no_capability_is_left_but_those_of_the_profile(start, profile):
    found = look(start(profile))
    kept = sum(1 << capability for capability in PROFILES[profile].capabilities) if ROOT else 0
    assert int(found["capabilities"], 16) == kept
    if ROOT:  # a bounding set can only be changed with CAP_SETPCAP
        assert int(found["bounding"], 16) == kept


@needs_root
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_namespaces_are_those_of_the_profile_and_the_network_is_empty(start, profile):
    pid = start(profile)
    wanted = sorted(name for flag, name in NAMES.items() if PROFILES[profile].namespaces & flag)
    assert look(pid)["namespaces"] == wanted
    if "net" in wanted:
        with open(f"/proc/{pid}/net/dev") as file:
            assert [line.partition(":")[0].strip() for line in file if ":" in line] == ["lo"]


@needs_root
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_the_file_system_is_empty_unless_the_profile_keeps_it(start, profile):
    pid = start(profile)
    assert look(pid)["root"] == ("shared" if PROFILES[profile].files else "empty")
    if not PROFILES[profile].files:
        with open(f"/proc/{pid}/mountinfo") as file:
            mounts = file.read().splitlines()
        assert len(mounts) == 1 and " / / ro," in mounts[0] and "tmpfs" in mounts[0]
        assert os.stat(f"/proc/{pid}/cwd/").st_ino == os.stat(f"/proc/{pid}/root/").st_ino


CHROOTED = """
import os, sys
from shared.sandbox import confine
os.chroot(sys.argv[1])
os.chdir("/")
sandbox = confine("worker")
with sandbox.leave_files():
    print(sandbox.own_mounts, os.listdir("/"))
"""


@needs_root
def test_in_a_chroot_that_is_no_mount_point_the_file_system_is_kept(tmp_path):
    (tmp_path / "here").touch()
    command = [sys.executable, "-c", CHROOTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (0, "False ['here']\n"), done.stderr


def credentials(pid):
    """What /proc tells of every thread: user and group ids of all four kinds, groups, capabilities."""
    names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd")
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        found.add(tuple(" ".join(lines[name].split()) for name in names))
    return found


def most_threads(pid):
    """RLIMIT_NPROC, which another's process may only ask /proc for."""
    with open(f"/proc/{pid}/limits") as file:
        return int(next(line for line in file if line.startswith("Max processes")).split()[2])


@needs_root
@pytest.mark.parametrize("seccomp", ["true", "false"])
@pytest.mark.parametrize("profile", sorted(name for name, profile in PROFILES.items() if profile.user))
def test_a_user_of_its_own_for_every_thread_and_nothing_else_of_root(start, profile, seccomp):
    pid = start(profile, seccomp, user=WorkerUid(54321))
    assert len(os.listdir(f"/proc/{pid}/task")) > 1  # zmq's: credentials are a thread's
    none = f"{0:016x}"
    assert credentials(pid) == {(" ".join(["54321"] * 4), " ".join(["54321"] * 4), "", *[none] * 5)}
    found = look(pid)
    assert (found["uid"], found["gid"], found["groups"]) == (54321, 54321, [])
    assert most_threads(pid) <= sandbox.THREADS_OF_A_USER


@needs_root
def test_the_janitor_stays_the_user_whose_names_it_removes(start):
    assert look(start("janitor", user=WorkerUid(54321)))["uid"] == os.geteuid()


@needs_root
def test_a_user_does_not_count_with_those_of_the_vmms_own_limit(start):
    """A session's RLIMIT_NPROC is for its user; a worker that is to be another may make its threads."""
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, before[1]))
    try:
        pid = start("worker", user=WorkerUid(54321))
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, before)
    assert most_threads(pid) > 1


PARENT = """
import os, sys
from controller import doctor_sandbox
from controller.config.worker_uid import WorkerUid
from controller.fleet import WorkerSpec
from controller.injection import Captive
from controller.users import Users
from tests.controller.processes import SECONDS, running
with running(sys.argv[1]) as (reactor, fleet):
    if sys.argv[2] != "0":
        fleet.users = Users(WorkerUid(int(sys.argv[2])))
    spec = WorkerSpec("toy", "_toy0", "tests.toy_worker", "worker")
    print(reactor.run_until(fleet.start(spec, {}, lambda _: None), SECONDS).pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("user", [0, pytest.param(54321, marks=needs_root)])
def test_a_killed_controller_takes_the_worker_along(tmp_path, user):
    """From its own pid namespace and as another user: the tie is renewed after the last change of credentials."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), str(user)],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        parent.kill()
        parent.wait()
    try:
        assert select.select([pidfd], [], [], SECONDS)[0]
    finally:
        os.close(pidfd)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)  # this test run is its reaper now


@needs_root
def test_nobody_else_can_be_named_from_inside(start):
    """A pid namespace of its own, without the filter's help: no signal, no trace, no pidfd."""
    pid, other = start("worker", "false"), start("worker", "false")
    with Captive(pid) as captive:
        assert captive.call("getpid") == 1 and captive.call("getppid") == 0
        for target in (other, os.getpid()):
            assert captive.call("kill", target, 0) == -errno.ESRCH
            assert captive.call("pidfd_open", target, 0) == -errno.ESRCH
            assert captive.call("ptrace", 0x4206, target, 0, 0) == -errno.ESRCH
        assert captive.call("kill", -1, signal.SIGKILL) == -errno.ESRCH  # everybody: nobody


@needs_root
@pytest.mark.parametrize("call", doctor_sandbox.FORKS)
def test_a_fork_that_is_let_through_is_ended_and_nobody_else(start, monkeypatch, call):
    """Its answer is a pid of the captive's namespace, whose number is somebody else's here."""
    killed, kill = [], os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid) or kill(pid, number))
    pid = start("worker", "false")
    trial = next(trial for trial in doctor_sandbox.ATTEMPTS if trial.call == call)
    with Captive(pid) as captive:
        before = doctor_sandbox.children(pid)
        assert doctor_sandbox.attempt(captive, os.getpid(), trial) == doctor_sandbox.Verdict(False, "ALLOWED")
        (child,) = doctor_sandbox.children(pid) - before
        poll(lambda: process_state(child)[0] in "ZX")
        assert killed == [child]


def test_workers_of_devices_keep_nothing():
    assert PROFILES["worker"].namespaces == sandbox.ALONE
    assert not PROFILES["worker"].files and not PROFILES["worker"].capabilities


def test_a_process_has_only_its_own_descriptors(start, tmp_path):
    """What the zygote and whoever started the VMM had open is not passed on; standard input is nobody's terminal."""
    secret = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(secret, True)  # as a shell would leak it
    try:
        pid = start("worker")
    finally:
        os.close(secret)
    opened = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert opened[0] == opened[1] == "/dev/null"
    others = {target for fd, target in opened.items() if fd > 2}
    kinds = {target.partition(":")[0] for target in others}
    assert kinds <= {"socket", "pipe", "anon_inode", "/dev/null"}, opened


@contextmanager
def standard_error(fd):
    """What the zygote, and so a worker, has as descriptor 2."""
    before = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@pytest.fixture
def terminal():
    """(its master, the terminal)"""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def access_of(pid, fd):
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        flags = next(line for line in file if line.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE


def test_a_worker_writes_to_the_users_terminal_and_reads_nothing_from_it(start, terminal):
    ours, theirs = terminal
    with standard_error(theirs):
        pid = start("worker", "errno")
    assert os.readlink(f"/proc/{pid}/fd/2") == os.ttyname(theirs) and access_of(pid, 2) == os.O_WRONLY
    os.write(ours, b"typed for the console")
    with Captive(pid) as captive:
        assert captive.call("read", 2, bytes(64), 64) == -errno.EBADF
        assert captive.call("write", 2, b"a log line", 10) == 10
    assert select.select([ours], [], [], SECONDS)[0] and os.read(ours, 64) == b"a log line"
    assert select.select([theirs], [], [], SECONDS)[0] and os.read(theirs, 64) == b"typed for the console"


def test_a_terminal_that_can_not_be_opened_again_stops_no_worker(start, terminal):
    ours, theirs = terminal
    fcntl.ioctl(ours, TIOCSPTLCK, struct.pack("i", 1))  # EIO, for root too
    with standard_error(theirs):
        pid = start("worker")
    assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/null"


def test_lists_go_by_package_and_by_module_in_a_package_of_many_processes():
    assert list_for("blk_worker.__main__") == "blk_worker"
    assert list_for("controller.janitor") == "janitor"
    assert list_for("controller.api.entry") == "api"
    assert list_for("metrics_exporter.__main__") == "metrics_exporter"
    assert list_for("tests.toy_worker") == "worker"


def test_an_unknown_profile_is_an_error_before_anything_is_given_up():
    before = look(os.getpid())
    with pytest.raises(KeyError):
        confine("none")
    assert look(os.getpid()) == before


SEALED = """
import os
from shared import sandbox
box = sandbox.confine("worker", "worker", "true")
with box.leave_files("ipc:///tmp/name") as name:
    assert name in ("ipc://name", "ipc:///tmp/name"), name
box.seal()
box.seal()
try:
    open("/etc/passwd")
    os._exit(3)
except PermissionError:
    os._exit(0)
"""


def test_a_second_seal_changes_nothing_and_a_missing_file_is_no_death():
    done = subprocess.run(
        [sys.executable, "-c", SEALED], env=environment(), timeout=30, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr


LATE = """
import os, zmq
from shared import sandbox
context = zmq.Context()  # its threads start with its first socket
box = sandbox.confine("worker", "worker", "true")
with box.leave_files():
    pass
box.seal()
first, second = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
first.bind("inproc://late")
second.connect("inproc://late")
second.send(b"")
first.recv()
for socket in (first, second):
    socket.close()
context.term()  # waits for its threads: they have come up, and down
os._exit(0)
"""


def test_zmqs_threads_may_start_after_the_filter():
    """On a busy host they do: the control channel is there before its second thread has run at all."""
    done = subprocess.run(
        [sys.executable, "-c", LATE], env=environment(), timeout=30, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr
