"""The sandbox of a running VM: what the kernel says of each process, a guest's whole life under the filters, and code
of ours inside the workers that tries to get out."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest

from controller.doctor_sandbox import ATTEMPTS, KINDS, fatal, try_all
from controller.injection import Captive, Killed
from controller.sandbox_report import look
from controller.supervision import process_state
from tests.netns import network_namespace
from tests.probe.test_migration import hop
from tests.prometheus import scrape, total
from tests.vmm import Vmm, environment, poll

pytestmark = pytest.mark.probe

WORKERS = ("blk", "net", "console")
FORKED = (*WORKERS, "api", "metrics", "janitor")
FILTERED = (*FORKED, "vcpu")
UID = 54000  # and some behind it: users that nobody is
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own can only be given by root")
DOCTOR = "import sys; from controller.doctor import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def guest(tmp_path, *words, mode="mode=blkload,console,net depth=8 lost_irq_ticks=100", name="vmm"):
    """A VM with one device of each kind, and a second disk."""
    disks = []
    for number in range(2):
        path = tmp_path / f"disk{number}.raw"
        if not path.exists():
            path.write_bytes(bytes(16 << 20))
        disks.append(f"path={path}")
    devices = ["--disk", *disks, "--net", "mac=12:34:56:78:90:ab", "--console", f"file={tmp_path}/console"]
    devices += ["--metrics-socket", f"{tmp_path}/{name}.metrics"]
    with network_namespace(), Vmm.guest(tmp_path, mode, *devices, *words, name=name) as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        yield vmm


def kept(vmm, kinds=FILTERED, seccomp="filter"):
    """Rows of vmm.sandbox by device, once every process of these kinds is there and has what it is to have."""

    def ready():
        rows = vmm.ask("sandbox")
        mine = [row for row in rows if row["kind"] in kinds]
        whole = {row["kind"] for row in mine} == set(kinds)
        return (
            whole
            and all(row.get("seccomp") == seccomp for row in mine)
            and {row["device"]: row for row in rows}
        )

    return poll(ready)


def test_what_holds_for_each_process_is_read_from_the_kernel(tmp_path):
    with guest(tmp_path) as vmm:
        rows = kept(vmm)
        assert {row["kind"] for row in rows.values()} == {*FILTERED, "controller", "zygote"}
        for row in rows.values():
            assert (
                row.items()
                >= {name: value for name, value in look(row["pid"]).items() if name != "descriptors"}.items()
            )
            if row["kind"] in (*WORKERS, "api", "metrics"):
                assert (row["root"], row["capabilities"], row["bounding"]) == ("empty", "0", "0")
                assert row["namespaces"] == ["ipc", "mnt", "net", "pid", "uts"]
            if row["kind"] in FORKED:
                assert "pid" in row["namespaces"] and row["uid"] == os.geteuid()
                assert row["no_new_privs"] is True and row["filters"] == 1 and row["core"] == 0
        table = vmm.remote("sandbox", "--table").stdout.splitlines()
        assert table[0].split()[:4] == ["KIND", "DEVICE", "PID", "UID"] and len(table) == len(rows) + 1


@pytest.mark.parametrize("value", ["true", "errno", "log", "false"])
def test_every_value_of_seccomp_reaches_every_process(tmp_path, value):
    with guest(tmp_path, "--seccomp", value) as vmm:
        rows = kept(vmm, seccomp="none" if value == "false" else "filter")
        assert rows["controller"]["seccomp"] == rows["zygote"]["seccomp"] == "none"
        vmm.more("blk ok ")
        assert not [row for row in vmm.fleet().values() if row["restarts"]], vmm.errors


def pss(path):
    """Bytes by process."""
    found = scrape(path).items()
    return {dict(labels)["process"]: size for (name, labels), size in found if name == "flotilla_process_pss_bytes"}


@pytest.mark.parametrize("words", [(), pytest.param(("--worker-uid", f"base={UID}"), marks=needs_root)], ids=len)
def test_a_guests_whole_life_under_the_filters(tmp_path, words):
    """Boot, I/O, counters, figures, stop and continue of its workers, pause, resume, killed workers, a migration: no
    process ends that nobody has killed. The same with users of their own."""
    metrics = ("--metrics-socket", str(tmp_path / "two.metrics"))
    with guest(tmp_path, *words, name="one") as vmm, Vmm(tmp_path, *metrics, *words, name="two") as destination:
        rows = kept(vmm)
        for row in rows.values():
            if row["kind"] in WORKERS:
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    os.kill(row["pid"], number)
        vmm.more("blk ok ")
        vmm.ask("counters")
        vmm.ask("pause")
        vmm.ask("resume")
        vmm.more("blk ok ")
        assert not [row for row in vmm.fleet().values() if row["restarts"]], vmm.errors
        for name, row in rows.items():
            if row["kind"] in (*WORKERS, "metrics"):
                os.kill(row["pid"], signal.SIGKILL)
                poll(lambda name=name: kept(vmm)[name]["pid"] != rows[name]["pid"])
                vmm.more("blk ok ")
        again = kept(vmm)
        assert {name: row["uid"] for name, row in again.items()} == {name: row["uid"] for name, row in rows.items()}
        sizes = pss(tmp_path / "one.metrics")
        assert set(sizes) >= set(again) - {"vcpu0"} and min(sizes[name] for name in set(again) - {"vcpu0"}) > 0
        destination.wait_api()
        hop(vmm, destination, tmp_path / "sock")
        destination.expect("blk ok ")
        kept(destination)
        destination.more("blk ok ")
        assert total(scrape(tmp_path / "two.metrics"), "build_info") == 1
        assert not [row for row in destination.fleet().values() if row["restarts"]], destination.errors
        assert "SIGSYS" not in vmm.errors + destination.errors


@needs_root
@pytest.mark.parametrize("each", [False, True])
def test_workers_run_as_users_of_their_own(tmp_path, each):
    """Read from the kernel: uid, gid, groups, capabilities; with base= no two are the same."""
    with guest(tmp_path, "--worker-uid", f"base={UID}" if each else str(UID)) as vmm:
        rows = kept(vmm)
        others = [row for row in rows.values() if row["kind"] in (*WORKERS, "api", "metrics")]
        for row in others:
            assert row["uid"] == row["gid"] and row["groups"] == [] and row["capabilities"] == "0"
        users = [row["uid"] for row in others]
        assert len(set(users)) == (len(users) if each else 1) and set(users) <= {*range(UID, UID + 256)}
        for row in rows.values():
            if row["kind"] in ("controller", "zygote", "vcpu", "janitor"):
                assert row["uid"] == os.geteuid()
        fleet = vmm.fleet()
        assert all(fleet[row["device"]]["pss_kib"] > 0 for row in others)
        vmm.process.kill()
        vmm.process.wait()
        poll(lambda: {process_state(row["pid"])[0] for row in rows.values()} <= {"Z", "X"})  # Z: nobody has waited
        assert not vmm.api.exists()


@pytest.mark.timeout(300)
@needs_root
def test_a_migrations_agents_are_the_users_too(tmp_path):
    """From the moment at which they are connected; before that they need the VMM's."""
    words = ("--worker-uid", f"base={UID}")
    with guest(tmp_path, *words, name="one") as vmm, Vmm(tmp_path, *words, name="two") as destination:
        kept(vmm)
        destination.wait_api()
        waiting = destination.start_remote("receive-migration", f"unix:{tmp_path}/sock")
        try:
            before = kept(destination, ("migration_agent",), "none")["migration"]
            assert before["uid"] == os.geteuid() and before["root"] == "shared"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                poll((tmp_path / "sock").exists)
                peer.connect(str(tmp_path / "sock"))
                after = kept(destination, ("migration_agent",))["migration"]
                assert after["pid"] == before["pid"] and "pid" in after["namespaces"]
                assert UID <= after["uid"] == after["gid"] and after["capabilities"] == "0"
            assert waiting.wait(60) != 0
        finally:
            waiting.kill()  # without a peer it would wait for ever
            waiting.wait()
        vmm.more("blk ok ")


