"""`flotilla doctor`: findings, limits, exit codes; and the whole of it on a host where the probe guest runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import pytest

from controller import doctor
from shared.errors import HostError
from tests.vmm import environment

RUN = "import sys; from controller.doctor import main; sys.exit(main(sys.argv[1:]))"


def test_error_of_a_check_is_a_fail_with_its_hint():
    def check():
        raise HostError("/dev/kvm: permission denied", "become a member of the group kvm")

    line = doctor.make("kvm", check, 10)
    assert (line.status, line.text) == (doctor.Status.FAIL, "/dev/kvm: permission denied")
    assert line.hint == "become a member of the group kvm"


def test_check_that_hangs_is_a_fail():
    release = threading.Event()
    try:
        line = doctor.make("kvm", lambda: release.wait() and doctor.ok(""), 0.05)
    finally:
        release.set()
    assert line.status is doctor.Status.FAIL and "no answer within" in line.text


def test_native_loop_that_was_never_built_is_a_fail_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.native, "ROOT", str(tmp_path))
    line = doctor.make("native loops", doctor.check_native, 10)
    assert line.status is doctor.Status.FAIL
    assert "vcpu.so" in line.text and "deploy/setup.sh" in line.hint


def test_without_a_guest_the_later_checks_say_that_they_were_not_tried(tmp_path):
    trial = doctor.Trial(tmp_path)
    for check in (trial.disk, trial.vcpu_kill, trial.migrates):
        line = doctor.make("x", check, 10)
        assert (line.status, line.text) == (doctor.Status.FAIL, "not tried: the probe guest does not run")


def test_vcpu_process_that_is_being_replaced_is_waited_for(tmp_path, monkeypatch):
    """Its row's pid is 0 meanwhile, which to kill(2) is our own process group."""
    process = subprocess.Popen(["sleep", "1000"])
    pids = [0, process.pid, 0, 0, 7]

    class Guest:
        output = b""

        def ask(self, _):
            pid = pids.pop(0)
            return [{"kind": "vcpu", "pid": pid, "restarts": int(len(pids) < 3)}]

        def until(self, pattern, since):
            pids.append(7)

    monkeypatch.setattr(doctor, "pings", lambda guest: True)
    trial = doctor.Trial(tmp_path)
    trial._guests.append(Guest())
    found = trial.vcpu_kill()
    assert process.wait(30) == -signal.SIGKILL
    assert f"vCPU process {process.pid} was killed; 7 took over" in found.text


def test_unusable_runtime_directory_is_a_fail(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOTILLA_RUNTIME_DIR", str(tmp_path / "file"))
    line = doctor.make("runtime directory", doctor.check_runtime_dir, 10)
    assert line.status is doctor.Status.FAIL and line.hint == "set FLOTILLA_RUNTIME_DIR"


@pytest.mark.parametrize("name", ["python", "memfd", "namespaces"])
def test_check_of_the_host_ends_with_a_finding(name, tmp_path):
    check, seconds = next((c, s) for n, c, s in doctor.checks(doctor.Trial(tmp_path)) if n == name)
    line = doctor.make(name, check, seconds)
    assert line.status is not doctor.Status.FAIL and line.text


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--quick"], 2), (["--json", "--json"], 2)])
def test_words(words, code, capsys):
    assert doctor.main(words) == code
    said = capsys.readouterr()
    assert (said.err if code else said.out) == doctor.USAGE


def test_one_failed_check_makes_the_exit_code_1(monkeypatch, capsys):
    found = [("a", lambda: doctor.warn("lacking", "do this"), 10.0), ("b", lambda: doctor.fail("broken"), 10.0)]
    monkeypatch.setattr(doctor, "checks", lambda trial: found)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "warn  a" in out and "lacking (do this)" in out and "FAIL  b" in out and "can't run" in out
    monkeypatch.setattr(doctor, "checks", lambda trial: found[:1])
    assert doctor.main([]) == 0


@pytest.mark.probe
@pytest.mark.timeout(300)
def test_doctor_finds_this_host_usable():
    command = [sys.executable, "-c", RUN, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["usable"] is True
    status = {line["check"]: line["status"] for line in answer["checks"]}
    assert {status[name] for name in ("kvm", "probe guest", "disk", "vcpu kill", "local migration")} == {"ok"}
