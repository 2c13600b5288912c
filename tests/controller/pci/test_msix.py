from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from controller.devices.state import Fields
from controller.irq import IrqRouting
from controller.pci.msix import ENABLE, FUNCTION_MASK, NO_VECTOR, Msix
from shared.errors import ProtocolError
from shared.reactor import drain_eventfd
from tests.controller.fakes import RecordingVm

CONTROL = 12  # offset of the vector control word in an entry


class Table:
    """Three vectors on a RecordingVm."""

    def __init__(self, vectors: int = 3) -> None:
        self.vm = RecordingVm()
        self.msix = Msix(vectors, IrqRouting(self.vm))

    def program(self, vector: int, *, masked: bool = False) -> None:
        self.msix.write_table(16 * vector, 8, 0xFEE0_0000)
        self.msix.write_table(16 * vector + 8, 4, 0x40 + vector)
        self.mask(vector, masked)

    def mask(self, vector: int, masked: bool) -> None:
        self.msix.write_table(16 * vector + CONTROL, 4, int(masked))

    def is_irqfd(self, vector: int) -> bool:
        return self.msix.eventfd(vector) in {fd for fd, _ in self.vm.irqfds}

    @property
    def pending(self) -> int:
        return self.msix.read_pba(0, 8)


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.msix.close()
    assert not made.vm.irqfds


def test_power_on(table: Table) -> None:
    assert [table.msix.read_table(offset, 4) for offset in range(0, 32, 4)] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert (table.msix.enabled, table.msix.masked, table.pending) == (False, True, 0)


def test_unmasked_vectors_become_irqfds_in_one_commit(table: Table) -> None:
    for vector in (0, 2):
        table.program(vector)
    assert (table.vm.commits, table.vm.irqfds) == (0, set())
    table.msix.set_control(ENABLE)
    assert [table.is_irqfd(vector) for vector in range(3)] == [True, False, True]
    assert table.vm.commits == 1
    assert sorted(table.vm.routes.values()) == [(0xFEE0_0000, 0, 0x40), (0xFEE0_0000, 0, 0x42)]


@pytest.mark.parametrize("control", [0, FUNCTION_MASK, ENABLE | FUNCTION_MASK])
def test_a_disabled_or_masked_function_has_no_irqfd(table: Table, control: int) -> None:
    table.program(0)
    table.msix.set_control(ENABLE)
    assert table.is_irqfd(0)
    table.msix.set_control(control)
    assert not table.is_irqfd(0)
    table.msix.signal(0)
    assert table.pending == 1
    table.msix.set_control(ENABLE)
    assert table.is_irqfd(0)
    assert table.pending == 0


def test_an_interrupt_of_a_masked_vector_is_pending_until_it_is_unmasked(table: Table) -> None:
    table.program(1, masked=True)
    table.msix.set_control(ENABLE)
    table.msix.signal(1)
    table.msix.signal(1)
    assert table.pending == 0b10
    assert table.pending == 0b10, "reading does not clear"
    table.mask(1, False)
    assert table.pending == 0
    # What KVM finds in the eventfd when the irqfd is assigned is what it injects: one message for the two.
    assert drain_eventfd(table.msix.eventfd(1)) == 1


def test_a_signal_that_nobody_looked_at_stays_in_the_eventfd_for_kvm(table: Table) -> None:
    table.program(0, masked=True)
    table.msix.set_control(ENABLE)
    table.msix.signal(0)
    table.mask(0, False)
    assert table.is_irqfd(0)
    assert drain_eventfd(table.msix.eventfd(0)) == 1


def test_nothing_is_injected_when_nothing_was_pending(table: Table) -> None:
    table.program(0, masked=True)
    table.msix.set_control(ENABLE)
    table.mask(0, False)
    assert drain_eventfd(table.msix.eventfd(0)) == 0


def test_masking_while_pending_keeps_the_route_and_its_gsi(table: Table) -> None:
    table.program(0)
    table.msix.set_control(ENABLE)
    (gsi,) = table.vm.routes
    commits = table.vm.commits
    table.mask(0, True)
    table.mask(0, False)
    assert list(table.vm.routes) == [gsi]
    assert table.vm.commits == commits, "a mask and unmask costs no new table"


def test_a_new_message_is_routed_at_once(table: Table) -> None:
    table.program(0)
    table.msix.set_control(ENABLE)
    table.msix.write_table(8, 4, 0x99)
    assert list(table.vm.routes.values()) == [(0xFEE0_0000, 0, 0x99)]
    table.msix.write_table(8, 4, 0x99)
    assert table.vm.commits == 2


