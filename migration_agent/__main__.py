"""`main(start)` of the migration agent.

It owns no part of a VM, so of the workers' contract quiesce, save, load and resume are not for it.
"""

from __future__ import annotations

from migration_agent.agent import Agent
from shared import log, pages
from shared.control import Channel
from shared.messages import Verb
from shared.reactor import Reactor
from shared.worker import Start

KIND = "migration_agent"
VERSION = 1


def main(start: Start) -> int:
    """Serve one migration, until `shutdown`."""
    pages.preload()
    reactor = Reactor()
    agent = Agent(reactor, start)
    channel = Channel(reactor, start.endpoint, bind=True)

    def fault(what: str) -> dict[str, object]:
        agent.fault(what)
        return {}

    def log_level(level: str) -> dict[str, object]:
        log.set_level(level)
        return {}

    def shutdown() -> dict[str, object]:
        reactor.call_soon(reactor.stop)
        return {}

    channel.handlers = {
        Verb.HELLO: lambda _: {"kind": KIND, "version": VERSION, "pid": start.pid},
        Verb.HEARTBEAT: lambda _: {"epoch": agent.epoch()},
        Verb.STATS: lambda _: dict(agent.stats()),
        Verb.FAULT: lambda arguments: fault(arguments["what"]),
        Verb.LOG_LEVEL: lambda arguments: log_level(arguments["level"]),
        Verb.SHUTDOWN: lambda _: shutdown(),
    }
    agent.serve(channel)
    try:
        return reactor.run()
    finally:
        agent.close()
        channel.close()
