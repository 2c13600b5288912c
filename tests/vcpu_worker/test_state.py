"""vcpu_worker.state and ch_form: a guest goes on in another VM, and what a state must and may have."""

from __future__ import annotations

import copy
import errno
import json
from typing import Any

import pytest

from shared import kvm
from shared.errors import ProtocolError
from tests.vcpu_worker.rig import ALL_EXITS, Rig, rig
from vcpu_worker import state as vcpu_state
from vcpu_worker.ch_form import from_ch, to_ch
from vcpu_worker.state import (
    MSR_IA32_TSC,
    MSR_IA32_TSC_DEADLINE,
    VcpuCodec,
    _restore_order,
    share_tsc_offset,
)

pytestmark = pytest.mark.probe

LVT_TIMER = 0x320


def paused(machine: Rig, rounds: int) -> None:
    machine.run_until(lambda: len(machine.devices.echoes[0]) >= rounds)
    machine.pause()


def hand_over_devices(source: Rig, target: Rig) -> None:
    """RAM, toy devices, latch: what is not the vCPUs'."""
    for region in source.memory.regions:
        target.memory.write(region.gpa, source.memory.read(region.gpa, region.size))
    target.devices = source.devices
    target.output = source.output + source.pages.uart.drain()
    target.pages.pci.set_address(source.pages.pci.latch & 0xFFFF_FFFF)


def cpuid_of(machine: Rig) -> list[list[int]]:
    names = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
    return [[getattr(entry, name) for name in names] for entry in machine.kvm.supported_cpuid()]


@pytest.mark.parametrize("form", ["own", "cloud-hypervisor"])
def test_a_guest_goes_on_in_another_vm(form: str) -> None:
    with rig(ALL_EXITS) as source, rig(ALL_EXITS, started=False) as target:
        paused(source, 20)
        state = VcpuCodec(source.vm).save(source.vcpus[0].fd)
        if form == "cloud-hypervisor":
            state, _ = from_ch(json.loads(json.dumps(to_ch(state, cpuid_of(source)))))
        hand_over_devices(source, target)
        assert VcpuCodec(target.vm).load(target.vcpus[0].fd, state) == []
        rounds = len(target.devices.echoes[0])
        target.vcpus[0].spawn()
        target.run_until(lambda: len(target.devices.echoes[0]) > rounds + 20)
        target.check()


def test_what_was_loaded_is_what_is_saved() -> None:
    with rig(ALL_EXITS) as source, rig(ALL_EXITS, started=False) as target:
        paused(source, 3)
        state = VcpuCodec(source.vm).save(source.vcpus[0].fd)
        codec = VcpuCodec(target.vm)
        codec.load(target.vcpus[0].fd, state)
        again = codec.save(target.vcpus[0].fd)
        moving = {MSR_IA32_TSC}
        assert [pair for pair in again["msrs"] if pair[0] not in moving] == [
            pair for pair in state["msrs"] if pair[0] not in moving
        ]
        for key in sorted(state.keys() - {"msrs"}):
            assert again[key] == state[key], key


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    with rig(ALL_EXITS) as machine:
        paused(machine, 1)
        return VcpuCodec(machine.vm).save(machine.vcpus[0].fd)


@pytest.mark.parametrize(
    "key", ["regs", "sregs", "fpu", "xcrs", "lapic_state", "mp_state", "vcpu_events", "xsave", "msrs"]
)
def test_a_state_without_a_key_is_refused(key: str, state: dict[str, Any]) -> None:
    with rig(ALL_EXITS, started=False) as target:
        with pytest.raises(ProtocolError, match=key):
            VcpuCodec(target.vm).load(target.vcpus[0].fd, {k: v for k, v in state.items() if k != key})


def test_debug_registers_may_be_missing(state: dict[str, Any]) -> None:
    with rig(ALL_EXITS, started=False) as target:
        without = {key: value for key, value in state.items() if key != "debugregs"}
        assert VcpuCodec(target.vm).load(target.vcpus[0].fd, without) == []


