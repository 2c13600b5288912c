"""CPUID: every row of Cloud Hypervisor's machine page, section 5.3, on made-up hosts and on this one."""

from __future__ import annotations

import pytest

from controller.machine.cpuid import (
    CpuidEntry,
    Vendor,
    check_compatible,
    common_cpuid,
    from_kvm,
    host_vendor,
    phys_bits,
    vcpu_cpuid,
)
from controller.machine.cpuid_features import feature_name
from controller.machine.hostcpu import host_cpuid, host_phys_bits
from controller.machine.topology import Topology
from shared.errors import MigrationError
from shared.kvm import Kvm, kvm_cpuid_entry2

Registers = tuple[int, int, int, int]
AMD = (0, 0x68747541, 0x444D4163, 0x69746E65)
INTEL = (0, 0x756E6547, 0x6C65746E, 0x49656E69)
ALL = 0xFFFF_FFFF


class Host:
    """A CPU: every leaf answers with its own number, but those given."""

    def __init__(self, vendor: Registers, leaves: dict[int, Registers] | None = None) -> None:
        self.leaves = {0: vendor, 0x8000_0000: (0x8000_0021, 0, 0, 0), 0x8000_0007: (0, 0, 0, 0x100)} | (leaves or {})

    def __call__(self, leaf: int, index: int) -> Registers:
        return self.leaves.get(leaf, (leaf, 1, 2, 3))


