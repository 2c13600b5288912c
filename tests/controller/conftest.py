"""A fleet with a real zygote, for tests of what starts processes."""

from __future__ import annotations

import pytest

from controller.fleet import Fleet
from controller.spawn import Zygote
from shared.reactor import Reactor
from tests.controller.processes import close_sockets

SECONDS = 20


@pytest.fixture
def reactor():
    loop = Reactor()
    yield loop
    loop.close()


@pytest.fixture
def fleet(reactor, tmp_path):
    zygote = Zygote()
    made = Fleet(reactor, zygote, str(tmp_path))
    yield made
    for process in list(made.processes):
        made.kill(process)
        reactor.run_until(process.ended.wait(), SECONDS)
    zygote.stop()
    close_sockets()
