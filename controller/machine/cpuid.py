"""What the guest reads from CPUID: KVM's list, changed as Cloud Hypervisor changes it.

`common_cpuid` makes what all vCPUs share (and what a migration stream carries), `vcpu_cpuid` one vCPU's list from
it, and `check_compatible` tells whether this host can run a guest that was started with another host's common list.
Lists keep their order: entries that are replaced move to the end, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from controller.machine.hostcpu import BRAND_STRING_LEAVES, host_cpuid
from controller.machine.topology import Topology, x2apic_id
from shared.errors import MigrationError
from shared.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2
from shared.records import NamedTuple

KVM_SIGNATURE, KVM_FEATURES, KVM_TIMING = 0x4000_0000, 0x4000_0001, 0x4000_0010
APIC_BUS_KHZ = 1_000_000
MAX_NAMED = 8  # obstacles in one error message

HYPERVISOR, TSC_DEADLINE, VMX = 1 << 31, 1 << 24, 1 << 5  # leaf 1 ECX
MTRR, HTT = 1 << 12, 1 << 28  # leaf 1 EDX
CMP_LEGACY, SVM, TOPOLOGY_EXTENSIONS = 1 << 1, 1 << 2, 1 << 22  # leaf 0x80000001 ECX
INVARIANT_TSC = 1 << 8  # leaf 0x80000007 EDX
MSI_EXT_DEST_ID = 1 << 15  # KVM features EAX
AMX_7_0_EDX = 1 << 22 | 1 << 24 | 1 << 25  # BF16, tiles, INT8
AMX_7_1_EAX, AMX_7_1_EDX = 1 << 21, 1 << 8  # FP16, COMPLEX
AMX_LEAVES = (0x1D, 0x1E)
CACHE_LEAVES = (0x8000_0005, 0x8000_0006)
CLFLUSH_SIZE = 8 << 8  # leaf 1 EBX, in quadwords
THREAD_LEVEL, CORE_LEVEL, DIE_LEVEL = 1 << 8, 2 << 8, 5 << 8  # leaves 0xB and 0x1F ECX

HostCpuid = Callable[[int, int], tuple[int, int, int, int]]


class CpuidEntry(NamedTuple):
    """One entry as in KVM_SET_CPUID2 and in the migration stream. `flags` 1: `index` counts."""

    function: int
    index: int = 0  # type: ignore[assignment]  # KVM's and the stream's name hides tuple.index()
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


def from_kvm(entries: Iterable[kvm_cpuid_entry2]) -> list[CpuidEntry]:
    """The list of KVM_GET_SUPPORTED_CPUID or KVM_GET_CPUID2; of the flags only the one that is in streams."""
    return [
        CpuidEntry(
            entry.function, entry.index, entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            entry.eax, entry.ebx, entry.ecx, entry.edx,
        )
        for entry in entries
    ]  # fmt: skip


class Vendor(Enum):
    AMD = b"AuthenticAMD"
    INTEL = b"GenuineIntel"
    OTHER = b""


def host_vendor(host: HostCpuid = host_cpuid) -> Vendor:
    _, ebx, ecx, edx = host(0, 0)
    name = b"".join(register.to_bytes(4, "little") for register in (ebx, edx, ecx))
    return next((vendor for vendor in Vendor if vendor.value == name), Vendor.OTHER)


def phys_bits(entries: Iterable[CpuidEntry]) -> int | None:
    """The physical address bits that a guest with these entries sees."""
    return next((entry.eax & 0xFF for entry in entries if entry.function == 0x8000_0008), None)


def common_cpuid(
    supported: Iterable[CpuidEntry], bits: int, *, amx: bool = False, host: HostCpuid = host_cpuid
) -> list[CpuidEntry]:
    """What all vCPUs share, from `from_kvm(Kvm.supported_cpuid())`; `bits` is the width of a physical address."""
    entries = [entry for entry in supported if entry.function not in BRAND_STRING_LEAVES]
    for leaf in BRAND_STRING_LEAVES:
        eax, ebx, ecx, edx = host(leaf, 0)
        entries.append(CpuidEntry(leaf, 0, 0, eax, ebx, ecx, edx))
    return [_common(entry, bits, amx, host) for entry in entries]


def _common(entry: CpuidEntry, bits: int, amx: bool, host: HostCpuid) -> CpuidEntry:
    match entry.function, entry.index:
        case 1, 0:
            return entry._replace(ecx=entry.ecx | HYPERVISOR | TSC_DEADLINE, edx=entry.edx | MTRR)
        case 7, 0 if not amx:
            return entry._replace(edx=entry.edx & ~AMX_7_0_EDX)
        case 7, 1 if not amx:
            return entry._replace(eax=entry.eax & ~AMX_7_1_EAX, edx=entry.edx & ~AMX_7_1_EDX)
        case leaf, _ if leaf in AMX_LEAVES and not amx:
            return entry._replace(eax=0, ebx=0, ecx=0, edx=0)
        case leaf, _ if leaf in CACHE_LEAVES:
            if entry.eax or entry.ebx or entry.ecx or entry.edx or host(0x8000_0000, 0)[0] < leaf:
                return entry
            eax, ebx, ecx, edx = host(leaf, 0)
            return entry._replace(eax=eax, ebx=ebx, ecx=ecx, edx=edx)
        case 0x8000_0008, _:
            return entry._replace(eax=entry.eax & 0xFF00_FF00 | bits | bits << 16)
        case leaf, _ if leaf == KVM_FEATURES:
            return entry._replace(eax=entry.eax | MSI_EXT_DEST_ID)
    return entry


def vcpu_cpuid(
    common: Iterable[CpuidEntry],
    vcpu: int,
    topology: Topology,
    *,
    tsc_khz: int | None,
    nested: bool = True,
    host: HostCpuid = host_cpuid,
) -> list[CpuidEntry]:
    """The list for KVM_SET_CPUID2 of vCPU `vcpu`.

    `topology` is `--cpus topology=` or Topology.flat(boot vCPUs). `tsc_khz` is KVM_GET_TSC_KHZ, None where it fails.
    """
    vendor = host_vendor(host)
    apic_id = x2apic_id(vcpu, topology)
    patch = _Patch(common)
    patch.every(0xB, edx=apic_id)
    patch.every(0x1F, edx=apic_id)
    if not nested:
        if vendor is Vendor.INTEL:
            patch.clear(1, ecx=VMX)
        else:
            patch.clear(0x8000_0001, ecx=SVM)
    _topology(patch, topology, apic_id)
    if vendor is Vendor.AMD:
        _amd_topology(patch, topology, apic_id)
    if tsc_khz is not None and host(0x8000_0007, 0)[3] & INVARIANT_TSC:
        patch.every(KVM_SIGNATURE, eax=KVM_TIMING)
        patch.replace(CpuidEntry(KVM_TIMING, eax=tsc_khz, ebx=APIC_BUS_KHZ))
    return patch.entries


def _topology(patch: _Patch, topology: Topology, apic_id: int) -> None:
    """Leaf 1 (a flat count), 0xB (threads and packages) and 0x1F (threads, cores and dies)."""
    threads, cores, package = topology.threads_per_core, topology.threads_per_die, topology.threads_per_package
    ebx = patch.get(1).ebx & 0xFFFF | (package & 0xFF) << 16 | (apic_id & 0xFF) << 24
    patch.every(1, ebx=ebx)
    patch.set_bits(1, edx=HTT)
    patch.one(0xB, 0, eax=topology.thread_width, ebx=threads, ecx=THREAD_LEVEL)
    patch.one(0xB, 1, eax=topology.die_width, ebx=package, ecx=CORE_LEVEL, edx=apic_id)
    patch.one(0x1F, 0, eax=topology.thread_width, ebx=threads, ecx=THREAD_LEVEL, edx=apic_id)
    patch.one(0x1F, 1, eax=topology.core_width, ebx=cores, ecx=CORE_LEVEL, edx=apic_id)
    patch.one(0x1F, 2, eax=topology.die_width, ebx=package, ecx=DIE_LEVEL, edx=apic_id)


def _amd_topology(patch: _Patch, topology: Topology, apic_id: int) -> None:
    """Leaves 0x8000001E and 0x80000008, and what AMD wants in leaf 1 of a die with several logical CPUs."""
    cores = topology.threads_per_die
    widths = topology.thread_width + topology.die_width
    patch.one(
        0x8000_001E, 0,
        eax=apic_id,
        ebx=topology.threads_per_core - 1 << 8 | apic_id & 0xFF,
        ecx=topology.dies_per_package - 1 << 8 | widths & 0xFF,
        edx=0,
    )  # fmt: skip
    if cores == 1:
        patch.one(0x8000_0008, 0, ecx=0)
        return
    patch.set_bits(0x8000_0001, ecx=CMP_LEGACY | TOPOLOGY_EXTENSIONS)
    patch.one(1, 0, ebx=(apic_id << 24 | cores << 16 | CLFLUSH_SIZE) & 0xFFFF_FFFF)
    patch.one(0x8000_0008, 0, ecx=widths + topology.core_width << 12 | cores - 1)


class _Patch:
    """A list of entries under change. `function` alone addresses every index of a leaf."""

    def __init__(self, entries: Iterable[CpuidEntry]) -> None:
        self.entries = list(entries)

    def get(self, function: int) -> CpuidEntry:
        return next((entry for entry in self.entries if entry.function == function), CpuidEntry(function))

    def every(self, function: int, **registers: int) -> None:
        """Set registers in every entry of a leaf; nothing happens if there is none."""
        self._change(lambda entry: entry.function == function, lambda entry: entry._replace(**registers))

    def set_bits(self, function: int, **registers: int) -> None:
        self._change(
            lambda entry: entry.function == function and entry.index == 0,
            lambda entry: entry._replace(**{name: getattr(entry, name) | bits for name, bits in registers.items()}),
        )

    def clear(self, function: int, **registers: int) -> None:
        self._change(
            lambda entry: entry.function == function,
            lambda entry: entry._replace(**{name: getattr(entry, name) & ~bits for name, bits in registers.items()}),
        )

    def one(self, function: int, index: int, **registers: int) -> None:
        """Set registers of one index of a leaf, which is made if KVM has not listed it."""
        found = self._change(
            lambda entry: entry.function == function and entry.index == index,
            lambda entry: entry._replace(**registers),
        )
        if not found:
            self.entries.append(CpuidEntry(function, index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX)._replace(**registers))

    def replace(self, new: CpuidEntry) -> None:
        self.entries = [entry for entry in self.entries if entry.function != new.function] + [new]

    def _change(self, wanted: Callable[[CpuidEntry], bool], change: Callable[[CpuidEntry], CpuidEntry]) -> bool:
        found = False
        for position, entry in enumerate(self.entries):
            if wanted(entry):
                self.entries[position] = change(entry)
                found = True
        return found


class _Rule(Enum):
    SUBSET = "bits"
    NOT_GREATER = "number"
    EQUAL = "value"


_CHECKED: tuple[tuple[int, int, str, _Rule], ...] = (
    (KVM_SIGNATURE, 0, "ebx", _Rule.EQUAL),
    (KVM_SIGNATURE, 0, "ecx", _Rule.EQUAL),
    (KVM_SIGNATURE, 0, "edx", _Rule.EQUAL),
    (KVM_SIGNATURE, 0, "eax", _Rule.NOT_GREATER),
    (0x1, 0, "ecx", _Rule.SUBSET),
    (0x1, 0, "edx", _Rule.SUBSET),
    (0x7, 0, "eax", _Rule.NOT_GREATER),
    (0x7, 0, "ebx", _Rule.SUBSET),
    (0x7, 0, "ecx", _Rule.SUBSET),
    (0x7, 0, "edx", _Rule.SUBSET),
    (0x7, 1, "eax", _Rule.SUBSET),
    (0x7, 1, "ecx", _Rule.SUBSET),
    (0x7, 1, "edx", _Rule.SUBSET),
    (0x7, 2, "edx", _Rule.SUBSET),
    (0x1D, 0, "eax", _Rule.NOT_GREATER),
    (0x1E, 0, "eax", _Rule.NOT_GREATER),
    (0x1E, 1, "eax", _Rule.SUBSET),
    (0x8000_0001, 0, "ecx", _Rule.SUBSET),
    (0x8000_0001, 0, "edx", _Rule.SUBSET),
    (KVM_FEATURES, 0, "eax", _Rule.SUBSET),
    (KVM_FEATURES, 0, "ebx", _Rule.SUBSET),
    (KVM_FEATURES, 0, "ecx", _Rule.SUBSET),
    (KVM_FEATURES, 0, "edx", _Rule.SUBSET),
)


def check_compatible(guest: Sequence[CpuidEntry], here: Sequence[CpuidEntry]) -> None:
    """Raise MigrationError, naming the obstacles, unless a guest with the common list `guest` can run on `here`.

    A leaf that is absent counts as zeros, so an empty list fails at KVM's signature.
    """
    obstacles = [text for check in _CHECKED for text in _compare(guest, here, *check)]
    if obstacles:
        if len(obstacles) > MAX_NAMED:
            obstacles[MAX_NAMED:] = [f"and {len(obstacles) - MAX_NAMED} more"]
        raise MigrationError(
            f"this host's CPU can't run the guest: {'; '.join(obstacles)}",
            "the guest was started with features of another host's CPU",
        )


def _compare(
    guest: Sequence[CpuidEntry], here: Sequence[CpuidEntry], leaf: int, index: int, register: str, rule: _Rule
) -> list[str]:
    theirs, ours = _register(guest, leaf, index, register), _register(here, leaf, index, register)
    place = f"CPUID {leaf:#x}.{index} {register.upper()}"
    if rule is _Rule.SUBSET:
        from controller.machine.cpuid_features import feature_name

        missing = theirs & ~ours
        return [
            f"{place} bit {bit} ({feature_name(leaf, index, register, bit)}) is missing"
            for bit in range(32)
            if missing >> bit & 1
        ]
    if theirs == ours or (rule is _Rule.NOT_GREATER and theirs < ours):
        return []
    relation = "more than" if rule is _Rule.NOT_GREATER else "not"
    return [f"{place} is {theirs:#x}, {relation} {ours:#x}"]


def _register(entries: Sequence[CpuidEntry], leaf: int, index: int, register: str) -> int:
    for entry in entries:
        if entry.function == leaf and entry.index == index:
            return int(getattr(entry, register))
    return 0
