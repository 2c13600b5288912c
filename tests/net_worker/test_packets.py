"""Packets both ways, in every shape that a driver and a TAP can give them."""

from __future__ import annotations

import itertools

import pytest

from shared import virtio_net
from tests.net_worker.rig import PLAIN, Rig
from tests.network import Network, frame, number_of


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_guest_to_host(network: Network, event_idx: bool, indirect: bool) -> None:
    wire = network.wire()
    with Rig(network, event_idx=event_idx, indirect=indirect).start() as rig:
        for number in range(3 * rig.tx[0].size):
            rig.tx[0].send(frame(number, 60 + number))
            assert wire.receive() == frame(number, 60 + number)
    wire.close()


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_host_to_guest(network: Network, event_idx: bool, indirect: bool) -> None:
    wire = network.wire()
    with Rig(network, event_idx=event_idx, indirect=indirect).start() as rig:
        for number in range(3 * rig.rx[0].size):
            rig.rx[0].post(2048)
            rig.rx[0].kick()
            wire.send(frame(number, 60 + number, to_guest=True))
            (packet,) = rig.rx[0].wait()
            assert packet.frame == frame(number, 60 + number, to_guest=True)
    wire.close()