def test_host_without_xsave_has_no_extended_control_registers_to_set(
    state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel gives nr_xcrs 0 and refuses KVM_SET_XCRS whatever it is given, as within an emulated machine."""
    ioctl = vcpu_state.ioctl

    def without_xsave(fd: int, request: int, *arguments: Any) -> int:
        if request == kvm.KVM_SET_XCRS:
            raise OSError(errno.EINVAL, "KVM_SET_XCRS")
        return ioctl(fd, request, *arguments)

    with rig(ALL_EXITS, started=False) as target:
        monkeypatch.setattr(vcpu_state, "ioctl", without_xsave)
        codec = VcpuCodec(target.vm)
        assert codec.load(target.vcpus[0].fd, {**state, "xcrs": bytes(len(state["xcrs"]))}) == []
        with pytest.raises(OSError, match="KVM_SET_XCRS"):
            codec.load(target.vcpus[0].fd, {**state, "xcrs": b"\x01" + bytes(len(state["xcrs"]) - 1)})
        with pytest.raises(ProtocolError, match="xcrs: expected 392 bytes"):
            codec.load(target.vcpus[0].fd, {**state, "xcrs": b""})


ABSENT = 40  # an XSAVE component that no CPU has


def with_component(state: dict[str, Any], bit: int, *, enabled: bool) -> dict[str, Any]:
    """A state whose XSAVE area lists a component as present, and whose guest may have enabled it in XCR0."""
    area, xcrs = bytearray(state["xsave"]), bytearray(state["xcrs"])
    area[512 + bit // 8] |= 1 << bit % 8
    if enabled:
        xcrs[16 + bit // 8] |= 1 << bit % 8
    return {**state, "xsave": bytes(area), "xcrs": bytes(xcrs)}


def test_a_component_that_the_host_lacks_and_the_guest_has_not_enabled_is_left_out(state: dict[str, Any]) -> None:
    with rig(ALL_EXITS, started=False) as target:
        codec, fd = VcpuCodec(target.vm), target.vcpus[0].fd
        codec.load(fd, with_component(state, ABSENT, enabled=False))
        assert codec.save(fd)["xsave"] == state["xsave"]


def test_a_component_that_the_guest_uses_and_the_host_lacks_is_named(state: dict[str, Any]) -> None:
    with rig(ALL_EXITS, started=False) as target:
        codec, fd = VcpuCodec(target.vm), target.vcpus[0].fd
        with pytest.raises(ProtocolError, match=f"the guest uses component {ABSENT}, which this host has not"):
            codec.load(fd, with_component(state, ABSENT, enabled=True))


@pytest.mark.parametrize("key", ["regs", "xsave", "lapic_state"])
def test_a_struct_of_another_size_is_refused(key: str, state: dict[str, Any]) -> None:
    with rig(ALL_EXITS, started=False) as target:
        with pytest.raises(ProtocolError, match=key):
            VcpuCodec(target.vm).load(target.vcpus[0].fd, {**state, key: state[key][:-1]})


def test_an_msr_that_the_host_refuses_is_reported_and_the_rest_is_set(state: dict[str, Any]) -> None:
    with rig(ALL_EXITS, started=False) as target:
        codec, fd = VcpuCodec(target.vm), target.vcpus[0].fd
        star = 0xC000_0081
        changed = [(0x1234_5678, 1), *((i, 0x1122_3344 << 32 if i == star else v) for i, v in state["msrs"])]
        assert codec.load(fd, {**state, "msrs": changed}) == [0x1234_5678]
        assert dict(codec.save(fd)["msrs"])[star] == 0x1122_3344 << 32


def test_a_guest_within_the_guest_needs_a_host_that_nests(state: dict[str, Any]) -> None:
    nested = bytearray(8320)
    nested[4:8] = (8320).to_bytes(4, "little")
    with rig(ALL_EXITS, started=False) as target:
        codec = VcpuCodec(target.vm)
        codec._nested_size = 0
        with pytest.raises(ProtocolError, match="nested_state"):
            codec.load(target.vcpus[0].fd, {**state, "nested_state": bytes(nested)})
        nested[4:8] = (128).to_bytes(4, "little")
        assert codec.load(target.vcpus[0].fd, {**state, "nested_state": bytes(nested)}) == []


def test_the_deadline_comes_last_and_zero_means_now() -> None:
    armed, masked = bytearray(1024), bytearray(1024)
    armed[LVT_TIMER : LVT_TIMER + 4] = (0x400EC).to_bytes(4, "little")
    masked[LVT_TIMER : LVT_TIMER + 4] = (0x500EC).to_bytes(4, "little")
    msrs = [(MSR_IA32_TSC_DEADLINE, 0), (MSR_IA32_TSC, 900), (1, 2)]
    assert _restore_order(msrs, bytes(armed)) == [(1, 2), (MSR_IA32_TSC, 900), (MSR_IA32_TSC_DEADLINE, 900)]
    assert _restore_order(msrs, bytes(masked))[-1] == (MSR_IA32_TSC_DEADLINE, 0)
    later = [(MSR_IA32_TSC_DEADLINE, 1000), (MSR_IA32_TSC, 900)]
    assert _restore_order(later, bytes(armed))[-1] == (MSR_IA32_TSC_DEADLINE, 1000)


def test_tsc_offsets_are_shared_where_the_host_has_them() -> None:
    with rig(ALL_EXITS, vcpus=2, started=False) as machine:
        assert share_tsc_offset([vcpu.fd for vcpu in machine.vcpus]) in (True, False)


def test_cloud_hypervisors_form_is_exact_and_its_quirks_are_kept(state: dict[str, Any]) -> None:
    ch = to_ch(state, [(0, 0, 0, 13, 1, 2, 3)])
    assert (len(ch["regs"]), len(ch["sregs"]), len(ch["xcrs"]), len(ch["mp_state"])) == (144, 312, 392, 4)
    assert ch["cpuid"] == [{"function": 0, "index": 0, "flags": 0, "eax": 13, "ebx": 1, "ecx": 2, "edx": 3}]
    assert len(ch["xsave"]["region"]) == 1024
    assert len(ch["lapic_state"]["regs"]) == 1024
    assert all(-128 <= byte <= 127 for byte in ch["lapic_state"]["regs"])
    assert ch["fpu"]["fcw"] == 0x37F
    back, cpuid = from_ch(ch)
    assert cpuid == [(0, 0, 0, 13, 1, 2, 3)]
    assert {**back, "debugregs": state["debugregs"]} == state
    short = copy.deepcopy(ch)
    short["regs"] = ch["regs"][:8]
    assert from_ch(short)[0]["regs"] == state["regs"][:8].ljust(144, b"\0")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("regs", None),
        ("regs", [256]),
        ("lapic_state", {"regs": [200] * 1024}),
        ("fpu", {}),
        ("xsave", {"region": [-1]}),
        ("msrs", [{"index": 1}]),
        ("msrs", [{"index": 1, "data": "x"}]),
        ("cpuid", [{"function": 0}]),
        ("tsc_khz", "fast"),
        ("nested_state", [300]),
        ("nested_state", 1 << 40),
        ("regs", 1 << 40),
        ("fpu", {"fpr": [1 << 40] * 8}),
    ],
)
def test_a_bad_stream_names_the_key(key: str, value: object, state: dict[str, Any]) -> None:
    ch = {**to_ch(state, []), key: value}
    with pytest.raises(ProtocolError, match=key):
        from_ch(ch)