def test_a_control_word_that_unmasks_another_vector_leaves_the_rest(table: Table) -> None:
    for vector in range(3):
        table.program(vector, masked=vector == 1)
    table.msix.set_control(ENABLE)
    table.mask(1, False)
    assert all(table.is_irqfd(vector) for vector in range(3))


def test_accesses_of_the_wrong_size_or_place(table: Table) -> None:
    msix = table.msix
    assert msix.read_table(0, 1) == 0xFF
    assert msix.read_table(0, 2) == 0xFFFF
    assert msix.read_table(16 * 3, 4) == 0xFFFF_FFFF
    assert msix.read_table(16 * 3, 8) == 0xFFFF_FFFF_FFFF_FFFF
    assert msix.read_table(4, 8) == 0
    assert msix.read_table(2, 4) == 0
    assert msix.read_pba(0, 2) == 0xFFFF
    assert msix.read_pba(8, 8) == 0xFFFF_FFFF_FFFF_FFFF
    for offset, size in ((0, 1), (0, 2), (2, 4), (4, 8), (16 * 3, 4), (0x3FFFC, 4)):
        msix.write_table(offset, size, 0x1234)
    assert [msix.read_table(offset, 4) for offset in range(0, 16, 4)] == [0, 0, 0, 1]


def test_8_byte_accesses(table: Table) -> None:
    table.msix.write_table(16, 8, 0x1_FEE0_1000)
    table.msix.write_table(24, 8, 0x1_0000_0041)
    assert table.msix.read_table(16, 8) == 0x1_FEE0_1000
    assert [table.msix.read_table(offset, 4) for offset in (24, 28)] == [0x41, 1]


def test_signals_without_a_vector_go_nowhere(table: Table) -> None:
    for vector in (NO_VECTOR, 3, 2048):
        table.msix.signal(vector)
    assert table.pending == 0


def test_pba_words_of_a_large_table() -> None:
    table = Table(vectors=64)
    try:
        table.msix.set_control(ENABLE)
        table.msix.signal(63)
        assert table.msix.read_pba(0, 8) == 1 << 63
        assert table.msix.read_pba(4, 4) == 1 << 31
        assert table.msix.read_pba(8, 8) == 0, "64 vectors have two words"
    finally:
        table.msix.close()


def test_state_drains_the_eventfds_and_comes_back(table: Table) -> None:
    table.program(0)
    table.program(1, masked=True)
    table.msix.set_control(ENABLE)
    table.msix.signal(1)
    state = table.msix.save()
    assert state == {
        "table_entries": [
            {"msg_addr_lo": 0xFEE0_0000, "msg_addr_hi": 0, "msg_data": 0x40, "vector_ctl": 0},
            {"msg_addr_lo": 0xFEE0_0000, "msg_addr_hi": 0, "msg_data": 0x41, "vector_ctl": 1},
            {"msg_addr_lo": 0, "msg_addr_hi": 0, "msg_data": 0, "vector_ctl": 1},
        ],
        "pba_entries": [2],
        "masked": False,
        "enabled": True,
    }
    other = Table()
    try:
        other.msix.load(Fields("copy", state))
        assert other.vm.commits == 0
        other.msix.attach()
        assert other.is_irqfd(0) and not other.is_irqfd(1)
        assert other.vm.commits == 1
        assert other.msix.save() == state
        other.mask(1, False)
        assert drain_eventfd(other.msix.eventfd(1)) == 1
    finally:
        other.msix.close()


def test_a_pending_interrupt_of_a_vm_that_goes_on_survives_the_save(table: Table) -> None:
    """A migration that failed: the source unmasks the vector later, and gets what the save had drained."""
    table.program(0, masked=True)
    table.msix.set_control(ENABLE)
    table.msix.signal(0)
    table.msix.save()
    table.mask(0, False)
    assert drain_eventfd(table.msix.eventfd(0)) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("table_entries", []), ("pba_entries", [1, 2]), ("masked", 1), ("pba_entries", [1 << 64])],
)
def test_a_bad_state_changes_nothing(table: Table, key: str, value: object) -> None:
    table.program(0)
    before = table.msix.save()
    with pytest.raises(ProtocolError):
        table.msix.load(Fields("copy", {**before, key: value}))
    assert table.msix.save() == before


def test_close_gives_everything_back() -> None:
    table = Table()
    for vector in range(3):
        table.program(vector)
    table.msix.set_control(ENABLE)
    fd = table.msix.eventfd(0)
    table.msix.close()
    assert not table.vm.irqfds
    with pytest.raises(OSError):
        os.fstat(fd)
