"""Devices as the transport sees them: Cloud Hypervisor's features, configuration bytes and state keys."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.devices.state import Fields
from controller.pci.virtio import Virtqueue
from controller.vhost_frontend import Frontend
from controller.vhost_user_device import (
    BLOCK,
    BLOCK_CONFIG,
    CONSOLE_CONFIG,
    FOREIGN_BLOCK,
    FOREIGN_FS,
    FS_CONFIG,
    NET_CONFIG,
    DeviceKind,
    Layout,
    VhostUserDevice,
    fs_config,
)
from shared.errors import HostError, ProtocolError
from shared.memory import GuestMemory
from shared.reactor import Future, Reactor
from shared.vhost_backend import Server
from shared.vhost_user import Message
from tests.echo_backend import Echo
from tests.virtqueue import Driver, queue_of

# The machine page's example: a raw disk of 64 MiB.
EXAMPLE = bytes.fromhex(
    "0000020000000000 00000000 7e000000 00000000 00020000 0000 0100 00000000 0100 0000 ffffffff 01000000 01000000"
    "ffffffff 01000000 01000000"
)
BLOCK_FEATURES = 0x1_3000_6E44
ACKED = 0x1_0000_0240


class DiskEcho(Echo):
    """An echo that says of itself that it is the example's disk."""

    num_queues = 1
    features = BLOCK_FEATURES

    def __init__(self, reactor: Reactor) -> None:
        super().__init__(reactor)
        self.config = bytearray(EXAMPLE)


class Rig:
    def __init__(self) -> None:
        self.reactor = Reactor()
        self.memory = GuestMemory.create(1 << 20)
        self.driver = Driver(self.memory, 0x10000)
        self.frontend = Frontend(self.reactor, self.memory, "_disk0")
        self.connect(DiskEcho(self.reactor))

    def connect(self, echo: Echo) -> None:
        self.echo = echo
        ours, theirs = socket.socketpair()
        self.server = Server(self.reactor, theirs, echo)
        self.run(self.frontend.replay(ours))

    def run(self, awaitable: Awaitable[object]) -> object:
        return self.reactor.run_until(awaitable, 10.0)

    def device(self, kind: DeviceKind = BLOCK, queues: int = 1, config: bytes = b"") -> VhostUserDevice:
        sizes = (128,) * queues
        made = self.run(VhostUserDevice.attach(self.reactor, self.frontend, "_disk0", kind, sizes, config))
        assert isinstance(made, VhostUserDevice)
        return made

    def queues(self) -> tuple[Virtqueue, ...]:
        return (queue_of(self.driver),)

    def close(self) -> None:
        self.frontend.close()
        self.server.close()
        self.driver.close()
        self.memory.close()
        self.reactor.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_our_disk_has_exactly_cloud_hypervisors_bits_and_bytes(rig: Rig) -> None:
    device = rig.device()
    assert (device.virtio_type, device.features, device.config) == (2, 0x1_3000_6E44, EXAMPLE)
    assert device.has_config
    assert device.read_config(0, 4) == 0x20000
    assert device.read_config(12, 4) == 126
    assert device.read_config(58, 4) == 0  # the tail and what lies behind it


def test_a_foreign_back_end_is_cut_to_what_cloud_hypervisor_offers_and_shows_vhosts_bits(rig: Rig) -> None:
    rig.echo.features = 0x1_3000_6E44 | 1 << 34 | 1 << 40
    rig.server.close()
    echo = DiskEcho(rig.reactor)
    echo.features = rig.echo.features
    rig.connect(echo)
    device = rig.device(FOREIGN_BLOCK)
    assert device.features == 0x1_7400_6E44
    assert BLOCK_CONFIG.integer(device.config, "num_queues") == 1


def test_file_systems_know_their_configuration_themselves(rig: Rig) -> None:
    device = rig.device(FOREIGN_FS, config=fs_config("share", 1))
    assert device.config == b"share".ljust(36, b"\0") + b"\1\0\0\0"
    assert FS_CONFIG.size == 40


def test_more_queues_than_the_back_end_has_are_refused(rig: Rig) -> None:
    with pytest.raises(HostError, match="_disk0: its back end has 1 queues, 2 are wanted"):
        rig.device(queues=2)


def test_only_writeback_is_the_drivers_to_write(rig: Rig) -> None:
    device = rig.device()
    for offset, size in ((0, 8), (32, 2), (31, 1), (33, 1), (59, 1), (200, 4)):
        assert device.write_config(offset, size, 0) is None
    assert device.config == EXAMPLE
    effect = device.write_config(32, 1, 0)
    assert effect is not None
    rig.run(effect)
    assert (device.read_config(32, 1), rig.echo.config[32]) == (0, 0)


def test_a_new_size_of_the_disk_interrupts_and_keeps_what_the_driver_wrote(rig: Rig) -> None:
    device = rig.device()
    effect = device.write_config(32, 1, 0)
    assert effect is not None
    rig.run(effect)
    changed: Future[None] = Future()
    device.on_config_changed = lambda: changed.set_result(None)
    rig.echo.config[0:8] = (99).to_bytes(8, "little")
    rig.echo.config[32] = 1
    rig.server.config_changed()
    rig.run(changed)
    assert (device.read_config(0, 4), device.read_config(32, 1)) == (99, 0)