SUPPORTED = [
    CpuidEntry(0x0, eax=0x10),
    CpuidEntry(0x1, eax=0xA00F11, ebx=0xFF_FF_08_00, ecx=0x20, edx=0),
    CpuidEntry(0x7, 0, 1, eax=1, ebx=ALL, ecx=ALL, edx=ALL),
    CpuidEntry(0x7, 1, 1, eax=ALL, ebx=ALL, ecx=ALL, edx=ALL),
    CpuidEntry(0xB, 0, 1, edx=77),
    CpuidEntry(0xB, 1, 1, edx=77),
    CpuidEntry(0x1D, 0, 1, eax=1, ebx=1, ecx=1, edx=1),
    CpuidEntry(0x1E, 0, 1, eax=1, ebx=1, ecx=1, edx=1),
    CpuidEntry(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
    CpuidEntry(0x4000_0001, eax=0x0100_00FB),
    CpuidEntry(0x8000_0001, ecx=0x4),
    CpuidEntry(0x8000_0002, eax=1),
    CpuidEntry(0x8000_0005),
    CpuidEntry(0x8000_0006, ecx=5),
    CpuidEntry(0x8000_0008, eax=0x12_3456, ecx=9),
    CpuidEntry(0x8000_001E, 0, 0),
]


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    (found,) = [entry for entry in entries if (entry.function, entry.index) == (function, index)]
    return found


def test_the_common_list_of_an_amd_host() -> None:
    entries = common_cpuid(SUPPORTED, 46, host=Host(AMD))
    one = leaf(entries, 1)
    assert (one.ecx, one.edx) == (0x20 | 1 << 31 | 1 << 24, 1 << 12)
    assert leaf(entries, 7, 0).edx == ALL & ~(1 << 22 | 1 << 24 | 1 << 25)
    assert (leaf(entries, 7, 1).eax, leaf(entries, 7, 1).edx) == (ALL & ~(1 << 21), ALL & ~(1 << 8))
    assert leaf(entries, 0x1D) == CpuidEntry(0x1D, 0, 1)
    assert leaf(entries, 0x1E) == CpuidEntry(0x1E, 0, 1)
    assert leaf(entries, 0x4000_0001).eax == 0x0100_80FB
    assert [leaf(entries, number)[3:] for number in range(0x8000_0002, 0x8000_0005)] == [
        (number, 1, 2, 3) for number in range(0x8000_0002, 0x8000_0005)
    ]
    assert leaf(entries, 0x8000_0005)[3:] == (0x8000_0005, 1, 2, 3), "zeros are replaced by the host's values"
    assert leaf(entries, 0x8000_0006)[3:] == (0, 0, 5, 0), "KVM's own values stay"
    assert leaf(entries, 0x8000_0008).eax == 0x2E_342E
    assert phys_bits(entries) == 46


def test_amx_stays_when_it_is_asked_for() -> None:
    entries = common_cpuid(SUPPORTED, 46, amx=True, host=Host(INTEL))
    assert leaf(entries, 7, 0).edx == leaf(entries, 7, 1).eax == ALL
    assert leaf(entries, 0x1D).eax == leaf(entries, 0x1E).eax == 1


def test_cache_leaves_of_an_old_host_stay_empty() -> None:
    entries = common_cpuid(SUPPORTED, 46, host=Host(AMD, {0x8000_0000: (0x8000_0004, 0, 0, 0)}))
    assert leaf(entries, 0x8000_0005)[3:] == (0, 0, 0, 0)


def test_the_measured_example_vcpu_3_of_2_2_1_1() -> None:
    host = Host(AMD)
    entries = vcpu_cpuid(common_cpuid(SUPPORTED, 46, host=host), 3, Topology(2, 2, 1, 1), tsc_khz=2_450_000, host=host)
    assert leaf(entries, 0x8000_001E)[3:] == (3, 0x103, 3, 0)
    assert leaf(entries, 0xB, 0) == CpuidEntry(0xB, 0, 1, 1, 2, 0x100, 3)
    assert leaf(entries, 0xB, 1) == CpuidEntry(0xB, 1, 1, 2, 4, 0x200, 3)
    assert leaf(entries, 0x1F, 0) == CpuidEntry(0x1F, 0, 1, 1, 2, 0x100, 3)
    assert leaf(entries, 0x1F, 1) == CpuidEntry(0x1F, 1, 1, 2, 4, 0x200, 3)
    assert leaf(entries, 0x1F, 2) == CpuidEntry(0x1F, 2, 1, 2, 4, 0x500, 3)
    assert leaf(entries, 1).ebx == 3 << 24 | 4 << 16 | 8 << 8
    assert leaf(entries, 1).edx == 1 << 12 | 1 << 28
    assert leaf(entries, 0x8000_0001).ecx == 0x4 | 1 << 1 | 1 << 22
    assert leaf(entries, 0x8000_0008).ecx == 5 << 12 | 3


def test_a_single_vcpu_keeps_leaf_1_and_has_no_core_count() -> None:
    host = Host(AMD)
    entries = vcpu_cpuid(common_cpuid(SUPPORTED, 46, host=host), 0, Topology.flat(1), tsc_khz=None, host=host)
    assert leaf(entries, 1).ebx == 0x0001_0800
    assert leaf(entries, 0x8000_0001).ecx == 0x4
    assert leaf(entries, 0x8000_0008).ecx == 0


def test_intel_gets_no_amd_leaves() -> None:
    host = Host(INTEL)
    common = [entry for entry in common_cpuid(SUPPORTED, 46, host=host) if entry.function != 0x8000_001E]
    entries = vcpu_cpuid(common, 1, Topology.flat(2), tsc_khz=None, host=host)
    assert not [entry for entry in entries if entry.function == 0x8000_001E]
    assert leaf(entries, 1).ebx == 1 << 24 | 2 << 16 | 0x0800
    assert leaf(entries, 0x8000_0008).ecx == 9


@pytest.mark.parametrize(("vendor", "vmx", "svm"), [(AMD, 0x20, 0), (INTEL, 0, 0x4)])
def test_nested_off_hides_the_hosts_own_virtualization(vendor: Registers, vmx: int, svm: int) -> None:
    host = Host(vendor)
    common = common_cpuid(SUPPORTED, 46, host=host)
    entries = vcpu_cpuid(common, 0, Topology.flat(1), tsc_khz=None, nested=False, host=host)
    assert leaf(entries, 1).ecx & 0x20 == vmx
    assert leaf(entries, 0x8000_0001).ecx & 0x4 == svm


def test_an_invariant_tsc_gets_the_timing_leaf_once() -> None:
    host = Host(AMD)
    common = [*common_cpuid(SUPPORTED, 46, host=host), CpuidEntry(0x4000_0010, eax=1)]
    entries = vcpu_cpuid(common, 0, Topology.flat(1), tsc_khz=2_450_000, host=host)
    assert leaf(entries, 0x4000_0000).eax == 0x4000_0010
    assert leaf(entries, 0x4000_0010) == CpuidEntry(0x4000_0010, eax=2_450_000, ebx=1_000_000)


@pytest.mark.parametrize(("khz", "invariant"), [(None, 0x100), (2_450_000, 0)])
def test_an_unsteady_tsc_gets_no_timing_leaf(khz: int | None, invariant: int) -> None:
    host = Host(AMD, {0x8000_0007: (0, 0, 0, invariant)})
    entries = vcpu_cpuid(common_cpuid(SUPPORTED, 46, host=host), 0, Topology.flat(1), tsc_khz=khz, host=host)
    assert leaf(entries, 0x4000_0000).eax == 0x4000_0001
    assert not [entry for entry in entries if entry.function == 0x4000_0010]


def test_the_common_list_is_not_changed_by_a_vcpu() -> None:
    host = Host(AMD)
    common = common_cpuid(SUPPORTED, 46, host=host)
    before = list(common)
    vcpu_cpuid(common, 1, Topology.flat(2), tsc_khz=1, host=host)
    assert common == before


def test_only_the_flag_that_streams_carry_is_taken_from_kvm() -> None:
    (entry,) = from_kvm([kvm_cpuid_entry2(function=4, index=2, flags=7, eax=1, ebx=2, ecx=3, edx=4)])
    assert entry == CpuidEntry(4, 2, 1, 1, 2, 3, 4)


def changed(function: int, index: int, register: str, value: int) -> list[CpuidEntry]:
    common = common_cpuid(SUPPORTED, 46, host=Host(AMD))
    return [
        entry._replace(**{register: value}) if (entry.function, entry.index) == (function, index) else entry
        for entry in common
    ]


@pytest.mark.parametrize(("function", "index", "register", "theirs", "message"), [
    (1, 0, "ecx", 1 << 28, r"CPUID 0x1\.0 ECX bit 28 \(avx\) is missing"),
    (1, 0, "edx", 1 << 26, r"CPUID 0x1\.0 EDX bit 26 \(sse2\) is missing"),
    (7, 0, "eax", 2, r"CPUID 0x7\.0 EAX is 0x2, more than 0x1"),
    (0x8000_0001, 0, "edx", 1 << 29, r"CPUID 0x80000001\.0 EDX bit 29 \(lm\) is missing"),
    (0x4000_0001, 0, "eax", 1 << 11, r"CPUID 0x40000001\.0 EAX bit 11 \(kvm_pv_ipi\) is missing"),
    (0x4000_0000, 0, "eax", 0x4000_0010, r"CPUID 0x40000000\.0 EAX is 0x40000010, more than 0x40000001"),
    (0x4000_0000, 0, "ebx", 0x7263694D, r"CPUID 0x40000000\.0 EBX is 0x7263694d, not 0x4b4d564b"),
    (0x1D, 0, "eax", 1, r"CPUID 0x1d\.0 EAX is 0x1, more than 0x0"),
])  # fmt: skip
def test_a_host_that_lacks_something_is_refused_by_name(
    function: int, index: int, register: str, theirs: int, message: str
) -> None:
    here = common_cpuid(SUPPORTED, 46, host=Host(AMD))
    with pytest.raises(MigrationError, match=message):
        check_compatible(changed(function, index, register, theirs), here)


def test_a_host_that_has_more_is_accepted() -> None:
    here = common_cpuid(SUPPORTED, 46, host=Host(AMD))
    check_compatible(here, here)
    for register in ("ebx", "ecx", "edx"):
        check_compatible(changed(7, 0, register, 0), here)
    check_compatible(changed(0x8000_0002, 0, "eax", 99), here)


def test_an_empty_list_is_refused_because_of_the_signature() -> None:
    with pytest.raises(MigrationError, match="0x40000000"):
        check_compatible([], common_cpuid(SUPPORTED, 46, host=Host(AMD)))


def test_a_wholly_different_cpu_is_refused_in_one_short_line() -> None:
    with pytest.raises(MigrationError) as caught:
        check_compatible(common_cpuid(SUPPORTED, 46, host=Host(AMD)), [])
    assert len(str(caught.value)) < 1000 and " more" in str(caught.value)


def test_feature_names_have_the_right_places() -> None:
    expected = {
        (1, 0, "ecx", 31): "hypervisor", (1, 0, "ecx", 21): "x2apic",
        (1, 0, "edx", 31): "pbe", (1, 0, "edx", 12): "mtrr",
        (7, 0, "ebx", 16): "avx512f", (7, 0, "ebx", 31): "avx512vl",
        (7, 0, "ecx", 16): "la57", (7, 0, "ecx", 31): "pks",
        (7, 0, "edx", 24): "amx_tile", (7, 0, "edx", 31): "spec_ctrl_ssbd", (7, 1, "eax", 21): "amx_fp16",
        (7, 1, "edx", 8): "amx_complex", (0x8000_0001, 0, "ecx", 22): "topoext", (0x8000_0001, 0, "ecx", 2): "svm",
        (0x8000_0001, 0, "edx", 20): "nx", (0x8000_0001, 0, "edx", 29): "lm",
        (0x4000_0001, 0, "eax", 15): "kvm_msi_ext_dest_id", (0x4000_0001, 0, "eax", 24): "kvmclock_stable",
        (7, 0, "ebx", 22): "unnamed", (0x4000_0001, 0, "edx", 3): "unnamed",
    }  # fmt: skip
    assert {key: feature_name(*key) for key in expected} == expected


def test_the_instruction_agrees_with_proc_cpuinfo() -> None:
    with open("/proc/cpuinfo") as file:
        info = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in info.items()}
    brand = b"".join(
        register.to_bytes(4, "little") for number in range(0x8000_0002, 0x8000_0005) for register in host_cpuid(number)
    )
    assert brand.split(b"\x00")[0].decode().split() == fields["model name"].split()
    assert host_vendor().value.decode() == fields["vendor_id"] or host_vendor() is Vendor.OTHER
    assert f"{host_phys_bits()} bits physical" in fields["address sizes"]
    _, _, ecx, edx = host_cpuid(1)
    named = {
        feature_name(1, 0, register, bit)
        for register, value in (("ecx", ecx), ("edx", edx))
        for bit in range(32)
        if value >> bit & 1
    }
    # The kernel hides what it does not use; these it always shows.
    shown = {"ssse3", "fma", "cx16", "sse4_1", "sse4_2", "aes", "avx", "rdrand", "fpu", "apic", "sse2"}
    assert named & shown == set(fields["flags"].split()) & shown


@pytest.mark.probe
def test_this_hosts_list_holds_what_kvm_supports() -> None:
    kvm = Kvm()
    try:
        supported = from_kvm(kvm.supported_cpuid())
    finally:
        kvm.close()
    common = common_cpuid(supported, 46)
    assert phys_bits(common) == 46
    listed = {(entry.function, entry.index) for entry in supported}
    assert {(entry.function, entry.index) for entry in common} == listed | {(0x8000_0000 + n, 0) for n in (2, 3, 4)}
    check_compatible(common, common)
