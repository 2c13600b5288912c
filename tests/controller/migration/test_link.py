"""controller.migration.link: a controller's link to its own agent, a real process."""

from __future__ import annotations

import os
import socket

import pytest

from controller.events import EventMonitor
from controller.migration.link import AgentLink, Settings
from controller.migration.progress import Direction, Progress
from shared.errors import FlotillaError, MigrationCancelled
from shared.reactor import gather

SECONDS = 20


@pytest.mark.parametrize("closed_first", [False, True])
def test_link_that_is_cancelled_and_closed_at_once_ends_quietly(reactor, fleet, tmp_path, closed_first):
    """While it waits for a peer. The controller owns the guest: nothing of a link may end it."""
    path = str(tmp_path / "sock")
    link = AgentLink(reactor, fleet, Settings(), Progress(EventMonitor(0.0), Direction.RECEIVE))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        reactor.run_until(link.start(listener), SECONDS)
        waiting = reactor.spawn(link.accept(f"unix:{path}"))
        waiting.add_done_callback(lambda _: None)
        reactor.call_soon(reactor.stop)
        reactor.run()
        assert not waiting.done()

        async def end():
            closing = reactor.spawn(link.close()) if closed_first else None
            link.cancel()
            await (closing or link.close())
            return {}

        async def outcome():
            with pytest.raises(FlotillaError) as caught:
                await waiting
            return {"error": caught.value}

        _, ended = reactor.run_until(gather(reactor, end(), outcome()), SECONDS)
    os.unlink(path)
    assert isinstance(ended["error"], MigrationCancelled)
    assert fleet.processes == []
