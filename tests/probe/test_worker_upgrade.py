"""`ch-remote worker-upgrade` to VMs whose guests verify what they read, write, send and receive all the time."""

from __future__ import annotations

import os
import re
import signal
import socket
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from controller.sandbox_report import look
from controller.supervision import process_state
from tests.netns import network_namespace
from tests.netpeer import Flow, ping
from tests.other_worker import BEGUN, LIES, STEPS, WAITS, program
from tests.probe.net.rig import GUEST, HOST
from tests.probe.requests import ask
from tests.vmm import SECONDS, Vmm, events, poll, read_until

pytestmark = [pytest.mark.probe, pytest.mark.timeout(300)]

UPGRADES = int(os.environ.get("FLOTILLA_UPGRADES", "6"))
PATIENCE = 2 * SECONDS


@contextmanager
def guest(
    folder: Path, *words: str, mode: str = "mode=blkload,net,rng,console depth=8", net: str = "", stays: bool = True,
    **options: Any,
) -> Iterator[Vmm]:
    """A guest with a device of each kind. It finds lost interrupts late, not never. `stays`: at the end it must still
    do what it is for."""
    (folder / "disk.raw").write_bytes(os.urandom(16 << 20))
    devices = ["--disk", f"path={folder}/disk.raw", "--net", f"ip={HOST}{net}"]
    if "--console" not in words:
        devices += ["--console", f"file={folder}/console"]
    cmdline = f"{mode} rng.every_ms=20 hz=2 lost_irq_ticks=20 report_ms=50"
    with network_namespace(), Vmm.guest(folder, cmdline, *devices, *words, **options) as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        poll(lambda: {row["kind"] for row in fleet(vmm).values()} >= {"console", "net", "blk"})
        yield vmm
        if stays:
            goes_on(vmm)


def goes_on(vmm: Vmm) -> None:
    """Every device does, and nothing was ever wrong."""
    vmm.more("")
    since = len(vmm.output)
    for task in ("blk", "rng", "console"):
        vmm.expect(f"{task} ok ", PATIENCE, since)
    assert b"BAD" not in vmm.output, vmm.output[-3000:]


def fleet(vmm: Vmm) -> dict[str, Any]:
    """Rows by name."""
    status, rows = ask(vmm, "GET", "vmm.fleet")
    assert status == 200, rows
    return {row["device"]: row for row in rows}  # type: ignore[call-overload, index]


def upgraded(vmm: Vmm, name: str, *words: str) -> dict[str, Any]:
    """An upgrade that must succeed: exactly one process serves afterwards, and it is the new one."""
    before = fleet(vmm)
    answer: dict[str, Any] = vmm.ask("worker-upgrade", name, *words)
    after = fleet(vmm)
    assert answer["old_pid"] == before[name]["pid"] and answer["new_pid"] == after[name]["pid"] != answer["old_pid"]
    assert set(before) == set(after), "a second process is left"
    assert after[name]["upgrades"] == before[name]["upgrades"] + 1 and after[name]["state"] == "running"
    assert after[name]["restarts"] == before[name]["restarts"]
    with pytest.raises(ProcessLookupError):
        os.kill(answer["old_pid"], 0)
    return answer


def refused(vmm: Vmm, name: str, *words: str, kept: bool = True) -> str:
    """An upgrade that must fail, and leave one process: the same as before if `kept`. What it says."""
    before = fleet(vmm)
    done = vmm.remote("worker-upgrade", name, *words, timeout=120)
    assert done.returncode == 1, done.stdout
    after = fleet(vmm)
    if kept:
        assert {row["pid"] for row in after.values()} == {row["pid"] for row in before.values()}, done.stderr
        assert all(row["restarts"] == before[device]["restarts"] for device, row in after.items())
    return done.stderr


# Under load -----------------------------------------------------------------------------------------------------------


