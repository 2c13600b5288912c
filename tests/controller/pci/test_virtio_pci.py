from __future__ import annotations

from collections.abc import Iterator

import pytest

from controller.pci.function import BarPlace
from controller.pci.virtio import Status
from controller.pci.virtio_pci import VirtioPci
from shared.errors import ProtocolError, WorkerError
from shared.reactor import Future, Reactor, drain_eventfd
from tests.controller import fakes
from tests.controller.fakes import Driver, FakeDevice, Machine, finish, machine

NOTIFY = 0x6000
PBA = 0x4_8000


class Rig:
    """One transport in slot 1, with a driver."""

    def __init__(self, made: Machine, device: FakeDevice | None = None, *, wide: bool = True) -> None:
        self.machine = made
        self.device = device or FakeDevice()
        self.transport = made.transport(self.device)
        made.segment.add(self.transport, wide=wide)
        self.driver = Driver(self.transport)

    @property
    def base(self) -> int:
        assert self.transport.bar is not None
        return self.transport.bar.base


@pytest.fixture
def rig() -> Iterator[Rig]:
    with machine() as made:
        yield Rig(made, FakeDevice(queue_sizes=(128, 128)))


def test_common_configuration_at_power_on(rig: Rig) -> None:
    read = rig.driver.read
    assert read(0x12, 2) == 2
    assert read(0x10, 2) == 0xFFFF
    assert (read(0x18, 2), read(0x1A, 2), read(0x1C, 2), read(0x1E, 2)) == (128, 0xFFFF, 0, 0)
    assert (read(0x14, 1), read(0x15, 1)) == (0, 0)
    rig.driver.write(0x16, 2, 1)
    assert read(0x1E, 2) == 1
    rig.driver.write(0x16, 2, 2)
    assert (read(0x18, 2), read(0x1A, 2), read(0x1C, 2)) == (0, 0xFFFF, 0)
    assert read(0x2000, 1) == 0


def test_features_come_in_two_halves_and_nothing_more(rig: Rig) -> None:
    for select, expected in ((0, 0x3000_6E44), (1, 1), (2, 0), (0xFFFF_FFFF, 0)):
        rig.driver.write(0, 4, select)
        assert rig.driver.read(4, 4) == expected


def test_features_that_were_not_offered_are_dropped_and_acknowledged_ones_stay(rig: Rig) -> None:
    rig.driver.write(8, 4, 0)
    rig.driver.write(0xC, 4, 0xFFFF_FFFF)
    rig.driver.write(8, 4, 2)
    rig.driver.write(0xC, 4, 0xFFFF_FFFF)
    assert rig.transport.common.acked_features == 0x3000_6E44
    rig.driver.write(0x14, 1, 0)
    rig.driver.write(8, 4, 1)
    rig.driver.write(0xC, 4, 1)
    assert rig.transport.common.acked_features == 0x1_3000_6E44


@pytest.mark.parametrize("size", [0, 3, 100, 256, 0xFFFF])
def test_an_impossible_queue_size_is_ignored(rig: Rig, size: int) -> None:
    rig.driver.write(0x18, 2, 64)
    rig.driver.write(0x18, 2, size)
    assert rig.driver.read(0x18, 2) == 64


def test_ring_addresses_in_halves_and_whole_and_never_unaligned(rig: Rig) -> None:
    driver, queue = rig.driver, rig.transport.common.queues[0]
    driver.write(0x20, 4, 0x1000)
    driver.write(0x24, 4, 0x2)
    driver.write(0x28, 8, 0x1_0000_2002)
    driver.write(0x30, 4, 0x3004)
    assert (queue.desc, queue.avail, queue.used) == (0x2_0000_1000, 0x1_0000_2002, 0x3004)
    for offset in (0x20, 0x28, 0x30):
        driver.write(offset, 4, 0x5001)
    driver.write(0x30, 4, 0x5002)
    assert (queue.desc, queue.avail, queue.used) == (0x2_0000_1000, 0x1_0000_2002, 0x3004)
    assert [driver.read(offset, size) for offset in (0x20, 0x28, 0x30) for size in (4, 8)] == [0] * 6


def test_driver_ok_activates_the_ready_queues(rig: Rig) -> None:
    rig.driver.start(features=0x1_0000_0040)
    assert rig.device.acked == 0x1_0000_0040
    assert [(q.index, q.size, q.desc, q.avail, q.used) for q in rig.device.queues] == [
        (0, 128, 0x10_0000, 0x11_0000, 0x12_0000),
        (1, 128, 0x20_0000, 0x21_0000, 0x22_0000),
    ]
    assert [q.call_fd for q in rig.device.queues] == [rig.transport.msix.eventfd(n) for n in (1, 2)]
    assert rig.driver.read(0x14, 1) == 15
    assert rig.machine.vm.ioeventfds == {
        (queue.kick_fd, rig.base + NOTIFY + 4 * queue.index) for queue in rig.device.queues
    }