def test_ten_thousand_changes_at_once_are_read_twice_at_the_most(rig: Rig) -> None:
    """The back end answers nothing before it has said them all."""
    device = rig.device()
    asked, get_config = 0, rig.echo.get_config

    def counted(offset: int, size: int) -> bytes:
        nonlocal asked
        asked += 1
        return get_config(offset, size)

    rig.echo.get_config = counted  # type: ignore[method-assign]
    held: list[Message] = []
    answer, rig.server._connection._on_message = rig.server._connection._on_message, held.append
    told, on_config_change = 0, rig.frontend.on_config_change

    def changed() -> None:
        nonlocal told
        told += 1
        on_config_change()
        if told % 1000 == 0:
            thousand.set_result(None)

    rig.frontend.on_config_change = changed
    for _ in range(10):
        thousand: Future[None] = Future()
        for _ in range(1000):
            rig.server.config_changed()
        rig.run(thousand)
    rig.echo.config[0:8] = (99).to_bytes(8, "little")
    rig.server._connection._on_message = answer
    seen: Future[None] = Future()
    device.on_config_changed = lambda: seen.set_result(None)
    for message in held:
        answer(message)
    rig.run(seen)
    rig.run(rig.frontend.get_config(8))  # behind every other
    assert device.read_config(0, 4) == 99
    assert asked - 1 <= 2


# State ----------------------------------------------------------------------------------------------------------


def test_the_saved_node_has_cloud_hypervisors_keys(rig: Rig) -> None:
    device = rig.device()
    device.extra["disk_path"] = "/images/disk.raw"
    rig.run(device.activate(ACKED, rig.queues()))
    rig.run(rig.frontend.stop())
    state = json.loads(json.dumps(device.save()))
    assert state.pop("flotilla") == {"bases": [[0, 0]]}
    config = state.pop("config")
    assert state == {
        "disk_path": "/images/disk.raw",
        "disk_nsectors": 0x20000,
        "avail_features": BLOCK_FEATURES,
        "acked_features": ACKED,
    }
    assert config["geometry"] == {"cylinders": 0, "heads": 0, "sectors": 0}
    assert (config["seg_max"], config["writeback"], config["unused1"]) == (126, 1, [0, 0, 0])
    assert len(config) == 19


def test_a_saved_device_goes_on_elsewhere_where_its_used_ring_ends(rig: Rig) -> None:
    device = rig.device()
    state = json.loads(json.dumps(device.save() | {"acked_features": ACKED}))
    state["config"]["writeback"] = 0
    for ring in (rig.driver.avail, rig.driver.used):
        rig.memory.view(ring, 4).cast("H")[1] = 5
    other = rig.device()
    other.load(state)
    rig.run(other.activate(ACKED, rig.queues()))
    assert rig.echo.started[0].base == 5
    assert rig.echo.config[32] == 0  # the driver had switched the write cache off
    rig.run(other.reset())
    rig.run(other.activate(ACKED, rig.queues()))
    assert rig.echo.started[0].base == 0  # after a reset it is a fresh device


def test_our_own_bases_win_over_the_used_ring(rig: Rig) -> None:
    device = rig.device()
    device.load(device.save() | {"flotilla": {"bases": [[0, 3]]}})
    rig.memory.view(rig.driver.avail, 4).cast("H")[1] = 3
    rig.run(device.activate(ACKED, rig.queues()))
    assert rig.echo.started[0].base == 3
    rig.run(device.reset())
    rig.memory.view(rig.driver.avail, 4).cast("H")[1] = 0
    rig.run(device.activate(ACKED, rig.queues()))
    assert rig.echo.started[0].base == 0


def test_the_guest_keeps_the_features_it_was_offered(rig: Rig) -> None:
    device = rig.device()
    device.load(device.save() | {"avail_features": 0x1_0000_0240})
    assert device.features == 0x1_0000_0240


def test_features_in_use_that_the_back_end_lacks_refuse_the_load(rig: Rig) -> None:
    device = rig.device()
    with pytest.raises(HostError, match="lacks features 0x400000000"):
        device.load(device.save() | {"acked_features": ACKED | 1 << 34})


@pytest.mark.parametrize(
    "change",
    [
        {"avail_features": -1},
        {"avail_features": "all"},
        {"config": None},
        {"config": {}},
        {"flotilla": {"bases": [[0, 65536]]}},
        {"flotilla": {"bases": [0]}},
        {"flotilla": {"bases": [["0", 1]]}},
        {"flotilla": []},
    ],
)
def test_a_malformed_state_is_refused_by_name_and_changes_nothing(rig: Rig, change: dict[str, object]) -> None:
    device = rig.device()
    before = device.save()
    with pytest.raises(ProtocolError, match="_disk0"):
        device.load(before | change)
    assert device.save() == before


LAYOUTS = {"block": BLOCK_CONFIG, "net": NET_CONFIG, "console": CONSOLE_CONFIG, "fs": FS_CONFIG}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(data=st.data())
def test_every_configuration_survives_json(layout: Layout, data: st.DataObject) -> None:
    space = data.draw(st.binary(min_size=layout.size, max_size=layout.size))
    assert layout.encode(Fields("device", json.loads(json.dumps(layout.decode(space))))) == space


def test_layouts_have_the_sizes_of_the_machine_page() -> None:
    assert [layout.size for layout in LAYOUTS.values()] == [60, 17, 12, 40]
    assert BLOCK_CONFIG.offset("writeback") == 32
