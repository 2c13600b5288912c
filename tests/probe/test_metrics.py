"""--metrics and --metrics-socket through the real program: what a scrape tells of a guest under load, and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metrics_exporter.catalogue import CATALOGUE
from tests.network import free_port
from tests.probe.requests import SECONDS, goes_on
from tests.prometheus import at, connect, fetch, scrape, total, until
from tests.vmm import PROGRAM, Vmm, environment, poll, probe

pytestmark = pytest.mark.probe

LATENCY = "flotilla_device_latency_seconds"


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(16 << 20))
    return path


@pytest.mark.parametrize("how", ["port", "socket"])
def test_counters_rise_under_load_and_fit_together(tmp_path: Path, disk: Path, port: int, how: str) -> None:
    target: int | Path = port if how == "port" else tmp_path / "figures"
    flag = f"--metrics=127.0.0.1:{port}" if how == "port" else f"--metrics-socket={target}"
    words = "mode=blkload depth=8 cpus=2 ap=exits"
    with Vmm.guest(tmp_path, words, "--cpus", "boot=2", "--disk", f"path={disk}", flag) as vmm:
        vmm.expect("blk ok ")
        first = until(target, lambda found: total(found, "device_operations_total", device="_disk0"))
        vmm.more("blk ok ")
        ops = at(first, "device_operations_total", device="_disk0", operation="write") or 0
        again = until(
            target, lambda f: (at(f, "device_operations_total", device="_disk0", operation="write") or 0) > ops
        )
        assert b"BAD" not in vmm.output
        restarts = {"process": "_disk0", "kind": "blk"}
        assert at(again, "process_restarts_total", **restarts) == 0
    for found in (first, again):
        assert {name for name, _ in found} <= {
            *(m.name for m in CATALOGUE), *(f"{LATENCY}_{part}" for part in ("bucket", "sum", "count"))
        }  # fmt: skip
        for operation in ("read", "write", "flush"):
            labels = {"device": "_disk0", "operation": operation}
            assert at(found, "device_latency_seconds_count", **labels) == at(found, "device_operations_total", **labels)
            assert at(found, "device_latency_seconds_bucket", **labels, le="+Inf") == at(
                found, "device_operations_total", **labels
            )
        assert at(found, "vm_state", state="Running") == 1
        assert at(found, "kvm_stats_available") == 1
        assert (at(found, "process_pss_bytes", process="controller", kind="controller") or 0) > 1 << 20
        assert (at(found, "process_pss_bytes", process="metrics", kind="metrics") or 0) > 1 << 20
    rising = [
        ("device_bytes_total", {"device": "_disk0", "operation": "write"}),
        ("device_latency_seconds_sum", {"device": "_disk0", "operation": "write"}),
        ("device_interrupts_total", {"device": "_disk0"}),
        ("vcpu_exits_total", {"vcpu": "vcpu1", "reason": "io", "finished_by": "controller"}),
        ("vcpu_exits_total", {"vcpu": "vcpu1", "reason": "io", "finished_by": "vcpu"}),
        ("kvm_vcpu_stat_total", {"vcpu": "vcpu1", "stat": "exits", "unit": ""}),
    ]
    for name, labels in rising:
        assert (at(again, name, **labels) or 0) > (at(first, name, **labels) or 0) > 0, (name, labels)
    cpu = [total(found, "process_cpu_seconds_total", kind="vcpu") for found in (first, again)]
    assert cpu[1] >= cpu[0] > 0


def test_killed_exporter_comes_back_on_the_same_port_and_the_guest_goes_on(tmp_path: Path, port: int) -> None:
    with Vmm.guest(tmp_path, "mode=tick", "--metrics", f"127.0.0.1:{port}") as vmm:
        vmm.wait_api()
        assert at(scrape(port), "process_restarts_total", process="metrics", kind="metrics") == 0
        pid = vmm.pid_of("metrics")
        os.kill(pid, signal.SIGKILL)
        # Not refused: the port is the controller's.
        assert at(scrape(port), "process_restarts_total", process="metrics", kind="metrics") == 1
        assert vmm.pid_of("metrics") != pid
        goes_on(vmm)


def test_killed_worker_and_vcpu_are_counted(tmp_path: Path, disk: Path, port: int) -> None:
    arguments = ["--disk", f"path={disk}", "--metrics", f"127.0.0.1:{port}"]
    with Vmm.guest(tmp_path, "mode=blkload depth=8 lost_irq_ticks=100", *arguments) as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        before = until(port, lambda found: total(found, "vcpu_exits_total", vcpu="vcpu0"))
        for device in ("_disk0", "vcpu0"):
            os.kill(vmm.pid_of(device), signal.SIGKILL)
        found = until(
            port,
            lambda f: at(f, "process_restarts_total", process="_disk0", kind="blk") == 1
            and at(f, "process_restarts_total", process="vcpu0", kind="vcpu") == 1
            and at(f, "device_worker_up", device="_disk0") == 1,
        )
        for labels in ({"process": "_disk0", "kind": "blk"}, {"process": "vcpu0", "kind": "vcpu"}):
            assert at(found, "process_losses_total", **labels, cause="ended") == 1
            assert at(found, "process_losses_total", **labels, cause="hung") == 0
            assert at(found, "process_quarantines_total", **labels) == 0
        assert total(found, "vcpu_exits_total", vcpu="vcpu0") >= total(before, "vcpu_exits_total", vcpu="vcpu0")
        vmm.more("blk ok ")
        assert b"BAD" not in vmm.output


def test_other_paths_and_stubborn_clients_harm_neither_figures_nor_guest(tmp_path: Path, port: int) -> None:
    with Vmm.guest(tmp_path, "mode=tick", "--metrics", f"127.0.0.1:{port}") as vmm:
        vmm.expect("tick")
        vmm.wait_api()
        assert fetch(port, "/api/v1/vmm.ping")[0] == 404
        stubborn = [connect(port) for _ in range(100)]
        for number, sock in enumerate(stubborn):
            try:
                sock.sendall(b"GET /metrics HT" if number % 2 else bytes(4096))
            except ConnectionError:
                pass  # dropped already
        assert scrape(port)
        for sock in stubborn:
            sock.close()
        goes_on(vmm)


def test_a_vmm_without_a_vm_has_figures_of_its_processes(tmp_path: Path, port: int) -> None:
    with Vmm(tmp_path, "--metrics", f"127.0.0.1:{port}") as vmm:
        vmm.wait_api()
        found = scrape(port)
        assert at(found, "process_state", process="controller", kind="controller", state="running") == 1
        assert at(found, "kvm_stats_available") == 0
        assert not [name for name, _ in found if "vm_state" in name or "device" in name]
        assert vmm.process.poll() is None


def test_paused_and_rebooted_vm(tmp_path: Path, port: int) -> None:
    with Vmm.guest(tmp_path, "mode=tick", "--metrics", f"127.0.0.1:{port}") as vmm:
        vmm.expect("tick")
        vmm.wait_api()
        vmm.ask("pause")
        until(port, lambda found: at(found, "vm_state", state="Paused") == 1)
        vmm.ask("resume")
        vmm.ask("reboot")
        found = until(port, lambda found: at(found, "vm_state", state="Running") == 1)
        assert at(found, "kvm_stats_available") == 1
        goes_on(vmm)


def test_migration_is_told_at_the_source(tmp_path: Path, port: int) -> None:
    """One that fails: the source of a good one ends."""
    with Vmm.guest(tmp_path, "mode=tick", "--metrics", f"127.0.0.1:{port}") as vmm:
        vmm.wait_api()
        assert at(scrape(port), "migration_state", state="none") == 1
        assert vmm.remote("send-migration", f"unix:{tmp_path}/nobody").returncode == 1
        found = until(port, lambda found: at(found, "migration_state", state="failed") == 1)
        assert at(found, "migration_phase", direction="send", phase="failed") == 1
        assert (at(found, "migration_duration_seconds") or 0) > 0
        goes_on(vmm)


def test_without_the_flags_there_is_no_exporter(tmp_path: Path) -> None:
    with Vmm.guest(tmp_path, "mode=tick") as vmm:
        vmm.wait_api()
        assert "metrics" not in {row["kind"] for row in vmm.fleet().values()}


def test_the_end_leaves_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    with Vmm.guest(tmp_path, "mode=tick", "--metrics-socket", str(path)) as vmm:
        vmm.expect("tick")
        assert scrape(path)
        assert path.stat().st_mode & 0o777 == 0o600
        vmm.process.send_signal(signal.SIGTERM)
        assert vmm.wait() == 0
    assert not path.exists() and not Path(f"{path}.lock").exists()


def test_killed_controller_leaves_no_socket_and_no_exporter(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    with Vmm.guest(tmp_path, "mode=tick", "--metrics-socket", str(path)) as vmm:
        vmm.wait_api()
        assert scrape(path)
        poll(lambda: "janitor" in vmm.fleet())
        vmm.process.kill()
        vmm.process.wait()
        poll(lambda: not path.exists() and not Path(f"{path}.lock").exists())


# Bad input --------------------------------------------------------------------------------------------------------


def refused(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", PROGRAM, "--kernel", probe(), "--serial", "null", "--console", "off", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=environment(), stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("address", ["9100", "localhost:9100", "127.0.0.1:65536", "0.0.0.0:9100"])
def test_bad_address(address: str) -> None:
    code, errors = refused("--metrics", address)
    assert code == 1 and f"--metrics {address}" in errors


def test_both_flags_at_once(tmp_path: Path) -> None:
    code, errors = refused("--metrics", "127.0.0.1:9100", "--metrics-socket", str(tmp_path / "figures"))
    assert code == 2 and "'--metrics <ADDRESS>' cannot be used with '--metrics-socket <PATH>'" in errors


def test_port_that_another_vmm_has(tmp_path: Path, port: int) -> None:
    with Vmm.guest(tmp_path, "mode=tick", "--metrics", f"127.0.0.1:{port}") as vmm:
        vmm.expect("tick")
        code, errors = refused("--metrics", f"127.0.0.1:{port}")
        assert code == 1 and f"--metrics 127.0.0.1:{port}: Address already in use" in errors
        assert scrape(port)
        vmm.more("tick")


def test_socket_path_that_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    path.write_text("precious")
    code, errors = refused("--metrics-socket", str(path))
    assert code == 1 and f"--metrics-socket {path}: the path exists and is not a socket" in errors
    assert path.read_text() == "precious"


def test_socket_that_another_vmm_has(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    with Vmm.guest(tmp_path, "mode=tick", "--metrics-socket", str(path)) as vmm:
        vmm.expect("tick")
        code, errors = refused("--metrics-socket", str(path))
        assert code == 1 and f"Metrics socket {path} is already in use by another running instance" in errors
        assert scrape(path)


def test_metrics_socket_where_the_api_socket_is(tmp_path: Path) -> None:
    path = tmp_path / "one"
    code, errors = refused("--api-socket", str(path), "--metrics-socket", str(path))
    assert code == 1 and f"Metrics socket {path} is already in use" in errors
    assert not path.exists()
