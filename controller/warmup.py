"""What the guest's first instruction did not need is imported after it, a piece at a time.

The controller has one thread, and it serves the guest's exits: an import of 20 ms would be 20 ms during which the
serial port is silent. Between two pieces the reactor looks at every descriptor.
"""

from __future__ import annotations

import sys

from shared.reactor import Reactor, sleep

# How long the guest has the controller for itself, in seconds. Its first byte takes a tenth of that.
HEAD_START = 0.002
# In an order in which no piece takes more than a few ms: what zmq and msgpack import comes before them.
PIECES = (
    "socket", "typing", "json", "datetime", "msgpack", "platform", "threading", "pickle", "zmq",
    "shared.control", "controller.services",
)  # fmt: skip


async def warm_up(reactor: Reactor) -> None:
    """Import what starting a process takes. May run several times, also side by side."""
    missing = [name for name in PIECES if name not in sys.modules]
    if missing:
        await sleep(reactor, HEAD_START)
    for name in missing:
        __import__(name)
        await sleep(reactor, 0)
