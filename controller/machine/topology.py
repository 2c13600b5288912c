"""CPU topology and the x2APIC ids that follow from it."""

from __future__ import annotations

from shared.records import Record


class Topology(Record):
    """As `--cpus topology=`: counts per next larger unit. A Record, for it is part of VmConfig and its JSON."""

    threads_per_core: int
    cores_per_die: int
    dies_per_package: int
    packages: int

    @classmethod
    def flat(cls, vcpus: int) -> Topology:
        """What CPUID shows when no topology is given: one package of single-threaded cores."""
        return cls(1, vcpus, 1, 1)

    @property
    def thread_width(self) -> int:
        """x2APIC id bits that tell threads of one core apart."""
        return _width(self.threads_per_core)

    @property
    def core_width(self) -> int:
        """x2APIC id bits that tell logical CPUs of one die apart."""
        return self.thread_width + _width(self.cores_per_die)

    @property
    def die_width(self) -> int:
        """x2APIC id bits that tell logical CPUs of one package apart."""
        return self.core_width + _width(self.dies_per_package)

    @property
    def threads_per_die(self) -> int:
        return self.threads_per_core * self.cores_per_die

    @property
    def threads_per_package(self) -> int:
        return self.threads_per_die * self.dies_per_package


def _width(count: int) -> int:
    return (count - 1).bit_length()


def x2apic_id(vcpu: int, topology: Topology | None) -> int:
    """The id of vCPU `vcpu`, which is also the id its KVM fd is created with. Without a topology it is the index."""
    if topology is None:
        return vcpu
    rest, thread = divmod(vcpu, topology.threads_per_core)
    rest, core = divmod(rest, topology.cores_per_die)
    package, die = divmod(rest, topology.dies_per_package)
    return (
        thread
        | core << topology.thread_width
        | die << topology.core_width
        | package << topology.die_width
    )
