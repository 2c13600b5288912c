"""Faults injected into a running VM by ch-remote: each kind, with the guest's data verified, and what is refused."""

from __future__ import annotations

import pytest

from tests.netns import network_namespace
from tests.probe.net.rig import HOST
from tests.probe.test_chaos import chaos
from tests.vmm import Vmm, poll

pytestmark = [pytest.mark.probe, pytest.mark.timeout(300)]


@pytest.fixture
def vmm(tmp_path):
    """A guest with a disk, a card and a console. It finds lost interrupts late, not never: a killed worker owes them
    until it is replaced."""
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    devices = ["--disk", f"path={tmp_path}/disk.raw", "--net", f"ip={HOST}", "--console", f"file={tmp_path}/console"]
    devices += ["--metrics-socket", f"{tmp_path}/metrics"]
    words = "mode=blkload,net,rng depth=8 rng.every_ms=20 hz=2 lost_irq_ticks=20 report_ms=200"
    with network_namespace(), Vmm.guest(tmp_path, words, *devices, "--allow-fault-injection") as made:
        made.expect("blk ok ")
        made.wait_api()
        poll(lambda: {row["kind"] for row in made.fleet().values()} >= {"janitor", "console", "net", "blk", "metrics"})
        yield made
        made.more("blk ok ", 60)
        made.more("rng ok ", 60)
        assert b"BAD" not in made.output


def replaced(vmm: Vmm, name: str, pid: int) -> bool:
    row = vmm.fleet().get(name)
    return row is not None and row["pid"] not in (0, pid) and row["state"] == "running"


@pytest.mark.parametrize(
    "fault",
    [
        "process=_disk0,fault=kill",
        "process=_disk0,fault=kill,request=3,step=published",
        "process=_disk0,fault=kill,message=stats",
        "process=_disk0,fault=corrupt-protocol",
        "process=_disk0,fault=out-of-memory",
        "process=_net1,fault=kill",
        "process=_net1,fault=corrupt-protocol",
        "process=_net1,fault=out-of-memory",
        "process=console,fault=kill",
        "process=console,fault=corrupt-protocol",
        "process=console,fault=out-of-memory",
        "process=api,fault=kill",
        "process=janitor,fault=kill",
        "process=metrics,fault=kill",
        "process=vcpu0,fault=kill",
    ],
)
def test_who_is_made_to_end_is_replaced(vmm, fault):
    struck = vmm.ask("fault-inject", fault)
    if "message=stats" in fault:
        vmm.remote("counters")
    poll(lambda: vmm.remote("ping").returncode == 0)
    poll(lambda: replaced(vmm, struck["process"], struck["pid"]))


@pytest.mark.parametrize(
    "fault",
    [
        "process=vcpu0,fault=stop,duration_ms=200",
        "process=_disk0,fault=stop,duration_ms=200",
        "process=_disk0,fault=hang,duration_ms=200",
        "process=_net1,fault=hang,duration_ms=200",
        "process=console,fault=hang,duration_ms=200",
        "process=_disk0,fault=slow,value=5,spread=3,shape=normal,count=50",
        "process=_disk0,fault=slow,value=5,spread=3,shape=uniform,request=10,duration_ms=300",
        "process=_net1,fault=slow,value=1,duration_ms=200",
        "process=console,fault=slow,value=1,duration_ms=200",
        "process=_disk0,fault=duplicate-notification,count=20",
        "process=_net1,fault=duplicate-notification,count=20",
        "process=_disk0,fault=corrupt-protocol,value=control",
        "process=zygote,fault=stop,duration_ms=100",
    ],
)
def test_what_passes_leaves_the_guest_going_on(vmm, fault):
    vmm.ask("fault-inject", fault)
    vmm.more("blk ok ", 60)


def test_an_out_of_memory_death_says_so(vmm):
    vmm.ask("fault-inject", "process=_disk0,fault=out-of-memory")
    poll(lambda: "out of memory: an allocation failed" in vmm.errors)


def test_without_the_flag_it_is_refused_and_named(tmp_path):
    with Vmm.guest(tmp_path, "mode=rng") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        before = vmm.fleet().keys()
        done = vmm.remote("fault-inject", "process=vcpu0,fault=kill")
        assert done.returncode == 1 and "--allow-fault-injection" in done.stderr
        campaign = chaos(vmm, "--count", "1")
        assert campaign.returncode == 1 and "--allow-fault-injection" in campaign.stderr
        assert vmm.fleet().keys() == before
        vmm.more("rng ok ")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("process=_disk9,fault=kill", "there is no _disk9 (there are: _disk0"),
        ("process=_disk0,fault=explode", "unknown fault 'explode'"),
        ("process=_disk0,fault=kill,state=asleep", "unknown state 'asleep'"),
        ("process=vcpu0,fault=error", "error makes no sense for a vcpu process"),
        ("process=migration,fault=kill", "there is no migration process now"),
    ],
)
def test_what_is_refused_harms_nobody(vmm, argument, message):
    before = {name: row["pid"] for name, row in vmm.fleet().items()}
    done = vmm.remote("fault-inject", argument)
    assert done.returncode == 1 and message in done.stderr
    assert {name: row["pid"] for name, row in vmm.fleet().items()} == before


def test_chaos_without_a_vm_is_told(tmp_path):
    with Vmm(tmp_path, "--allow-fault-injection") as vmm:
        vmm.wait_api()
        done = chaos(vmm, "--count", "1")
        assert done.returncode == 1 and "no VM to play with" in done.stderr and "VM is not created" in done.stderr


def test_chaos_ends_at_the_first_lost_byte(vmm):
    done = chaos(vmm, "--count", "5", "--kinds", "kill", "--processes", "vcpu", "--verify-every", "2",
                 "--verify-command", "echo sector 7 is gone; false")  # fmt: skip
    assert done.returncode == 1 and "data lost" in done.stdout and "sector 7 is gone" in done.stdout
    assert "vcpu     2         2" in done.stdout
