"""What the tests of remote migration share: the states' names, a send through a relay, and how it is to end."""

from __future__ import annotations

import time

from tests.controller.migration.conftest import Died, Lab, Remote
from tests.controller.migration.relay import Cut, Relay

SEND = ("connecting", "proposing", "copying", "pausing", "saving", "final-pass", "preparing", "committed")
RECEIVE = (
    *("listening", "greeting", "ready", "checking", "building", "built", "loading", "prepared", "committed", "running"),
)
SOURCE_AGENT = ("connecting", "greeting", "ready", "proposed", "copying", "rounds", "final", "handed")
DESTINATION_AGENT = ("listening", *SOURCE_AGENT[1:])
SECONDS = 30.0
FAST = {"prepared": 0.5, "started": 0.5}


def outcome(remote: Remote, what: str) -> dict | None:
    """What became of a command; None when its controller died over it."""
    try:
        return remote.done(what)
    except Died:
        remote.wait()
        return None


def still_works(lab: Lab, source: Remote, destination: Remote) -> None:
    """The guest is the source's and runs; after a failure a retry works."""
    lab.runs_on(source)
    lab.copy(source, destination)


def ask_here(source: Remote) -> dict:
    """Until the destination's time is over; the answer then."""
    end = time.monotonic() + SECONDS
    while "may still take the guest" in ((report := source.call("resolve", here=True))["error"] or [""])[0]:
        assert time.monotonic() < end, f"still, after {SECONDS} s: {report['error']}"
    return report


def resolve_here(source: Remote) -> None:
    report = ask_here(source)
    assert report["error"] is None, report["error"]


def across(lab: Lab, cut: Cut | None, source: Remote, destination: Remote, **settings: float) -> dict:
    """Send through a relay; what the source says."""
    relay = Relay(f"{lab.folder}/relay", lab.url[5:], cut)
    try:
        return source.call("send", url=f"unix:{lab.folder}/relay", settings={**FAST, **settings})
    finally:
        relay.close()
