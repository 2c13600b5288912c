"""controller.nets with the real worker, on a TAP in a network namespace of the test's own."""

from __future__ import annotations

import os
import signal

import pytest

from controller.config.model import NetConfig
from controller.nets import NetDevice, Nets
from shared import virtio_net
from shared.errors import HostError, ProtocolError
from shared.memory import GuestMemory
from tests.controller.processes import SECONDS, running
from tests.netns import network_namespace
from tests.vmm import poll

CONFIG = NetConfig(id="_net0", mac="12:34:56:78:90:ab", mtu=1400, num_queues=4)
ACKED = virtio_net.F_VERSION_1 | virtio_net.F_GUEST_ANNOUNCE | virtio_net.F_STATUS | virtio_net.F_CTRL_VQ
STATE = {
    "kind": "net_worker", "version": 1,
    "state": {"pairs": 2, "offloads": 0, "announce": False, "acked_features": ACKED},
}  # fmt: skip


class Rig:
    def __init__(self, reactor, fleet, memory) -> None:
        self.reactor, self.fleet, self.memory = reactor, fleet, memory
        self.nets = Nets(reactor, fleet, {})

    def run(self, awaitable):
        return self.reactor.run_until(awaitable, SECONDS)

    def make(self, config=CONFIG):
        return self.run(self.nets.make(config, self.memory))

    def start(self):
        for backend in self.nets.backends():
            self.run(backend.start())

    def worker(self):
        (process,) = self.fleet.processes
        return process

    def state(self):
        self.run(self.nets.quiesce())
        saved = self.run(self.nets.save())["_net0"]["state"]
        self.run(self.nets.resume("_net0"))
        return saved

    def kill(self):
        """And wait for the successor."""
        before = self.worker()
        os.kill(before.pid, signal.SIGKILL)
        self.run(before.ended.wait())
        self.run(self.nets._workers()["_net0"].wait_serving(SECONDS))
        self.run(self.nets._workers()["_net0"].call("heartbeat"))
        assert self.worker().restarts == before.restarts + 1


@pytest.fixture
def rig(tmp_path):
    with network_namespace(), running(str(tmp_path)) as (reactor, fleet):
        memory = GuestMemory.create(1 << 20)
        rig = Rig(reactor, fleet, memory)
        yield rig
        rig.nets.hang_up()
        for backend in rig.nets._workers().values():
            rig.run(backend.close())
        rig.nets.close_taps()
        memory.close()


def status(device):
    return device.read_config(6, 2)


def test_configuration_space_before_the_worker_is_there(rig):
    device = rig.make()
    assert isinstance(device, NetDevice)
    assert device.features == 0x1_2063_7FAF and device.queue_sizes == (256,) * 5
    space = b"".join(device.read_config(at, 1).to_bytes(1, "little") for at in range(17))
    assert space.hex(" ") == "12 34 56 78 90 ab 00 00 02 00 78 05 00 00 00 00 00"
    device.negotiated = lambda: virtio_net.F_STATUS
    assert status(device) == virtio_net.S_LINK_UP


def test_driver_can_write_nothing(rig):
    device = rig.make()
    assert device.write_config(0, 1, 5) is None and device.read_config(0, 1) == 0x12


def test_announcement_interrupts_the_driver_each_time(rig):
    device = rig.make()
    rig.start()
    rig.run(rig.nets.load({"_net0": STATE}))
    changes = []
    device.on_config_changed = lambda: changes.append(status(device))
    for count in (1, 2):
        rig.nets.announce()
        poll(lambda count=count: rig.run(rig.nets.counters()) and len(changes) >= count)
    assert set(changes) == {virtio_net.S_ANNOUNCE}
    assert rig.run(rig.nets.counters())["_net0"]["announcements"] > 0


def test_announcement_that_was_acknowledged_is_gone_before_the_worker_is_asked(rig):
    """virtio 1.2, 5.1.6.5.4.2: a driver that sees its ACK used reads no S_ANNOUNCE."""
    device = rig.make()
    rig.start()
    rig.run(rig.nets.load({"_net0": STATE}))
    rig.nets.announce()
    poll(lambda: rig.run(rig.nets.counters()) and status(device) & virtio_net.S_ANNOUNCE)
    device.frontend.on_config_change()
    assert not status(device) & virtio_net.S_ANNOUNCE
    poll(lambda: rig.run(rig.nets.counters()) and status(device) & virtio_net.S_ANNOUNCE)  # this one is due still


def test_loaded_state_outlives_a_worker_until_the_guest_runs(rig):
    rig.make()
    rig.start()
    rig.run(rig.nets.load({"_net0": STATE}))
    rig.kill()
    assert rig.state()["pairs"] == 2
    rig.nets.announce()
    poll(lambda: rig.run(rig.nets.counters()) and rig.nets._workers()["_net0"].preload is None)
    rig.kill()
    assert rig.state()["pairs"] == 1  # no ring has run, so there is no region that would know better


def test_loaded_state_outlives_a_worker_that_did_not_start_its_rings(rig):
    frontend = rig.make().frontend
    rig.start()
    rig.run(rig.nets.load({"_net0": STATE}))
    before = rig.worker()
    frontend._link.fail(ProtocolError("refused"))
    rig.nets.announce()
    rig.run(before.ended.wait())
    rig.run(frontend.wait_connected())
    assert rig.state()["pairs"] == 2
    assert rig.nets._workers()["_net0"].preload is None


def test_descriptors_of_an_arriving_vm_are_used_and_none_is_left_open(rig):
    here = rig.make()
    fds = [os.dup(fd) for fd in rig.nets.tap_fds()["_net0"]]
    stranger = os.dup(fds[0])
    there = Nets(rig.reactor, rig.fleet, {"_net0": fds, "_net7": [stranger]})
    device = rig.run(there.make(CONFIG, rig.memory))
    assert there.tap_fds() == {"_net0": fds} and device.features == here.features
    there.close_taps()
    for fd in (*fds, stranger):
        with pytest.raises(OSError):
            os.fstat(fd)


@pytest.mark.parametrize("queues", [2, 6])
def test_wrong_number_of_descriptors_is_refused(rig, queues):
    rig.make()
    fds = [os.dup(fd) for fd in rig.nets.tap_fds()["_net0"]]
    there = Nets(rig.reactor, rig.fleet, {"_net0": fds})
    with pytest.raises(ProtocolError, match="2 TAP descriptors came for"):
        rig.run(there.make(NetConfig(id="_net0", mac=CONFIG.mac, num_queues=queues), rig.memory))
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_descriptor_of_an_arriving_vm_that_is_no_tap(rig):
    there = Nets(rig.reactor, rig.fleet, {"_net0": [os.memfd_create("x"), os.eventfd(0)]})
    with pytest.raises(HostError, match="the peer's TAP can't be used: this descriptor is no TAP"):
        rig.run(there.make(CONFIG, rig.memory))