class Patient(Flow):
    """A flow that takes a datagram for lost only after a long time."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._echo._sock.settimeout(PATIENCE)

    @property
    def lost(self) -> int:
        return self._echo.sent - self._echo.answered


@pytest.mark.timeout(60 + 30 * UPGRADES)
def test_disk_card_and_console_again_and_again(tmp_path: Path) -> None:
    """The card has two queue pairs, as its control queue has been told. The guest's lines on the console are numbered;
    its process serves the random number generator too."""
    mode = "mode=blkload,net,rng,console depth=8 net.pairs=2"
    with guest(tmp_path, "--cpus", "boot=2", mode=mode, net=",num_queues=4") as vmm:
        ping(GUEST)
        index, counters = socket.if_nametoindex("vmtap0"), vmm.ask("counters")["_disk0"]
        with Patient(GUEST) as flow:
            for _ in range(UPGRADES):
                upgraded(vmm, "_disk0")
                vmm.more("blk ok ", PATIENCE)
                before, counters = counters, vmm.ask("counters")["_disk0"]
                assert all(counters[f"{kind}_{what}"] >= before[f"{kind}_{what}"] for kind in ("read", "write")
                           for what in ("ops", "bytes"))  # fmt: skip
                flow.goes_on(5, PATIENCE)
                upgraded(vmm, "_net1")
                flow.goes_on(5, PATIENCE)
                upgraded(vmm, "console")
                goes_on(vmm)
        assert flow.lost == 0 and socket.if_nametoindex("vmtap0") == index
        for device in ("__console", "__rng"):  # by its devices, too
            assert vmm.ask("worker-upgrade", device)["name"] == "console"
        row = fleet(vmm)["_disk0"]
        assert (row["upgrades"], row["restarts"], row["last_cause"]) == (UPGRADES, 0, None)
    numbers = [int(line.split()[-1]) for line in (tmp_path / "console").read_text().splitlines()]
    assert numbers == list(range(len(numbers))) and numbers


def test_what_is_typed_is_read_by_one_of_them_and_in_order(tmp_path: Path) -> None:
    """Old and new have the same PTY open; the guest gives back what it reads."""
    with guest(tmp_path, "--console", "pty", mode="mode=blkload,net,rng,console depth=8 console.report_ms=300") as vmm:
        fds = f"/proc/{vmm.pid_of('console')}/fd"
        path = next(name for fd in os.listdir(fds) if (name := os.readlink(f"{fds}/{fd}")).startswith("/dev/pts/"))
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        try:
            tty.setraw(fd)
            seen = b""

            def given_back(new: bytes) -> bytes:
                return re.sub(rb"console line \d+\r\n", b"", seen + new)

            for number in range(8):
                typed = f"<{number:04}>".encode() * 50
                os.write(fd, typed[: len(typed) // 2])
                request = vmm.start_remote("worker-upgrade", "console")
                os.write(fd, typed[len(typed) // 2 :])
                mark = f"<{number:04}>".encode()
                seen += read_until(fd, lambda new, mark=mark: given_back(new).count(mark) >= 50, PATIENCE)  # type: ignore[misc]
                assert request.wait(PATIENCE) == 0
            assert given_back(b"") == b"".join(f"<{number:04}>".encode() * 50 for number in range(8))
        finally:
            os.close(fd)


def test_device_that_the_driver_has_not_activated(tmp_path: Path) -> None:
    """Its driver finds the new process later."""
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    with Vmm.guest(tmp_path, "mode=tick", "--disk", f"path={tmp_path}/disk.raw", "--no-shutdown") as vmm:
        vmm.expect(r"tick \d")
        vmm.wait_api()
        upgraded(vmm, "_disk0")
        upgraded(vmm, "console")
        vmm.more(r"tick \d")


def test_everybody_is_told(tmp_path: Path) -> None:
    monitor = tmp_path / "events"
    with guest(tmp_path, "--event-monitor", f"path={monitor}", "-v") as vmm:
        answer = upgraded(vmm, "_disk0")
        wrong = program(tmp_path, "at_verb('load', 'die')")
        refused(vmm, "_disk0", "--exec", wrong)
        (good, told), (bad, why) = events(monitor, "worker-upgraded", "worker-upgrade-failed")
        assert (good, told) == ("worker-upgraded", answer) and told["stall_ms"] > 0 and told["kind"] == "blk"
        assert bad == "worker-upgrade-failed" and why["old_pid"] == answer["new_pid"] and why["program"] == wrong
        assert why["reason"].startswith("load: ") and why["stall_ms"] > 0 and why["new_pid"]
        assert f"has taken over from pid {answer['old_pid']}" in vmm.errors
        assert "blk _disk0 was not upgraded" in vmm.errors
        assert not events(monitor, "worker-lost", "worker-restarted")


# Another version ------------------------------------------------------------------------------------------------------


def as_confined(folder: Path, vmm: Vmm) -> None:
    """Each kind of device's worker becomes another program, for which the same holds as for the one before."""
    before = {row["device"]: row for row in vmm.ask("sandbox")}
    for name in ("_disk0", "_net1", "console"):
        upgraded(vmm, name, "--exec", program(folder))
        assert fleet(vmm)[name]["program"] == program(folder)
        after = {row["device"]: row for row in vmm.ask("sandbox")}[name]
        for what in before[name].keys() - {"pid", "descriptors"}:
            assert after[what] == before[name][what], what
    goes_on(vmm)
    ping(GUEST)


