"""The worker as the zygote starts it, beyond the contract of every worker (tests/test_worker_contract.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.fleet import Fleet
from net_worker.announce import rarp
from shared import virtio_net
from shared.errors import ProtocolError
from shared.messages import Verb
from shared.reactor import Reactor
from tests.controller.processes import running
from tests.network import GUEST_MAC, frame
from tests.test_worker_contract import BlkSubject, NetSubject


class Successor(NetSubject):
    """Another worker on the TAP and the guest memory of one that has gone quiet; its rings are not started yet."""

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path, former: NetSubject) -> None:
        super().__init__(reactor, fleet, folder)
        self.network.close()
        self.network = former.network
        assert self.driver is not None and self.memory is not None
        self.driver.close()
        self.memory.close()
        self.driver, self.memory = former.driver, former.memory
        assert self.memory is not None
        self.frontends["vhost"].close()
        self.frontends = {"vhost": type(former.frontends["vhost"])(reactor, self.memory, "vhost")}

    def activate(self) -> None:
        pass

    def close(self) -> None:
        for frontend in self.frontends.values():
            frontend.close()


@pytest.fixture
def card(tmp_path: Path) -> Iterator[NetSubject]:
    with running(str(tmp_path)) as (reactor, fleet):
        subject = NetSubject(reactor, fleet, tmp_path)
        subject.start()
        yield subject
        subject.close()


def test_announce_by_message(card: NetSubject) -> None:
    wire, told = card.network.wire(), []
    frontend = card.frontends["vhost"]
    frontend.on_config_change = lambda: told.append(True)
    features = virtio_net.F_VERSION_1 | virtio_net.F_STATUS | virtio_net.F_GUEST_ANNOUNCE
    card.run(frontend.reset())
    card.run(frontend.activate(features, (card.queue(),)))
    told.clear()
    assert card.call(Verb.ANNOUNCE) == {}
    card.until(lambda: bool(told))
    config = card.run(frontend.get_config(virtio_net.CONFIG_SIZE))
    assert config[6:8] == bytes((virtio_net.S_LINK_UP | virtio_net.S_ANNOUNCE, 0))
    assert wire.receive() == rarp(GUEST_MAC)
    card.until(lambda: card.call(Verb.STATS)["announcements"] == 5)
    wire.close()


def test_announce_while_quiesced_is_refused(card: NetSubject) -> None:
    card.call(Verb.QUIESCE)
    with pytest.raises(ProtocolError, match="announce while quiesced"):
        card.call(Verb.ANNOUNCE)


def test_announce_is_of_network_cards_alone(tmp_path: Path) -> None:
    with running(str(tmp_path)) as (reactor, fleet):
        disk = BlkSubject(reactor, fleet, tmp_path)
        disk.start()
        with pytest.raises(ProtocolError, match="does not serve 'announce'"):
            disk.call(Verb.ANNOUNCE)
        disk.close()


def test_successor_on_the_same_tap_takes_over_where_the_first_has_gone_quiet(card: NetSubject, tmp_path: Path) -> None:
    """A local migration: both are up and attached before the pause; the second is quiet until the first is."""
    wire = card.network.wire()
    successor = Successor(card.reactor, card.fleet, tmp_path, card)
    successor.start()
    card.request()
    card.until(lambda: card.finished() == 1)
    assert wire.receive() == frame(1)
    bases = card.call(Verb.QUIESCE)["bases"]
    saved = card.call(Verb.SAVE)
    card.request()  # between the two: nobody serves it
    successor.call(Verb.LOAD, **saved)
    queue = card.queue()
    successor.run(successor.frontends["vhost"].activate(virtio_net.F_VERSION_1, (queue,), bases, restored=True))
    card.until(lambda: card.finished() == 2)
    assert wire.receive() == frame(1)
    assert successor.call(Verb.STATS)["tx_frames"] == 1 and card.call(Verb.STATS)["tx_frames"] == 1
    successor.close()
    wire.close()
