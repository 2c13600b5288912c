"""Whatever a guest does to a function costs at most that function."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import WorkerError
from tests.controller.fakes import FakeDevice, Machine, finish, machine

BAR_SIZE = 0x8_0000
SIZES = st.sampled_from([1, 2, 4, 8])
VALUES = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 0xF, 0xFFFF, 0xFFFF_FFFF, 2**64 - 1, 0x10_0000, 1 << 32]),
)
# Mostly where something is; now and then anywhere in the BAR.
OFFSETS = st.one_of(
    st.integers(0, 0x40),
    st.sampled_from(
        [0x2000, 0x4000, 0x403C, 0x4FFF, 0x6000, 0x6004, 0x6FFE, 0x47FF8, 0x48000, 0x487FC, 0x48800]
    ),
    st.integers(0x8000, 0x8080),
    st.integers(0, BAR_SIZE - 1),
)
BAR_ACCESS = st.tuples(st.just("bar"), OFFSETS, SIZES, VALUES)
ECAM_ACCESS = st.tuples(st.just("ecam"), st.integers(0, 0xA8) | st.integers(0, 0xFFFFF), SIZES, VALUES)
PORT_ACCESS = st.tuples(st.just("port"), st.integers(0, 7), st.sampled_from([1, 2, 4]), VALUES)
START = st.tuples(st.just("start"), st.just(0), st.just(0), st.just(0))


def access(made: Machine, where: str, offset: int, size: int, value: int) -> None:
    value &= (1 << 8 * size) - 1
    if where == "port":
        made.ports.read(offset, size)
        finish(made.ports.write(offset, size, value))
        return
    if where == "start":
        function = made.segment.function(1)
        assert function is not None
        for at, width, data in (
            (0x16, 2, 0),
            (0x20, 8, 0x1000),
            (0x28, 8, 0x2000),
            (0x30, 8, 0x3000),
            (0x1C, 2, 1),
        ):
            finish(function.write(at, width, data))
        finish(function.write(0x14, 1, 15))
        return
    if where == "ecam":
        address = made.config_address(1) + offset
    else:
        function = made.segment.function(1)
        assert function is not None and function.bar is not None
        address = function.bar.base + offset
    read = made.mmio.read(address, size)
    assert read is None or 0 <= read < 1 << 8 * size
    finish(made.mmio.write(address, size, value))


@settings(max_examples=150, deadline=None)
@given(st.lists(BAR_ACCESS | ECAM_ACCESS | PORT_ACCESS | START, max_size=60), st.booleans())
def test_no_access_raises_and_the_neighbour_never_notices(
    accesses: list[tuple[str, int, int, int]], failing: bool
) -> None:
    with machine() as made:
        device = FakeDevice(queue_sizes=(128, 128), fail=WorkerError("back end") if failing else None)
        transport = made.transport(device)
        made.segment.add(transport, wide=False)
        neighbour = made.transport(FakeDevice("_disk1"))
        made.segment.add(neighbour, wide=False)
        for parts in accesses:
            # A write through CF8 may name the neighbour; it must be the guest's intention then.
            if parts[0] == "port" and parts[1] < 4:
                made.page.set_address(0x8000_0800 | parts[3] & 0xFC)
            else:
                access(made, *parts)
        place = neighbour.bar
        assert place is not None
        assert made.mmio.read(place.base + 0x12, 2) == 1
        assert made.mmio.read(made.config_address(2), 4) == 0x1042_1AF4
        # Whatever state it is in can be saved, and a fresh transport takes it.
        state, device_state = transport.save(), transport.save_device()
        with machine() as other:
            copy = other.transport(FakeDevice(queue_sizes=(128, 128)))
            assert transport.bar is not None
            other.segment.add(copy, 1, transport.bar)
            copy.load(state, device_state)
            assert copy.save()["msix_config"] == state["msix_config"]
            assert copy.save()["virtio_pci_common_config"] == state["virtio_pci_common_config"]
            assert copy.save()["pci_configuration"] == state["pci_configuration"]