def test_killed_worker_is_replaced_by_the_program_that_it_was_as_long_as_there_is_one(tmp_path: Path) -> None:
    """Which takes over each kind of device, and is as confined. An upgrade leads back."""
    path = program(tmp_path)
    with guest(tmp_path) as vmm:
        as_confined(tmp_path, vmm)
        pid = fleet(vmm)["_disk0"]["pid"]
        os.kill(pid, signal.SIGKILL)
        row = poll(lambda: (now := one_serves(vmm, pid)) and now["state"] in ("running", "degraded") and now)
        assert row["program"] == path and path.encode() in Path(f"/proc/{row['pid']}/cmdline").read_bytes()
        goes_on(vmm)
        upgraded(vmm, "_disk0")
        assert fleet(vmm)["_disk0"]["program"] is None
        pid = upgraded(vmm, "_disk0", "--exec", path)["new_pid"]
        os.unlink(path)
        os.kill(pid, signal.SIGKILL)
        row = poll(lambda: (now := one_serves(vmm, pid)) and now["state"] in ("running", "degraded") and now)
        assert row["program"] is None and "going back to this release's worker" in vmm.errors


@pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own can only be given by root")
def test_another_program_is_the_user_that_the_worker_was_and_dies_with_its_controller(tmp_path: Path) -> None:
    """With --worker-uid. Becoming another user unties a process from its parent."""
    with guest(tmp_path, "--worker-uid", "base=54000", stays=False) as vmm:
        as_confined(tmp_path, vmm)
        rows = {row["device"]: row for row in vmm.ask("sandbox")}
        mine = [rows[name] for name in ("_disk0", "_net1", "console")]
        assert len({row["uid"] for row in mine} - {0}) == 3 and all(row["groups"] == [] for row in mine)
        os.kill(mine[0]["pid"], signal.SIGKILL)
        poll(lambda: one_serves(vmm, mine[0]["pid"])["state"] == "running")
        assert look(fleet(vmm)["_disk0"]["pid"])["uid"] == mine[0]["uid"]
        path = program(tmp_path, "from shared.sandbox import Sandbox; Sandbox._become_user = lambda self: None")
        assert "less confined than a worker of this VMM: capabilities is c0" in refused(vmm, "_net1", "--exec", path)
        goes_on(vmm)
        rows = fleet(vmm)
        poll(lambda: "janitor" in fleet(vmm))
        vmm.process.kill()
        vmm.process.wait()
        workers = [row["pid"] for row in rows.values() if row["kind"] in ("blk", "net", "console")]
        poll(lambda: {process_state(pid)[0] for pid in workers} <= {"Z", "X"})  # Z: nobody has waited
        poll(lambda: vmm.api is not None and not vmm.api.exists())


