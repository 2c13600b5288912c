"""shared.kvm: the ABI against the system's headers, and /dev/kvm's refusals."""

from __future__ import annotations

import ctypes
import errno
import subprocess
from pathlib import Path

import pytest

from shared import kvm
from shared.errors import KvmError
from tests.descriptors import descriptors

# Where a C expression is not the Python name: members of kvm_run's anonymous union.
STRUCTS = [value for name, value in vars(kvm).items() if name.startswith("kvm_") and isinstance(value, type)]
INNER = {"kvm_run_io": "io", "kvm_run_mmio": "mmio", "kvm_run_internal": "internal"}
# Opaque here, or cut: kvm_run goes on with the synchronised registers.
SIZE_ONLY = {"kvm_vcpu_events", "kvm_xcrs"}
NO_SIZE = {"kvm_run"}
NUMBERS = [
    name
    for name, value in vars(kvm).items()
    if name.startswith("KVM_") and isinstance(value, int) and name != "KVM_API_VERSION"
]


def c_values(folder: Path, expressions: list[str]) -> list[int]:
    """Each expression's value, by the system's compiler and <linux/kvm.h>."""
    prints = "\n".join(f'    printf("%lld\\n", (long long)({expression}));' for expression in expressions)
    source = folder / "values.c"
    includes = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
    source.write_text(f"{includes}int main(void)\n{{\n{prints}\n    return 0;\n}}\n")
    subprocess.run(["gcc", "-w", "-o", folder / "values", source], check=True, timeout=30)
    output = subprocess.run([folder / "values"], check=True, capture_output=True, timeout=30).stdout
    return [int(line) for line in output.split()]


def test_structures_are_the_kernels(tmp_path: Path) -> None:
    wanted: dict[str, int] = {}
    for struct in STRUCTS:
        name = struct.__name__
        inner = INNER.get(name)
        c_type = f"((struct kvm_run *)0)->{inner}" if inner else f"struct {name}"
        if name not in NO_SIZE:
            wanted[f"sizeof({c_type})"] = ctypes.sizeof(struct)
        if name in SIZE_ONLY:
            continue
        for field, *_ in struct._fields_:
            if field.startswith("pad") or field in ("exit", "u"):
                continue
            offset = getattr(struct, field).offset
            if inner:
                start = f"offsetof(struct kvm_run, {inner})"
                wanted[f"offsetof(struct kvm_run, {inner}.{field}) - {start}"] = offset
            else:
                wanted[f"offsetof({c_type}, {field})"] = offset
    wanted["offsetof(struct kvm_run, io)"] = kvm.kvm_run.exit.offset
    wanted["offsetof(struct kvm_irq_routing_entry, u)"] = kvm.kvm_irq_routing_entry.u.offset
    found = dict(zip(wanted, c_values(tmp_path, list(wanted)), strict=True))
    assert found == wanted


def test_numbers_are_the_kernels(tmp_path: Path) -> None:
    assert len(NUMBERS) > 60
    assert dict(zip(NUMBERS, c_values(tmp_path, NUMBERS), strict=True)) == {
        name: getattr(kvm, name) for name in NUMBERS
    }
    capabilities = {f"KVM_CAP_{name}": number for name, number in kvm.REQUIRED_CAPS.items()}
    assert dict(zip(capabilities, c_values(tmp_path, list(capabilities)), strict=True)) == capabilities


def test_a_missing_device_is_named_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(KvmError, match="no such device") as caught:
        kvm.Kvm(str(tmp_path / "kvm"))
    assert caught.value.hint


def test_a_device_that_is_not_kvm_is_refused() -> None:
    before = descriptors()
    with pytest.raises(KvmError, match="/dev/null is not KVM"):
        kvm.Kvm("/dev/null")
    assert not descriptors() - before


@pytest.mark.probe
def test_an_ioctl_that_fails_is_named() -> None:
    device = kvm.Kvm()
    vm = device.create_vm()
    try:
        with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION: ") as caught:
            vm.set_memory(0, 1, 4096, 0)
        assert caught.value.errno == errno.EINVAL
    finally:
        vm.close()
        device.close()


@pytest.mark.probe
def test_an_unroutable_table_leaves_the_old_one() -> None:
    device = kvm.Kvm()
    vm = device.create_vm()
    try:
        vm.set_identity_map_address(0xFFFB_C000)
        vm.set_tss_address(0xFFFB_D000)
        vm.enable_split_irqchip(24)
        vm.set_gsi_routing([(24, 0xFEE0_0000, 0, 0x30), (4095, 0xFEE0_1000, 0, 0x31)])
        with pytest.raises(OSError, match="KVM_SET_GSI_ROUTING"):
            vm.set_gsi_routing([(5000, 0xFEE0_0000, 0, 0x30)])
        vm.set_gsi_routing([])
    finally:
        vm.close()
        device.close()
