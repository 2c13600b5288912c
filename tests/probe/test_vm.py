"""The whole VMM with the probe guest on /dev/kvm: machine, workers, lifecycle, kills."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios

import pytest

from tests.vmm import PROGRAM, REMOTE, SECONDS, Vmm, environment, poll, probe

pytestmark = pytest.mark.probe

DISK_SIZE = 16 << 20


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


def test_guest_power_off_ends_the_vmm_with_zero_and_its_sockets_are_gone(tmp_path):
    with Vmm.guest(tmp_path, "mode=acpi off") as vmm:
        assert vmm.wait() == 0
        assert b"acpi DSDT addr=0xa0024 len=4655 rev=6 sum=ok" in vmm.output
        assert b"done bad=0" in vmm.output
        assert not vmm.api.exists()


@pytest.mark.parametrize("how", ["", "reset=kbd"], ids=["acpi", "i8042"])
def test_guest_reset_boots_again_in_place(tmp_path, how):
    with Vmm.guest(tmp_path, f"mode=acpi reset {how}") as vmm:
        vmm.expect("probe: up.*probe: up.*probe: up".replace(".*", "(?s:.*)"))
        assert vmm.process.poll() is None


def test_guest_reset_on_a_host_without_descriptors_boots_when_there_are_some(tmp_path):
    with Vmm.guest(tmp_path, "mode=acpi reset") as vmm:
        vmm.expect("probe: up")
        vmm.wait_api()
        pid = vmm.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (24, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        poll(lambda: "the guest has reset itself and can't boot: " in vmm.errors)
        assert "Too many open files" in vmm.errors
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        vmm.more("probe: up")


def test_guest_reset_without_the_kernel_ends_the_vmm(tmp_path):
    """Nobody would put it there by waiting."""
    kernel = tmp_path / "kernel"
    shutil.copy(probe(), kernel)
    words = ["--kernel", str(kernel), "--cmdline", "mode=acpi reset", "--serial", "tty", "--console", "off"]
    with Vmm(tmp_path, *words, "--memory", "size=128M") as vmm:
        vmm.expect("probe: up")
        kernel.unlink()
        assert vmm.wait() == 1
        assert "the guest asked for a reset, which failed" in vmm.errors


def test_no_shutdown_keeps_the_vmm_and_info_says_created(tmp_path):
    with Vmm.guest(tmp_path, "mode=acpi off", "--no-shutdown") as vmm:
        vmm.expect("done bad=0")
        poll(lambda: vmm.ask("info")["state"] == "Created")
        before = len(vmm.output)
        vmm.ask("boot")
        vmm.expect("done bad=0", since=before)


def test_one_process_for_each_vcpu_disk_and_console(tmp_path, disk):
    arguments = ["--cpus", "boot=2", "--disk", f"path={disk}"]
    with Vmm.guest(tmp_path, "mode=equal cpus=2 ap=ram", *arguments) as vmm:
        vmm.expect("equal 1 ")
        vmm.wait_api()
        rows = vmm.fleet()
        kinds = sorted(row["kind"] for row in rows.values())
        assert kinds == ["api", "blk", "console", "controller", "janitor", "vcpu", "vcpu", "zygote"]
        assert len({row["pid"] for row in rows.values()}) == len(rows)
        assert rows["controller"]["pid"] == vmm.process.pid
        # One address space, shown once: the vCPU processes are the controller's.
        assert rows["controller"]["pss_kib"] > 0 and rows["zygote"]["pss_kib"] > 0
        assert [rows[f"vcpu{n}"]["pss_kib"] for n in range(2)] == [0, 0]


def test_exits_are_carried_out_exactly_once(tmp_path):
    with Vmm.guest(tmp_path, "mode=exits passes=300 off") as vmm:
        assert vmm.wait() == 0
        assert b"BAD" not in vmm.output and b"done bad=0" in vmm.output


def test_rng_and_pci_answer(tmp_path):
    with Vmm.guest(tmp_path, "mode=rng passes=2 off") as vmm:
        assert vmm.wait() == 0
        assert b"rng ok 2" in vmm.output


def test_blk_load_is_verified_and_counted(tmp_path, disk):
    with Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        counters = vmm.ask("counters")["_disk0"]
        assert counters["read_ops"] > 0 and counters["write_ops"] > 0
        assert b"BAD" not in vmm.output


def test_pause_stops_the_guest_and_resume_lets_it_go_on(tmp_path, disk):
    with Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        vmm.ask("pause")
        assert vmm.ask("info")["state"] == "Paused"
        assert vmm.remote("pause").returncode == 1
        before = vmm.ask("counters")
        assert vmm.ask("counters") == before
        vmm.ask("resume")
        vmm.more("blk ok ")
        assert b"BAD" not in vmm.output


@pytest.mark.timeout(300)
def test_a_hundred_random_kills_of_vcpu_and_blk_processes_lose_nothing(tmp_path, disk):
    """Kills are paced by the guest's own progress and by the fleet's answers, never by sleeping."""
    choice = random.Random(1)
    with Vmm.guest(tmp_path, "mode=blkload depth=8 lost_irq_ticks=100", "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        killed = {0}
        for number in range(100):
            device = choice.choice(["vcpu0", "_disk0"])
            # Not one that is dying of the last kill: that would be no kill at all.
            pid = poll(lambda device=device: {vmm.fleet().get(device, {}).get("pid", 0)} - killed).pop()
            killed.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # between the answer and the kill it was replaced
            if number % 20 == 19:
                vmm.more("blk ok ", 60)
        vmm.more("blk ok ", 60)
        vmm.more("blk ok ", 60)
        rows = vmm.fleet()
        assert rows["vcpu0"]["restarts"] + rows["_disk0"]["restarts"] >= 80
        assert b"BAD" not in vmm.output


def test_killed_zygote_is_replaced_when_it_is_needed(tmp_path):
    with Vmm.guest(tmp_path, "mode=rng") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        zygote, console = vmm.pid_of("zygote"), vmm.pid_of("console")
        os.kill(zygote, signal.SIGKILL)
        os.kill(console, signal.SIGKILL)
        row = poll(lambda: (now := vmm.fleet().get("zygote")) and now["pid"] != zygote and now)
        assert row["restarts"] == 1
        vmm.more("rng ok ")


@pytest.mark.parametrize("device", ["console", "janitor", "api"])
def test_killed_helper_process_comes_back_and_the_guest_goes_on(tmp_path, device):
    with Vmm.guest(tmp_path, "mode=rng") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        pid = vmm.pid_of(device)
        os.kill(pid, signal.SIGKILL)
        poll(lambda: (now := vmm.fleet().get(device)) and now["pid"] not in (0, pid))
        vmm.more("rng ok ")


def test_killed_controller_leaves_nothing_behind(tmp_path, disk):
    """The leak check of conftest finds processes and shared memory; sockets are looked for here."""
    with Vmm.guest(tmp_path, "mode=equal", "--disk", f"path={disk}") as vmm:
        vmm.expect("equal 1 ")
        vmm.wait_api()
        poll(lambda: "janitor" in vmm.fleet())
        vmm.process.kill()
        vmm.process.wait()
        poll(lambda: not vmm.api.exists())


def test_sigterm_ends_with_zero(tmp_path):
    with Vmm.guest(tmp_path, "mode=tick") as vmm:
        vmm.expect("tick [01] ")
        vmm.process.send_signal(signal.SIGTERM)
        assert vmm.wait() == 0


def test_create_boot_delete_through_the_api(tmp_path):
    with Vmm(tmp_path) as vmm:
        vmm.wait_api()
        config = tmp_path / "vm.json"
        body = {
            "payload": {"kernel": probe(), "cmdline": "mode=tick"},
            "memory": {"size": 128 << 20},
            "serial": {"mode": "Tty"},
            "console": {"mode": "Off"},
        }
        config.write_text(json.dumps(body))
        assert vmm.remote("info").returncode == 1
        vmm.ask("create", str(config))
        again = vmm.remote("create", str(config))
        assert again.returncode == 1 and "already created" in again.stderr
        assert vmm.ask("info")["state"] == "Created"
        vmm.ask("boot")
        vmm.expect("tick [01] ")
        before = len(vmm.output)
        vmm.ask("reboot")
        vmm.expect(r"probe: up(?s:.*)tick \d", since=before)
        vmm.ask("delete")
        assert vmm.remote("info").returncode == 1
        assert vmm.ask("ping")["version"]


def test_terminal_is_as_it_was_when_the_vm_can_not_be_made(tmp_path):
    """The terminal is made raw before /dev/kvm is opened; here /dev/kvm is a device that is no KVM."""
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    script = 'mount --bind /dev/null /dev/kvm && exec "$@"'
    program = [sys.executable, "-c", PROGRAM, "--kernel", probe(), "--serial", "tty", "--console", "off"]
    command = ["setsid", "--ctty", "--wait", "unshare", "--mount", "sh", "-c", script, "sh", *program]
    try:
        done = subprocess.run(
            command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, text=True, timeout=30, env=environment(),
            cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "/dev/kvm" in done.stderr
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def test_killed_controller_gives_the_terminal_its_settings_back(tmp_path):
    """Also that of a VM of the command line, whose terminal is raw before there is a janitor."""
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    api = tmp_path / "api"
    program = [sys.executable, "-c", PROGRAM, "--kernel", probe(), "--serial", "tty", "--console", "off"]
    program += ["--cmdline", "mode=rng", "--api-socket", str(api)]
    try:
        vmm = subprocess.Popen(
            ["setsid", "--ctty", *program], stdin=slave, stdout=slave, env=environment(), cwd=tmp_path
        )
        poll(lambda: termios.tcgetattr(slave) != before)
        poll(lambda: b"janitor" in _fleet(api))
        vmm.kill()
        vmm.wait()
        poll(lambda: termios.tcgetattr(slave) == before)
        poll(lambda: not api.exists())
    finally:
        os.close(master)
        os.close(slave)


# A controller that is killed in the moment in which its first worker exists.
KILLED_AT_ONCE = """
import os, signal, sys
from controller.fleet import Fleet
from controller.main import main
adopt = Fleet.adopt
def adopt_and_end(fleet, kind, *rest):
    process = adopt(fleet, kind, *rest)
    if kind in ("blk", "console"):
        os.kill(os.getpid(), signal.SIGKILL)
    return process
Fleet.adopt = adopt_and_end
sys.exit(main())
"""


def test_controller_killed_as_soon_as_there_is_a_worker_leaves_nothing_behind(tmp_path, disk, runtime_folder):
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    names = [tmp_path / name for name in ("api", "api.lock", "console")]
    program = [sys.executable, "-c", KILLED_AT_ONCE, "--kernel", probe(), "--cmdline", "mode=rng"]
    program += ["--serial", "tty", "--console", f"socket={names[2]}", "--disk", f"path={disk}"]
    try:
        vmm = subprocess.Popen(
            ["setsid", "--ctty", *program, "--api-socket", str(names[0])], stdin=slave, stdout=slave,
            env=environment(), cwd=tmp_path,
        )  # fmt: skip
        assert vmm.wait(SECONDS) == -signal.SIGKILL
        poll(lambda: not any(name.exists() for name in names))
        poll(lambda: termios.tcgetattr(slave) == before)
        poll(lambda: not (runtime_folder / "flotilla").exists())
    finally:
        os.close(master)
        os.close(slave)


def _fleet(api) -> bytes:
    command = [sys.executable, "-c", REMOTE, "--api-socket", str(api), "fleet"]
    return subprocess.run(command, capture_output=True, env=environment(), check=False).stdout