BODIES = {
    "[]": "not an object",
    "{}": "id is missing",
    '{"id": 5}': "id is missing",
    '{"id": "console", "path": "/x"}': "unknown field path",
    '{"id": "console", "timeout_ms": 0}': "timeout_ms",
    '{"id": "console", "timeout_ms": "5"}': "timeout_ms",
    '{"id": "console", "exec": 5}': "no absolute path",
    '{"id": "console", "exec": "worker"}': "no absolute path",
    '{"id": "console", "exec": "/nobody/there"}': "No such file",
    '{"id": "console", "exec": "/etc"}': "is no file",
    '{"id": "console", "exec": "/etc/passwd"}': "is not executable",
}

def test_rebooted_vm_has_this_releases_workers(tmp_path: Path) -> None:
    with guest(tmp_path) as vmm:
        upgraded(vmm, "_disk0", "--exec", program(tmp_path))
        vmm.ask("reboot")
        row = poll(lambda: (now := fleet(vmm).get("_disk0")) and now["state"] == "running" and now)
        assert (row["program"], row["upgrades"]) == (None, 1)


def test_upgrades_before_during_and_after_a_migration(tmp_path: Path) -> None:
    """One that is under way is waited for."""
    from tests.probe.test_migration import hop

    path = program(tmp_path)
    with Vmm(tmp_path, name="two") as other, guest(tmp_path, name="one") as vmm:
        for name in ("_disk0", "_net1", "console"):
            upgraded(vmm, name, "--exec", path)
        slow = program(tmp_path, "at_verb('load', 'wait')", "slow")
        request = vmm.start_remote("worker-upgrade", "_disk0", "--exec", slow, "--timeout-ms", "2000")
        poll(lambda: WAITS in vmm.errors)
        hop(vmm, other, tmp_path / "sock")
        assert request.wait(PATIENCE) == 1
        assert {row["program"] for row in fleet(other).values()} == {None}
        other.more("blk ok ", PATIENCE)
        for name in ("_disk0", "_net1", "console"):
            upgraded(other, name)
        upgraded(other, "_disk0", "--exec", path)
        ping(GUEST)
        vmm.more, vmm.expect = other.more, other.expect  # type: ignore[method-assign]  # what the guest says, it says there
    assert b"BAD" not in other.output


# Bad input ------------------------------------------------------------------------------------------------------------


def test_no_vm(vmm: Vmm) -> None:
    done = vmm.remote("worker-upgrade", "_disk0")
    assert done.returncode == 1 and "VM is not created" in done.stderr


def test_unknown_id(ticking: Vmm) -> None:
    said = refused(ticking, "_disk7")
    assert "there is no _disk7" in said and "console" in said


def test_not_a_device_worker(tmp_path: Path) -> None:
    with Vmm.guest(tmp_path, "mode=tick", "--metrics-socket", f"{tmp_path}/figures") as vmm:
        vmm.expect(r"tick \d")
        vmm.wait_api()
        poll(lambda: {"janitor", "metrics"} <= set(fleet(vmm)))
        for name in ("vcpu0", "api", "metrics", "zygote", "janitor", "controller"):
            assert f"{name} can't be upgraded: " in refused(vmm, name)
        vmm.more(r"tick \d")


def test_body_that_makes_no_sense_harms_nobody(ticking: Vmm) -> None:
    for body, message in BODIES.items():
        status, said = ask(ticking, "PUT", "vm.worker-upgrade", body)
        assert status == 400 and message in " ".join(said)


def test_program_that_is_none(tmp_path: Path, ticking: Vmm) -> None:
    path = tmp_path / "no-worker"
    for text, message, limit in (("exit 5", "ended with 5", 30000), ("exec sleep 9999", "no answer within", 3000)):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        said = refused(ticking, "console", "--exec", str(path), "--timeout-ms", str(limit))
        assert message in said and "start: " in said


def test_paused_vm(ticking: Vmm) -> None:
    ticking.ask("pause")
    assert "its VM's state is Paused (resume it first)" in refused(ticking, "console")
    ticking.ask("resume")


