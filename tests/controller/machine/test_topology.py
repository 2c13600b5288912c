"""x2APIC ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.machine.topology import Topology, x2apic_id

counts = st.integers(1, 9)


def test_without_a_topology_the_id_is_the_index() -> None:
    assert [x2apic_id(vcpu, None) for vcpu in (0, 1, 200)] == [0, 1, 200]


def test_widths_are_rounded_up_to_bits() -> None:
    topology = Topology(2, 3, 1, 2)
    assert (topology.thread_width, topology.core_width, topology.die_width) == (1, 3, 3)
    assert [x2apic_id(vcpu, topology) for vcpu in range(12)] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]


@given(st.builds(Topology, counts, counts, counts, counts))
def test_ids_are_unique_and_name_thread_core_die_and_package(topology: Topology) -> None:
    total = topology.threads_per_package * topology.packages
    ids = [x2apic_id(vcpu, topology) for vcpu in range(total)]
    assert ids == sorted(set(ids))
    assert all(ids[vcpu] >> topology.thread_width == ids[vcpu - vcpu % topology.threads_per_core]
               >> topology.thread_width for vcpu in range(total))  # fmt: skip
    assert all(ids[vcpu] >> topology.die_width == vcpu // topology.threads_per_package for vcpu in range(total))
