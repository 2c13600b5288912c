"""`--cgroup`: a cgroup for each process, gone with the VMM however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from controller import cgroups
from tests.other_worker import program
from tests.probe.test_sandbox import kept
from tests.vmm import PROGRAM, Vmm, environment, poll

pytestmark = pytest.mark.probe


def hierarchy() -> Path | None:
    """Where cgroup v2 is mounted and may be written, if anywhere."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path = line.split()[4]
        if " - cgroup2 " in line and os.access(path, os.W_OK):
            return Path(path)
    return None


BASE = hierarchy()
needs_cgroups = pytest.mark.skipif(BASE is None, reason="no cgroup v2 hierarchy that this run may write")


@pytest.fixture
def base():
    assert BASE is not None
    path = BASE / f"test-{os.getpid()}"
    path.mkdir()
    yield path
    left = [entry.name for entry in path.iterdir() if entry.is_dir()]
    poll(lambda: cgroups.remove(str(path)) or not path.exists())  # the janitor was in it until a moment ago
    assert left == []


def own(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line[3:] for line in lines if line.startswith("0::"))


@needs_cgroups
def test_each_process_has_its_own_and_a_clean_end_removes_them(tmp_path, base):
    with Vmm.guest(tmp_path, "mode=rng", "--cgroup", str(base)) as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        kinds = ("vcpu", "api", "janitor", "console")
        rows = kept(vmm, kinds)
        inside = {name: row for name, row in rows.items() if row["kind"] != "janitor"}
        for name, row in inside.items():
            assert row["cgroup"] == own(row["pid"]) and row["cgroup"].endswith(
                f"/{base.name}/flotilla-{vmm.process.pid}/{name}"
            )
        assert rows["janitor"]["cgroup"].endswith(f"/{base.name}")
        os.kill(rows["vcpu0"]["pid"], signal.SIGKILL)
        os.kill(rows["console"]["pid"], signal.SIGKILL)
        vmm.more("rng ok ")
        again = kept(vmm, kinds)
        for name in ("vcpu0", "console"):
            assert again[name]["pid"] != rows[name]["pid"] and again[name]["cgroup"] == rows[name]["cgroup"]
        vmm.ask("shutdown-vmm")
        assert vmm.wait() == 0
        assert not (base / f"flotilla-{vmm.process.pid}").exists()


@needs_cgroups
@pytest.mark.parametrize("seccomp", ["true", "false"])
def test_worker_that_takes_over_is_where_the_last_one_was(tmp_path, base, seccomp):
    """With what the user has set there; its own is gone, also that of one which failed."""
    with Vmm.guest(tmp_path, "mode=rng", "--cgroup", str(base), "--seccomp", seccomp) as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        mine = base / f"flotilla-{vmm.process.pid}"
        poll(lambda: (mine / "console").is_dir())
        number = (mine / "console").stat().st_ino
        for words in ((), ("--exec", program(tmp_path)), ("--exec", "/bin/false")):
            assert vmm.remote("worker-upgrade", "console", *words).returncode == ("/bin/false" in words)
            assert own(vmm.pid_of("console")).endswith(f"/{mine.name}/console")
            assert (mine / "console").stat().st_ino == number
            assert not {"console.new", "console.old"} & {entry.name for entry in mine.iterdir()}
        vmm.more("rng ok ")


@needs_cgroups
def test_the_janitor_removes_them_after_a_kill(tmp_path, base):
    with Vmm.guest(tmp_path, "mode=rng", "--cgroup", str(base)) as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        kept(vmm, ("vcpu", "api", "janitor"))
        folder = base / f"flotilla-{vmm.process.pid}"
        assert folder.is_dir()
        vmm.process.kill()
        vmm.process.wait()
        poll(lambda: not folder.exists())


@needs_cgroups
def test_the_next_start_removes_what_is_left_of_a_vmm_without_a_janitor(base):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (base / f"flotilla-{process.pid}" / "vcpu0").mkdir(parents=True)
    before = own(os.getpid())
    made = cgroups.Cgroups(str(base))
    try:
        assert [entry.name for entry in base.iterdir() if entry.is_dir()] == [f"flotilla-{os.getpid()}"]
        assert own(os.getpid()).endswith("/controller")
    finally:
        made.close()
        assert BASE is not None
        Path(BASE / before.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))


@pytest.mark.parametrize("wrong", ["/proc", "/nowhere/at/all", "/etc/passwd", "."])
def test_a_directory_that_is_none_is_refused_by_name(tmp_path, wrong):
    command = [sys.executable, "-c", PROGRAM, "--api-socket", str(tmp_path / "api"), "--cgroup", wrong]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"--cgroup {wrong}: not a directory of a cgroup v2 hierarchy" in done.stderr
    assert not (tmp_path / "api").exists()
