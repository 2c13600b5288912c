"""Golden state of a VM (vCPUs, platform, functions, its workers' states): every version that this release reads loads
into a VM on /dev/kvm, and what that saves is what it was given; what a VM saves that has run has the present version's
shape. The workers' states in it have versions of their own, and shapes of their own in tests/test_golden_states.py.

In this process. The guest has two vCPUs and drives a disk, a console, a random number generator and a network device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.assembly import VmContext
from controller.config.cli import Seccomp
from controller.config.codec import from_json
from controller.config.identity import assign_ids
from controller.events import EventMonitor
from controller.leavings import Leavings
from controller.machine import layout as lo
from controller.machine.cpuid import CpuidEntry, common_cpuid
from controller.machine.hostcpu import host_phys_bits
from controller.vm import Vm
from shared.kvm import Kvm
from shared.linux import memfd
from shared.memory import MEMFD_NAME, spans
from shared.reactor import sleep
from shared.state_versions import KINDS, VM
from tests.controller.processes import SECONDS, running
from tests.golden_states import explain, on_the_wire, read, record
from tests.netns import network_namespace
from tests.vmm import probe

pytestmark = [pytest.mark.probe, pytest.mark.timeout(120)]

RAM = 64 << 20
PHYS_BITS = 40  # where the BARs are must not depend on the host
CONFIG = {
    "payload": {"kernel": "probe.elf", "cmdline": "mode=equal,rng,console,net cpus=2 ap=ram ap.mb=8"},
    "memory": {"size": RAM},
    "cpus": {"boot_vcpus": 2, "max_vcpus": 2, "max_phys_bits": PHYS_BITS},
    "disks": [{"path": "disk.raw"}],
    "net": [{"ip": "192.168.249.1", "mac": "12:34:56:78:90:ab"}],
    "rng": {"src": "/dev/urandom"},
    "serial": {"mode": "File", "file": "serial"},
    "console": {"mode": "File", "file": "console"},
}
DONE = (b"equal 1 ", b"rng ok ", b"console ok ", b"net open ")
PERHAPS = {"tsc_khz": 0, "nested_state": b""}  # None on a host without
MSR_IA32_TSC = 0x10
APIC_IRR, APIC_TMCCT = 0x200, 0x390
# Of an XSAVE area; kernel: struct _fpx_sw_bytes.
SOFTWARE, XSTATE_BV, PKRU = slice(464, 512), slice(512, 520), 1 << 9


class Rig:
    def __init__(self, reactor: Any, fleet: Any) -> None:
        self.reactor = reactor
        self.context = VmContext(reactor, fleet, EventMonitor(0.0), lambda _event: None, Seccomp.TRAP, Leavings())
        Path("disk.raw").write_bytes(bytes(range(256)) * 4096)
        Path("probe.elf").symlink_to(probe())
        self.vm: Vm | None = None

    def run(self, awaitable: Any) -> Any:
        return self.reactor.run_until(awaitable, SECONDS)

    def save(self) -> dict[str, Any]:
        assert self.vm is not None
        saved: dict[str, Any] = on_the_wire(self.run(self.vm.save()))
        return saved

    def boot(self) -> None:
        """Until the guest has used every device; then it is paused."""
        self.vm = vm = self.run(Vm.boot(self.context, assign_ids(from_json(CONFIG, strict=True))))

        async def until_done() -> None:
            while not all(line in Path("serial").read_bytes() for line in DONE):
                await sleep(self.reactor, 0.02)

        self.run(until_done())
        self.run(vm.pause())

    def build(self, golden: dict[str, Any]) -> Vm:
        """As for a VM that arrives; its CPUID is this host's, and its RAM is empty: nothing of it runs here."""
        parts = [(gpa, size, 0, slot) for slot, (gpa, size) in enumerate(spans(RAM))]
        info = {"cpuid": host_cpuid(), "device_tree": golden["device_tree"]}
        ram = [memfd(MEMFD_NAME, size) for _, size, _, _ in parts]
        vm: Vm = self.run(Vm.build_incoming(self.context, golden["config"], parts, ram, {}, {}, info))
        self.vm = vm
        return vm


