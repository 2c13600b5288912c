"""controller.migration.link: a controller's link to its own agent, a real process."""

from __future__ import annotations

import os
import socket

import pytest

from controller.events import EventMonitor
from controller.migration.link import MAX_INBOX, AgentLink, Settings
from controller.migration.progress import Direction, Progress
from shared.errors import FlotillaError, MigrationCancelled, ProtocolError
from shared.handover import Message
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


@pytest.fixture
def link(reactor, fleet):
    made = AgentLink(reactor, fleet, Settings(), Progress(EventMonitor(0.0), Direction.RECEIVE))
    reactor.run_until(made.start(), SECONDS)
    yield made

    async def close():
        await made.close()
        return {}

    reactor.run_until(close(), SECONDS)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("deliver", {}),
        ("deliver", {"type": Message.STATE, "body": b"\x80"}),
        ("deliver", {"type": Message.STATE, "body": 1 << 40, "fds": 0}),
        ("deliver", {"type": "STATE", "body": b"\x80", "fds": 0}),
        ("deliver", {"type": Message.HEARD, "body": b"\x80", "fds": "many"}),
        ("handed", {}),
        ("handed", {"residue": 1 << 40}),
        ("moved", {"pages": 1}),
        ("moved", {"pages": 1, "zeros": 0, "bytes": []}),
    ],
)
def test_agent_that_was_taken_over_ends_its_migration_and_nothing_else(link, event, arguments):
    """Its channel gives the controller whatever maps it sends."""
    link._process.channel.on_event(event, arguments)
    with pytest.raises(ProtocolError, match="a message from the peer is unusable"):
        link.check()


def test_messages_that_nobody_waits_for_are_bounded(link):
    for _ in range(10 * MAX_INBOX):
        link._process.channel.on_event("deliver", {"type": Message.HEARD, "body": b"\x80", "fds": 0})
    with pytest.raises(ProtocolError, match=f"{MAX_INBOX} messages came that nobody waits for"):
        link.check()
    assert len(link._inbox) == MAX_INBOX + 1