@pytest.mark.parametrize("kind", [*WORKERS, "vcpu"])
def test_a_forbidden_call_ends_the_process_and_not_the_guest(tmp_path, kind):
    with guest(tmp_path) as vmm:
        rows = kept(vmm)
        victim = next(row for row in rows.values() if row["kind"] == kind)
        assert fatal(victim["pid"]).how == "SIGSYS"
        poll(lambda: vmm.fleet()[victim["device"]]["restarts"] == 1)
        vmm.more("blk ok ")
        assert kept(vmm)[victim["device"]]["pid"] != victim["pid"]
        assert b"BAD" not in vmm.output
        if kind != "vcpu":
            assert "ended by SIGSYS: a forbidden system call" in vmm.errors


@pytest.mark.parametrize("kind", [*WORKERS, "api", "metrics"])
def test_attackers_code_in_a_worker_gets_out_nowhere(tmp_path, kind):
    """Every way out is refused, it holds nothing of another device, and the guest and the other workers go on."""
    with guest(tmp_path, "--seccomp", "errno") as vmm:
        rows = kept(vmm)
        row = next(row for row in rows.values() if row["kind"] == kind)
        found = try_all(row["pid"], vmm.process.pid)
        assert [what for what, cell in found.items() if not cell.refused] == []
        assert len(found) == len(ATTEMPTS)
        own = {"_disk0": {f"{tmp_path}/disk0.raw"}, "console": {f"{tmp_path}/console"}}.get(
            row["device"], set()
        )
        files = {os.readlink(f"/proc/{row['pid']}/fd/{fd}") for fd in os.listdir(f"/proc/{row['pid']}/fd")}
        reached = {file for file in files if file.startswith(str(tmp_path)) and not file.endswith(".err")}
        assert reached == own
        assert any(file == "/dev/net/tun" for file in files) is (kind == "net")
        vmm.more("blk ok ")
        now = kept(vmm)
        assert {d: r["pid"] for d, r in now.items()} == {d: r["pid"] for d, r in rows.items()}