def test_migration_under_way(tmp_path: Path) -> None:
    """To a peer that says nothing."""
    with socket.socket(socket.AF_UNIX) as listener, guest(tmp_path) as vmm:
        listener.bind(str(tmp_path / "peer"))
        listener.listen()
        sending = vmm.start_remote("send-migration", f"unix:{tmp_path}/peer")
        poll(lambda: vmm.ask("migration-progress")["state"] == "ongoing")
        poll(lambda: "migration" in fleet(vmm))  # its agent is forked later
        assert "VM is being migrated" in refused(vmm, "_disk0")
        vmm.ask("cancel-migration")
        assert sending.wait(PATIENCE) == 1
    (tmp_path / "peer").unlink()


# A new program that goes wrong --------------------------------------------------------------------------------------

def stopped(vmm: Vmm, name: str, path: str, step: str, *, kept: bool = True) -> str:
    """An upgrade that fails at a step, whose time limit is as short as this host allows: it may take the process too
    long to get as far, in which case the old one goes on serving. That is how it must end if `kept`; else the new one
    has begun to serve, and the worker is started again."""
    wanted = f": {step}: ", "goes on serving it: " if kept else "its worker is started again: "
    for limit in (1000, 2000, 4000, 8000, 16000):
        said = refused(vmm, name, "--exec", path, "--timeout-ms", str(limit), kept=kept)
        if all(words in said for words in wanted):
            break
    assert all(words in said for words in wanted), said
    return said


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["die", "hang"])
def test_program_that_stops_half_way(tmp_path: Path, what: str) -> None:
    """It dies, or does nothing more, at each step: the old process resumes, which never left."""
    with guest(tmp_path) as vmm:
        for change, step in STEPS.values():
            said = stopped(vmm, "_disk0", program(tmp_path, change.format(what=what)), step)
            assert ("no answer within" if what == "hang" else "") in said
            goes_on(vmm)
        for name in ("_net1", "console"):
            for step in ("load", "resume"):
                path = program(tmp_path, STEPS[step][0].format(what=what))
                stopped(vmm, name, path, step)
        ping(GUEST)
        for name in ("_disk0", "_net1", "console"):
            upgraded(vmm, name)


@pytest.mark.timeout(600)
def test_program_that_lies(tmp_path: Path) -> None:
    """About what it is, or what it has loaded."""
    with guest(tmp_path) as vmm:
        for change, message in LIES.values():
            assert message in refused(vmm, "_disk0", "--exec", program(tmp_path, change))
        if os.geteuid() == 0:  # nobody else's workers have a file system of their own
            path = program(tmp_path, "from shared import sandbox; sandbox._enter_empty_root = lambda: None")
            assert "root is shared, not empty" in refused(vmm, "_disk0", "--exec", path)


def test_program_that_stops_after_it_began_to_serve(tmp_path: Path) -> None:
    """It dies, or hangs. Neither of the two knows its rings any more: a fresh process of the old program recovers
    them."""
    with guest(tmp_path) as vmm:
        for restarts, what in enumerate(("die", "hang"), 1):
            before = fleet(vmm)["_disk0"]["pid"]
            path = program(tmp_path, BEGUN.format(what=what))
            stopped(vmm, "_disk0", path, "resume", kept=False)
            row = one_serves(vmm, before)
            assert (row["restarts"], row["program"], row["upgrades"]) == (restarts, None, 0)
            goes_on(vmm)


# The old process, and the VM ----------------------------------------------------------------------------------------

class Meanwhile:
    """An upgrade of the disk that stands still in the new process, at a control request, until go_on()."""

    def __init__(self, vmm: Vmm, folder: Path, verb: str) -> None:
        self._vmm = vmm
        before = vmm.errors.count(WAITS)
        path = program(folder, f"at_verb({verb!r}, 'wait')")
        self._request = vmm.start_remote("worker-upgrade", "_disk0", "--exec", path)
        poll(lambda: vmm.errors.count(WAITS) > before)
        rows = fleet(vmm)
        self.old, self.new = rows["_disk0"]["pid"], rows["_disk0.new"]["pid"]

    def kill_old(self) -> None:
        """It has been waited for when this returns, and the new process does not know."""
        os.kill(self.old, signal.SIGKILL)
        poll(lambda: not Path(f"/proc/{self.old}").exists())

    def go_on(self) -> None:
        os.kill(self.new, signal.SIGUSR1)

    def code(self) -> int:
        """The request's."""
        return self._request.wait(PATIENCE)