def test_every_vector_of_a_running_device_is_an_irqfd(rig: Rig) -> None:
    rig.driver.start()
    fds = {fd for fd, _ in rig.machine.vm.irqfds}
    assert {queue.call_fd for queue in rig.device.queues} < fds
    assert len(fds) == 3


def test_a_queue_without_a_vector_signals_nobody(rig: Rig) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.set_up_queue(0, 0x10_0000)
    rig.driver.write(0x14, 1, 15)
    (queue,) = rig.device.queues
    assert queue.call_fd not in {rig.transport.msix.eventfd(n) for n in range(3)}


@pytest.mark.parametrize("status", [4, 7, 11, 13, 0x4F, 0x8F])
def test_only_status_15_starts_a_device(rig: Rig, status: int) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.set_up_queue(0, 0x10_0000)
    rig.driver.write(0x14, 1, status)
    assert rig.device.log == []
    assert rig.driver.read(0x14, 1) == status


def test_a_device_without_a_ready_queue_does_not_start(rig: Rig) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.write(0x14, 1, 15)
    assert rig.device.log == []


def test_rings_outside_ram_cost_the_queue_or_the_device(rig: Rig) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.set_up_queue(0, fakes.RAM_SIZE - 0x1000)
    rig.driver.set_up_queue(1, 0x10_0000)
    rig.driver.write(0x14, 1, 15)
    assert [queue.index for queue in rig.device.queues] == [1]
    rig.driver.negotiate(1 << 32)
    rig.driver.set_up_queue(0, 1 << 60)
    rig.driver.write(0x14, 1, 15)
    assert rig.driver.read(0x14, 1) == 15 | Status.NEEDS_RESET
    assert rig.device.log == ["activate", "reset"]


def test_a_back_end_that_fails_to_start_asks_for_a_reset_and_can_start_again(rig: Rig) -> None:
    rig.device.fail = WorkerError("no back end")
    rig.driver.start()
    assert rig.driver.read(0x14, 1) == 15 | Status.NEEDS_RESET
    assert drain_eventfd(rig.transport.msix.eventfd(0)) == 1, "a configuration interrupt"
    rig.driver.start()
    assert (rig.driver.read(0x14, 1), rig.device.log) == (15, ["activate"])


def test_reset_returns_registers_to_power_on(rig: Rig) -> None:
    rig.driver.start()
    rig.driver.write(0x14, 1, 0)
    assert rig.device.log == ["activate", "reset"]
    read = rig.driver.read
    assert (read(0x14, 1), read(0x10, 2), read(0x16, 2)) == (0, 0xFFFF, 0)
    for index in range(2):
        rig.driver.write(0x16, 2, index)
        assert (read(0x18, 2), read(0x1A, 2), read(0x1C, 2)) == (128, 0xFFFF, 0)
    rig.driver.start()
    assert rig.device.log == ["activate", "reset", "activate"]


def test_a_reset_that_fails_is_not_reported_as_done(rig: Rig) -> None:
    rig.driver.start()
    rig.device.fail = WorkerError("still writing")
    rig.driver.write(0x14, 1, 0)
    assert rig.driver.read(0x14, 1) == Status.FAILED | Status.NEEDS_RESET
    rig.driver.write(0x14, 1, 0)
    assert rig.driver.read(0x14, 1) == 0