def test_a_worker_that_hangs_up_and_leaves_is_replaced(tmp_path):
    """What the filter must allow can't end the VM either: close of every descriptor, exit. Its own device is a
    taken-over worker's to harm: a write without the image's descriptor fails to the guest."""
    with guest(tmp_path) as vmm:
        pid = kept(vmm)["_disk0"]["pid"]
        with (
            suppress(Killed),
            Captive(pid) as captive,
        ):  # the controller kills who hangs up, perhaps before the last
            for fd in map(int, os.listdir(f"/proc/{pid}/fd")):
                captive.call("close", fd)
            captive.call("exit_group", 0)
        poll(lambda: vmm.fleet()["_disk0"]["restarts"] >= 1)
        vmm.more("blk ok ")


def test_the_other_walls_stand_without_a_filter(tmp_path):
    """`--seccomp false`: no file, no host of the network, no socket of the host's by an abstract name, no mount, no
    other process."""
    with guest(tmp_path, "--seccomp", "false") as vmm, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0flotilla-test-%d" % os.getpid())
        listener.listen()
        name = (socket.AF_UNIX).to_bytes(2, "little") + listener.getsockname()
        rows = kept(vmm, seccomp="none")
        others = [vmm.process.pid, *(row["pid"] for device, row in rows.items() if device != "_disk0"), -1]
        with Captive(rows["_disk0"]["pid"]) as captive:
            for other in others:
                assert captive.call("kill", other, signal.SIGKILL) == -errno.ESRCH
                assert captive.call("ptrace", 0x4206, other, 0, 0) == -errno.ESRCH
            assert captive.call("openat", -100, b"/etc/passwd", os.O_RDONLY) == -errno.ENOENT
            assert captive.call("openat", -100, b"/proc/self/root", os.O_RDONLY) == -errno.ENOENT
            assert captive.call("openat", -100, b"/file", os.O_WRONLY | os.O_CREAT, 0o600) == -errno.EROFS
            unix = captive.call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
            assert unix >= 0 and captive.call("connect", unix, name, len(name)) == -errno.ECONNREFUSED
            inet = captive.call("socket", socket.AF_INET, socket.SOCK_DGRAM, 0)
            address = (
                (socket.AF_INET).to_bytes(2, "little")
                + (53).to_bytes(2, "big")
                + bytes([8, 8, 8, 8])
                + bytes(8)
            )
            assert inet >= 0 and captive.call("connect", inet, address, 16) == -errno.ENETUNREACH
            assert captive.call("socket", socket.AF_PACKET, socket.SOCK_RAW, 0) == -errno.EPERM
            assert captive.call("mount", 0, b"/", b"tmpfs", 0, 0) == -errno.EPERM
            assert captive.call("setns", 0, 0x2_0000) < 0
            assert captive.call("close", unix) == captive.call("close", inet) == 0
        vmm.more("blk ok ")


@pytest.mark.timeout(300)
def test_doctor_finds_everything_refused():
    command = [sys.executable, "-c", DOCTOR, "--sandbox", "--json"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["refused"] and found["allowed"] == [] and set(found["table"]) == set(KINDS)
    assert {row["a call of death"] for row in found["table"].values()} == {"SIGSYS"}