def one_serves(vmm: Vmm, *gone: int) -> dict[str, Any]:
    """Wait for it; the row."""

    def alone() -> Any:
        rows = fleet(vmm)
        return not {"_disk0.new", "_disk0.old"} & set(rows) and rows.get("_disk0")

    row: dict[str, Any] = poll(lambda: (now := alone()) and now["pid"] not in (0, *gone) and now)
    assert sum(row["kind"] == "blk" for row in fleet(vmm).values()) == 1
    return row


def test_old_process_killed_before_and_after_the_point_of_no_return(tmp_path: Path) -> None:
    with guest(tmp_path) as vmm:
        for restarts, verb in enumerate(("load", "save"), 1):
            upgrade = Meanwhile(vmm, tmp_path, verb)
            upgrade.kill_old()
            upgrade.go_on()
            assert upgrade.code() == 1
            row = one_serves(vmm, upgrade.old, upgrade.new)
            assert (row["restarts"], row["program"], row["last_cause"]) == (restarts, None, "ended")
            goes_on(vmm)
        upgrade = Meanwhile(vmm, tmp_path, "resume")
        upgrade.kill_old()
        upgrade.go_on()
        assert upgrade.code() == 0
        row = one_serves(vmm, upgrade.old)
        assert (row["pid"], row["upgrades"]) == (upgrade.new, 1) and row["last_stall_ms"] is not None


def test_new_process_or_zygote_killed_from_outside_and_two_upgrades_at_once(tmp_path: Path) -> None:
    with guest(tmp_path) as vmm:
        for verb in ("hello", "load", "resume"):
            upgrade = Meanwhile(vmm, tmp_path, verb)
            os.kill(upgrade.new, signal.SIGKILL)
            assert upgrade.code() == 1
            assert one_serves(vmm)["pid"] == upgrade.old
            goes_on(vmm)
        upgrade = Meanwhile(vmm, tmp_path, "load")
        os.kill(fleet(vmm)["zygote"]["pid"], signal.SIGKILL)
        done = vmm.remote("worker-upgrade", "_disk0")
        assert done.returncode == 1 and "_disk0 is being upgraded already" in done.stderr
        upgrade.go_on()
        assert upgrade.code() == 0
        upgraded(vmm, "_disk0")


@pytest.mark.parametrize("verb", ["hello", "load", "resume"])
def test_vmm_that_ends_meanwhile_leaves_nothing_behind(tmp_path: Path, verb: str) -> None:
    """conftest.py looks for what is left."""
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    with Vmm.guest(tmp_path, "mode=blkload", "--disk", f"path={tmp_path}/disk.raw") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        path = program(tmp_path, f"at_verb({verb!r}, 'wait')")
        request = vmm.start_remote("worker-upgrade", "_disk0", "--exec", path)
        poll(lambda: WAITS in vmm.errors)
        vmm.process.send_signal(signal.SIGTERM)
        assert vmm.wait() == 0
        assert request.wait(PATIENCE) == 1


@pytest.mark.parametrize("verb", ["load", "resume"])
def test_killed_controller_takes_both_with_it(tmp_path: Path, verb: str) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    with Vmm.guest(tmp_path, "mode=blkload", "--disk", f"path={tmp_path}/disk.raw") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        poll(lambda: "janitor" in fleet(vmm))
        path = program(tmp_path, f"at_verb({verb!r}, 'wait')")
        request = vmm.start_remote("worker-upgrade", "_disk0", "--exec", path)
        poll(lambda: WAITS in vmm.errors)
        vmm.process.kill()
        vmm.process.wait()
        assert request.wait(PATIENCE) == 1
        poll(lambda: vmm.api is not None and not vmm.api.exists())