class SlowDevice(FakeDevice):
    """Activation and reset wait until the test lets them go on."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: Future[None] = Future()

    async def activate(self, acked_features: int, queues: tuple[object, ...]) -> None:
        self.log.append("activating")
        await self.gate
        self.log.append("active")

    async def reset(self) -> None:
        self.log.append("resetting")
        await self.gate
        self.log.append("reset")


def test_a_reset_waits_for_the_activation_it_meets_and_the_driver_for_both() -> None:
    """Two vCPUs: one has written DRIVER_OK and waits, the other resets."""
    reactor = Reactor()
    with machine() as made:
        device = SlowDevice()
        rig = Rig(made, device)
        rig.driver.negotiate(1 << 32)
        rig.driver.set_up_queue(0, 0x10_0000)
        starting = rig.transport.write(0x14, 1, 15)
        assert starting is not None
        first = reactor.spawn(starting)
        reactor.call_soon(reactor.stop)
        reactor.run()
        assert device.log == ["activating"]
        resetting = rig.transport.write(0x14, 1, 0)
        assert resetting is not None
        second = reactor.spawn(resetting)
        reactor.call_soon(lambda: device.gate.set_result(None))
        assert rig.driver.read(0x14, 1) == 15, "not reset before the back end has let go"
        reactor.run_until(second, 5)
        assert first.done()
        assert device.log == ["activating", "active", "resetting", "reset"]
        assert rig.driver.read(0x14, 1) == 0
    reactor.close()


def test_an_activation_that_a_reset_overtakes_does_not_happen(rig: Rig) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.set_up_queue(0, 0x10_0000)
    starting = rig.transport.write(0x14, 1, 15)
    rig.driver.write(0x14, 1, 0)
    finish(starting)
    assert (rig.device.log, rig.transport.activated) == ([], False)


def test_a_notify_that_kvm_does_not_take_signals_the_queue(rig: Rig) -> None:
    rig.driver.start()
    kicks = {queue.index: queue.kick_fd for queue in rig.device.queues}
    rig.driver.write(NOTIFY + 4, 2, 1)
    assert (drain_eventfd(kicks[0]), drain_eventfd(kicks[1])) == (0, 1)
    for offset in (NOTIFY + 2, NOTIFY + 8, NOTIFY + 0xFFC):
        rig.driver.write(offset, 2, 0)
    assert (drain_eventfd(kicks[0]), drain_eventfd(kicks[1])) == (0, 0)


def test_device_configuration(rig: Rig) -> None:
    assert rig.driver.read(0x4000, 4) == 0x0302_0100
    assert rig.driver.read(0x4004, 8) == 0x0B0A_0908_0706_0504
    rig.driver.write(0x4020, 1, 0x55)
    assert rig.device.config[0x20] == 0x55


def test_the_generation_grows_at_the_first_read_after_a_change(rig: Rig) -> None:
    rig.driver.start()
    rig.transport.config_changed()
    assert rig.driver.read(0x15, 1) == 0
    rig.driver.read(0x4000, 4)
    rig.driver.read(0x4000, 4)
    assert rig.driver.read(0x15, 1) == 1
    assert drain_eventfd(rig.transport.msix.eventfd(0)) == 1


def test_the_visible_enable_bit_means_nothing_until_the_word_is_written(rig: Rig) -> None:
    assert rig.transport.config.read(0x9A, 2) == 0x8002
    rig.driver.program_vector(0, 0x41)
    assert not rig.machine.vm.irqfds
    finish(rig.transport.write_config(0x9A, 2, 0x8000))
    assert len(rig.machine.vm.irqfds) == 1
    assert rig.transport.config.read(0x9A, 2) == 0x8002
    finish(rig.transport.write_config(0x98, 4, 0xC000_0000))
    assert not rig.machine.vm.irqfds
    assert rig.transport.config.read(0x98, 4) == 0xC002_0011


def test_kicks_follow_a_bar_that_the_guest_moves(rig: Rig) -> None:
    rig.driver.start()
    ecam, new = rig.machine.config_address(1), 0x2_4000_0000
    rig.machine.mmio.write(ecam + 4, 2, 6)
    rig.machine.mmio.write(ecam + 0x10, 4, new & 0xFFFF_FFFF)
    rig.machine.mmio.write(ecam + 0x14, 4, new >> 32)
    assert rig.base == new
    assert {address for _, address in rig.machine.vm.ioeventfds} == {new + NOTIFY, new + NOTIFY + 4}
    assert rig.machine.mmio.read(new + 0x12, 2) == 2
    assert rig.machine.mmio.read(0x3FFF_FF80_0012, 2) is None


class Window:
    """The PCI configuration access capability, through ECAM, as a driver without mapped BARs uses it."""

    def __init__(self, rig: Rig, capability: int) -> None:
        self.mmio, self.at = rig.machine.mmio, rig.machine.config_address(1, capability)

    def select(self, offset: int, length: int) -> None:
        finish(self.mmio.write(self.at + 4, 1, 0))
        finish(self.mmio.write(self.at + 8, 4, offset))
        finish(self.mmio.write(self.at + 12, 4, length))

    def read(self, offset: int, size: int) -> int | None:
        self.select(offset, size)
        return self.mmio.read(self.at + 16, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.select(offset, size)
        finish(self.mmio.write(self.at + 16, size, value))


def test_the_access_capability_reaches_the_bar(rig: Rig) -> None:
    window = Window(rig, 0x84)
    assert window.read(0x12, 2) == 2
    window.write(0x16, 2, 1)
    assert window.read(0x1E, 2) == 1
    assert window.read(0x14, 1) == 0
    window.write(0x14, 1, 3)
    assert rig.driver.read(0x14, 1) == 3
    assert rig.machine.mmio.read(window.at + 8, 4) == 0x14
    # The vCPU loops must leave exactly the data register to us.
    dynamic = [(w, bits) for w, bits in enumerate(rig.machine.page.dynamic[1]) if bits]
    assert dynamic == [(0x94 // 4 // 32, 1 << 0x94 // 4 % 32)]


def test_a_device_can_be_started_through_the_access_capability(rig: Rig) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.set_up_queue(0, 0x10_0000)
    window = Window(rig, 0x84)
    window.write(0x14, 1, 15)
    assert rig.device.log == ["activate"]
    window.write(NOTIFY, 2, 0)
    assert drain_eventfd(rig.device.queues[0].kick_fd) == 1


@pytest.mark.parametrize("length", [0, 3, 5, 0xFFFF_FFFF])
def test_odd_lengths_of_the_access_capability(rig: Rig, length: int) -> None:
    window = Window(rig, 0x84)
    window.select(0, length)
    assert rig.machine.mmio.read(window.at + 16, 4) == 0
    finish(rig.machine.mmio.write(window.at + 16, 4, 1))
    assert rig.driver.read(0, 4) == (0 if length in (0, 3) else 1)


def test_identity_bytes_of_the_access_capability_are_read_only(rig: Rig) -> None:
    at = rig.machine.config_address(1, 0x84)
    for offset, size in ((0, 4), (0, 1), (2, 2), (3, 1)):
        finish(rig.machine.mmio.write(at + offset, size, 0xFFFF_FFFF & (1 << 8 * size) - 1))
    assert rig.machine.mmio.read(at, 4) == 0x0514_9809


# State ----------------------------------------------------------------------------------------------------------


def copy_of(rig: Rig, made: Machine) -> Rig:
    """The same device restored on another machine, as a receiver does it."""
    transport_state, device_state = rig.transport.save(), rig.transport.save_device()
    place = rig.transport.bar
    assert place is not None
    device = FakeDevice(queue_sizes=rig.device.queue_sizes)
    other = object.__new__(Rig)
    other.machine, other.device = made, device
    other.transport = VirtioPci(device, made.vm, made.routing, fakes.Ram())
    made.segment.add(other.transport, 1, BarPlace(place.base, place.type))
    other.transport.load(transport_state, device_state)
    finish(other.transport.restore_activate())
    other.driver = Driver(other.transport)
    return other


def test_the_shape_of_the_state(rig: Rig) -> None:
    state = rig.transport.save()
    queue = {"max_size": 128, "size": 128, "ready": False, "desc_table": 0, "avail_ring": 0, "used_ring": 0}
    assert state["device_activated"] is False
    assert state["queues"] == [queue, queue]
    assert state["interrupt_status"] == 0
    assert state["cap_pci_cfg_offset"] == 134
    assert state["cap_pci_cfg"] == [20, 5] + [0] * 16
    assert state["virtio_pci_common_config"] == {
        "driver_status": 0,
        "config_generation": 0,
        "device_feature_select": 0,
        "driver_feature_select": 0,
        "queue_select": 0,
        "msix_config": 65535,
        "msix_queues": [65535, 65535],
    }
    msix = state["msix_config"]
    assert isinstance(msix, dict) and (msix["masked"], msix["enabled"]) == (True, False)


def test_a_device_without_configuration_has_its_window_elsewhere() -> None:
    with machine() as made:
        rig = Rig(made, FakeDevice("__rng", fakes.RNG, (256,), 1 << 32, has_config=False))
        assert rig.transport.save()["cap_pci_cfg_offset"] == 118
        assert Window(rig, 0x74).read(0x12, 2) == 1
        assert rig.transport.read(0x4000, 4) is None
        rig.driver.write(0x4000, 4, 1)


def test_a_running_device_goes_on_after_a_restore(rig: Rig) -> None:
    rig.driver.start(features=0x1_0000_0040)
    rig.transport.config_changed()
    with machine() as made:
        other = copy_of(rig, made)
        assert other.device.log == ["activate"]
        assert other.device.acked == 0x1_0000_0040
        assert [(q.index, q.desc) for q in other.device.queues] == [(0, 0x10_0000), (1, 0x20_0000)]
        assert len(made.vm.irqfds) == 3 and len(made.vm.ioeventfds) == 2
        assert made.vm.commits == 1, "one table for the whole restore"
        assert other.device.loaded == {"avail_features": 0x1_3000_6E44, "acked_features": 0x1_0000_0040}
        assert other.transport.save() == rig.transport.save()
        other.transport.signal_all()
        for queue in other.device.queues:
            assert drain_eventfd(queue.kick_fd) == 1
            assert drain_eventfd(queue.call_fd) == 1
        other.driver.read(0x4000, 4)
        assert other.driver.read(0x15, 1) == 1, "the change that was not read yet came along"


def test_a_device_that_was_being_set_up_goes_on_being_set_up(rig: Rig) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.write(0x30, 8, 0x12_0000)
    rig.driver.write(0x16, 2, 1)
    Window(rig, 0x84).select(0x1234, 2)
    assert rig.transport.save()["queues"][0]["used_ring"] == 0  # type: ignore[index]  # for Cloud Hypervisor's sake
    with machine() as made:
        other = copy_of(rig, made)
        assert other.device.log == []
        assert other.transport.common.queues[0].used == 0x12_0000
        assert other.transport.common.acked_features == 1 << 32
        assert other.driver.read(0x16, 2) == 1
        assert made.mmio.read(made.config_address(1, 0x8C), 4) == 0x1234


def test_a_state_of_cloud_hypervisor_lacks_our_private_part(rig: Rig) -> None:
    rig.driver.start(features=0x1_0000_0040)
    state = rig.transport.save()
    del state["flotilla"]
    with machine() as made:
        device = FakeDevice(queue_sizes=(128, 128))
        transport = made.transport(device)
        made.segment.add(transport, 1)
        transport.load(state, rig.transport.save_device())
        finish(transport.restore_activate())
        assert device.acked == 0x1_0000_0040


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("queues", [], "queues: expected a list of 2 items, not 0"),
        ("device_activated", 1, "device_activated: expected a boolean"),
        ("cap_pci_cfg", [0] * 17, "cap_pci_cfg: expected a list of 18 items, not 17"),
        ("msix_config", None, "expected an object"),
        ("virtio_pci_common_config", {}, "driver_status"),
    ],
)
def test_a_broken_state_is_refused_by_name(rig: Rig, key: str, value: object, complaint: str) -> None:
    state = {**rig.transport.save(), key: value}
    with pytest.raises(ProtocolError, match=complaint):
        rig.transport.load(state, rig.transport.save_device())


def test_queue_sizes_of_a_state_are_checked(rig: Rig) -> None:
    state = rig.transport.save()
    queues = state["queues"]
    assert isinstance(queues, list)
    queues[1]["size"] = 100
    with pytest.raises(ProtocolError, match=r"queues\[1\]: size: expected a power of two up to 128"):
        rig.transport.load(state, rig.transport.save_device())


def test_a_restore_whose_back_end_fails_is_an_error_and_the_next_one_has_a_device_to_serve(rig: Rig) -> None:
    rig.driver.start()
    with machine() as made:
        device = FakeDevice(queue_sizes=(128, 128), fail=WorkerError("gone"))
        transport = made.transport(device)
        made.segment.add(transport, 1)
        transport.load(rig.transport.save(), rig.transport.save_device())
        with pytest.raises(WorkerError):
            finish(transport.restore_activate())
        assert transport.activated and not transport.common.status & Status.NEEDS_RESET


def test_a_restore_without_a_ring_in_ram_asks_for_a_reset(rig: Rig) -> None:
    rig.driver.start()
    state = rig.transport.save()
    for queue in state["queues"]:  # type: ignore[attr-defined]
        queue["desc_table"] = fakes.RAM_SIZE
    with machine() as made:
        transport = made.transport(FakeDevice(queue_sizes=(128, 128)))
        made.segment.add(transport, 1)
        transport.load(state, rig.transport.save_device())
        finish(transport.restore_activate())
        assert not transport.activated and transport.common.status & Status.NEEDS_RESET


def test_signal_all_leaves_a_device_alone_that_does_not_run(rig: Rig) -> None:
    rig.driver.negotiate(1 << 32)
    rig.driver.set_up_queue(0, 0x10_0000, 1)
    rig.transport.signal_all()
    assert rig.transport.msix.read_pba(0, 8) == 0


def test_device_tree(rig: Rig) -> None:
    assert rig.transport.device_tree() == {
        "_virtio-pci-_disk0": {
            "id": "_virtio-pci-_disk0",
            "resources": [
                {
                    "PciBar": {
                        "index": 0,
                        "base": 0x3FFF_FF80_0000,
                        "size": 524288,
                        "type_": "Mmio64",
                        "prefetchable": False,
                    }
                }
            ],
            "children": ["_disk0"],
            "pci_bdf": "0000:00:01.0",
        },
        "_disk0": {"id": "_disk0", "resources": [], "parent": "_virtio-pci-_disk0", "children": []},
    }