def host_cpuid() -> list[list[int]]:
    kvm = Kvm()
    try:
        layout = lo.compute(RAM, host_phys_bits(), PHYS_BITS)
        names = CpuidEntry._fields
        supported = [CpuidEntry(*(getattr(entry, name) for name in names)) for entry in kvm.supported_cpuid()]
        return [list(entry) for entry in common_cpuid(supported, layout.phys_bits)]
    finally:
        kvm.close()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.chdir(tmp_path)
    with network_namespace(), running(str(tmp_path)) as (reactor, fleet):
        made = Rig(reactor, fleet)
        yield made
        if made.vm is not None:
            made.run(made.vm.destroy())


def test_what_a_vm_saves_has_the_shape_of_its_version(rig: Rig) -> None:
    rig.boot()
    assert rig.vm is not None
    saved = rig.save()
    record(VM, {"kind": VM.name, "version": VM.version, "config": rig.vm.config_json(),
                "device_tree": rig.vm.device_tree(), "state": saved})  # fmt: skip
    golden = read(VM, VM.version)["state"]
    for vcpu in (*saved["vcpus"], *golden["vcpus"]):
        assert set(PERHAPS) <= set(vcpu)
        vcpu.update(PERHAPS)
    for worker in workers(saved) + workers(golden):
        worker["state"] = {}
    assert not (why := explain(VM, saved, golden)), why


def workers(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [state["console_worker"], *state["net_workers"].values()]


@pytest.mark.parametrize("version", range(VM.oldest, VM.version + 1))
def test_golden_state_loads_into_a_vm_and_is_what_that_saves(rig: Rig, version: int) -> None:
    golden = read(VM, version)
    vm = rig.build(golden)
    rig.run(vm.load(golden["state"]))
    saved, wanted = rig.save(), VM.upgrade(version, golden["state"])
    for state in (saved, wanted):
        assert state["platform"]["pm_timer"]["flotilla"].pop("elapsed_ns") > 0
    for ours, theirs in zip(saved.pop("vcpus"), wanted.pop("vcpus"), strict=True):
        same_vcpu(ours, theirs)
    for worker in workers(wanted):
        kind = KINDS[worker["kind"]]
        worker["state"] = kind.upgrade(worker["version"], worker["state"])
        worker["version"] = kind.version
    assert saved == wanted


def same_vcpu(saved: dict[str, Any], golden: dict[str, Any]) -> None:
    """But for its clocks, which go on, and for what this host lacks or has beyond the other."""
    for vcpu in (saved, golden):
        vcpu["lapic_state"] = lapic_at_rest(vcpu["lapic_state"])
        vcpu["msrs"] = dict(vcpu["msrs"])
        del vcpu["msrs"][MSR_IA32_TSC]
        del vcpu["nested_state"]
    msrs = saved["msrs"].keys() & golden["msrs"].keys()
    assert len(msrs) > 10
    for vcpu in (saved, golden):
        vcpu["msrs"] = {index: vcpu["msrs"][index] for index in msrs}
    size = min(len(saved["xsave"]), len(golden["xsave"]))
    assert of_the_guest(saved.pop("xsave")[:size]) == of_the_guest(golden.pop("xsave")[:size])
    assert saved == golden


def of_the_guest(area: bytes) -> bytes:
    """Without what the host's kernel writes about itself: its software bytes, and that PKRU is present."""
    components = int.from_bytes(area[XSTATE_BV], "little") & ~PKRU
    return area[: SOFTWARE.start] + components.to_bytes(8, "little") + area[XSTATE_BV.stop :]


def lapic_at_rest(registers: bytes) -> bytes:
    """Without the timer's present count and the requests that it makes."""
    moving = [*range(APIC_IRR, APIC_IRR + 0x80), *range(APIC_TMCCT, APIC_TMCCT + 4)]
    return bytes(0 if at in moving else byte for at, byte in enumerate(registers))
