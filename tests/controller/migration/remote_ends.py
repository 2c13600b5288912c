"""What the tests of remote migration share: the states' names, a send through a relay, and how it is to end."""

from __future__ import annotations

from tests.controller.migration.conftest import Died, Lab, Remote
from tests.controller.migration.relay import Cut, Relay

SEND = ("connecting", "proposing", "copying", "pausing", "saving", "final-pass", "preparing", "committed")
RECEIVE = (
    *("listening", "greeting", "ready", "checking", "building", "built", "loading", "prepared", "committed", "running"),
)
SOURCE_AGENT = ("connecting", "greeting", "ready", "proposed", "copying", "rounds", "final", "handed")
DESTINATION_AGENT = ("listening", *SOURCE_AGENT[1:])


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
    """Refused as long as the destination may take the guest; the answer once its time is over."""
    early = source.call("resolve", here=True)
    assert early["error"] and "may still take the guest" in early["error"][0], early
    source.call("age")
    return source.call("resolve", here=True)


def resolve_here(lab: Lab, source: Remote) -> None:
    """With a destination that is dead or has let go."""
    lab.disk_is_free()
    report = ask_here(source)
    assert report["error"] is None, report["error"]


def across(lab: Lab, cut: Cut | None, source: Remote, destination: Remote, **settings: float) -> dict:
    """Send through a relay; what the source says."""
    relay = Relay(f"{lab.folder}/relay", lab.url[5:], cut)
    try:
        return source.call("send", url=f"unix:{lab.folder}/relay", settings=settings)
    finally:
        relay.close()
