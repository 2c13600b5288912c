"""Every kill and every cut of a remote migration, over the one stream: an exhaustive model.

    source controller ── agent A ── relay ── agent B ── destination controller
                      ╌╌╌╌╌╌╌╌╌╌ ASK, OUTCOME ╌╌╌╌╌╌╌╌
What is modelled is what matters for the commit: who is alive, what each side has said and heard, what is under way in
the stream and where the stream is cut. The controllers follow the real rules (`source_decision`,
`destination_may_start`, `outcome`). Until END_OF_RAM the agents hold the stream, so that an agent's death cuts it; from
then on the controllers do. Whatever can be killed can be killed between any two steps, and either side can fail,
cancel, or give up waiting where the real one can. A source in doubt asks over a connection of its own, for as long as
the destination listens; an answer may take as long as it likes, or be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from controller.migration.commit import Decision, Heard, destination_may_start, outcome, source_decision

SourceRule = Callable[[bool, Heard], Decision]
StartRule = Callable[[bool, bool], bool]
TellRule = Callable[[bool, bool], Heard]

TO_DESTINATION = ("ram", "end", "commit", "withdrawn")
TO_SOURCE = ("prepared", "started", "refused")


@dataclass(frozen=True, slots=True)
class World:
    source: str = "copying"  # copying, paused, waiting, committing, committed, back, gone, doubt
    destination: str = "building"  # building, loading, prepared, starting, running, refusing, aborted
    forth: tuple[str, ...] = ()  # messages in the stream, oldest first
    back: tuple[str, ...] = ()
    cut: bool = False  # no more messages; what is in the stream is lost or, for what a kernel has, still read
    source_alive: bool = True
    destination_alive: bool = True
    agent_a: bool = True
    agent_b: bool = True
    relay: bool = True
    heard: Heard = Heard.NOTHING
    said_commit: bool = False
    refused: bool = False  # by the destination
    trouble: bool = False  # at the source: a cancel, a failure, a deadline
    trouble_there: bool = False
    listens: bool = True  # the destination, for a source that asks, once PREPARED has been said
    answer: Heard = Heard.NOTHING  # OUTCOME, on its way to the source

    @property
    def source_runs(self) -> bool:
        return self.source_alive and self.source in ("copying", "back")

    @property
    def destination_runs(self) -> bool:
        return self.destination_alive and self.destination == "running"

    @property
    def in_doubt(self) -> bool:
        return self.source_alive and self.source == "doubt"


Worlds = dict[World, list[World]]


def say(w: World, message: str, **changes: object) -> World:
    """Into the stream, unless that is cut: then nobody will hear it."""
    if w.cut:
        return replace(w, **changes)  # type: ignore[arg-type]
    if message in TO_DESTINATION:
        return replace(w, forth=(*w.forth, message), **changes)  # type: ignore[arg-type]
    return replace(w, back=(*w.back, message), **changes)  # type: ignore[arg-type]


def source_steps(w: World, rule: SourceRule) -> Iterator[World]:
    stopped = w.trouble or (w.cut and not w.back) or "refused" in w.back[:1]
    if w.source == "copying":
        yield replace(w, source="back") if stopped else replace(w, source="paused")
    elif w.source == "paused":
        if stopped:
            yield say(w, "withdrawn", source="back")
        elif w.agent_a:
            yield say(w, "end", source="waiting")
        else:
            yield replace(w, source="back")
    elif w.source in ("waiting", "committed"):
        yield from listen(w, rule)
    elif w.source == "committing":
        # A byte of COMMIT is the kernel's (it may have reached the peer), or nothing is and it knows that.
        if w.trouble:
            yield say(w, "withdrawn", source="back")
        elif w.cut:
            yield replace(w, source="back")  # NothingSent
            yield replace(w, source="committed", said_commit=True)
        else:
            yield say(w, "commit", source="committed", said_commit=True)
            yield replace(w, source="committed", said_commit=True, cut=True)  # and the stream broke over it
    elif w.source == "doubt" and w.back:  # a late answer
        yield from listen(w, rule)


def listen(w: World, rule: SourceRule) -> Iterator[World]:
    """Take the next message, the end of the stream, or give up waiting."""
    if w.back:
        message, rest = w.back[0], w.back[1:]
        if message == "prepared" and w.source == "waiting":
            yield replace(w, back=rest, source="committing")
            return
        heard = {"started": Heard.STARTED, "refused": Heard.REFUSED}.get(message, Heard.END)
        yield decide(replace(w, back=rest, heard=heard), rule)
    elif w.cut or w.trouble:  # a deadline is trouble, too; a cancel after COMMIT is not heard
        yield decide(replace(w, heard=Heard.END), rule)


def decide(w: World, rule: SourceRule) -> World:
    decision = rule(w.said_commit, w.heard)
    if decision is Decision.RESUME:
        return say(w, "withdrawn", source="back") if not w.said_commit else replace(w, source="back")
    if decision is Decision.GONE:
        return replace(w, source="gone")
    return replace(w, source="doubt")


def destination_steps(w: World, may_start: StartRule) -> Iterator[World]:
    if w.destination in ("building", "prepared"):
        if w.trouble_there:
            yield say(w, "refused", destination="refusing", refused=True)
        if w.forth:
            message, rest = w.forth[0], w.forth[1:]
            taken = replace(w, forth=rest)
            if message == "end" and w.destination == "building":
                yield replace(taken, destination="loading") if w.agent_b else replace(taken, destination="aborted")
            elif message == "commit" and may_start(True, w.refused):
                yield replace(taken, destination="starting")
            else:
                yield say(taken, "refused", destination="refusing", refused=True)
        elif w.cut or (w.destination == "building" and not w.agent_b):
            yield say(w, "refused", destination="refusing", refused=True)
    elif w.destination == "loading":
        yield say(w, "prepared", destination="prepared")
        yield say(w, "refused", destination="refusing", refused=True)  # it can't be loaded
    elif w.destination == "refusing":  # REFUSED is under way, what was built is taken down
        yield replace(w, destination="aborted")
        if "commit" in w.forth[:1] and may_start(True, w.refused):
            yield replace(w, forth=w.forth[1:], destination="starting")
    elif w.destination == "starting":
        yield say(w, "refused", destination="refusing", refused=True)  # a disk's lock is somebody else's
        yield say(w, "started", destination="running")


def inquiry_steps(w: World, rule: SourceRule, may_tell: TellRule) -> Iterator[World]:
    if w.answer is not Heard.NOTHING:
        yield decide(replace(w, answer=Heard.NOTHING, heard=w.answer), rule)
    elif can_be_asked(w):
        told = may_tell(w.destination == "running", w.refused)
        if told is not Heard.NOTHING:
            yield replace(w, answer=told)


def can_be_asked(w: World) -> bool:
    return w.destination_alive and w.listens and w.destination not in ("building", "loading")


def cuts(w: World) -> Iterator[World]:
    """The stream is cut at some place: of what is under way, some still arrives (a prefix: it is ordered), some not."""
    for forth in range(len(w.forth) + 1):
        for back in range(len(w.back) + 1):
            yield replace(w, cut=True, forth=w.forth[:forth], back=w.back[:back])


def handed_over(w: World) -> bool:
    return w.source not in ("copying", "paused")


def kills(w: World) -> Iterator[World]:
    """kill -9 of anything; an agent dies with its controller. And what people and clocks may do at any time."""
    if w.source_alive:
        yield from cuts(replace(w, source_alive=False, agent_a=False))
    if w.destination_alive:
        yield from cuts(replace(w, destination_alive=False, agent_b=False))
    if w.agent_a:
        dead = replace(w, agent_a=False)
        yield from [dead] if handed_over(w) else cuts(dead)
    if w.agent_b:
        dead = replace(w, agent_b=False)
        yield from cuts(dead) if w.destination == "building" else [dead]
    if w.relay:
        yield from cuts(replace(w, relay=False))
    if not w.cut:
        yield from cuts(w)
    if not w.trouble:
        yield replace(w, trouble=True)
    if w.listens:
        yield replace(w, listens=False)
    if w.answer is not Heard.NOTHING:
        yield replace(w, answer=Heard.NOTHING)
    if not w.trouble_there:
        yield replace(w, trouble_there=True)


def progress(w: World, rule: SourceRule, may_start: StartRule, may_tell: TellRule) -> Iterator[World]:
    if w.source_alive:
        yield from source_steps(w, rule)
    if w.in_doubt:
        yield from inquiry_steps(w, rule, may_tell)
    if w.destination_alive:
        yield from destination_steps(w, may_start)


def explore(
    rule: SourceRule = source_decision, may_start: StartRule = destination_may_start, may_tell: TellRule = outcome
) -> Worlds:
    """Every reachable world and its successors without a further kill."""
    seen: dict[World, list[World]] = {}
    waiting = [World()]
    while waiting:
        world = waiting.pop()
        if world not in seen:
            seen[world] = list(progress(world, rule, may_start, may_tell))
            waiting += [*seen[world], *kills(world)]
    return seen


def explore_with(
    rule: SourceRule = source_decision, may_start: StartRule = destination_may_start, may_tell: TellRule = outcome
) -> Callable[[], Worlds]:
    return lambda: explore(rule, may_start, may_tell)


@pytest.fixture(scope="module")
def worlds() -> dict[World, list[World]]:
    return explore()


@pytest.fixture(scope="module")
def ends(worlds) -> list[World]:
    return [world for world, successors in worlds.items() if not successors]


def test_the_model_reaches_what_it_is_about(worlds, ends):
    assert len(worlds) > 1000
    assert {w.source for w in worlds} == {
        *("copying", "paused", "waiting", "committing", "committed", "back", "gone", "doubt"),
    }
    assert {w.destination for w in worlds} == {
        *("building", "loading", "prepared", "starting", "running", "refusing", "aborted"),
    }
    for end in ("source_runs", "destination_runs", "in_doubt"):
        assert any(getattr(w, end) for w in ends)


def test_never_two_run_the_guest(worlds):
    assert not [w for w in worlds if w.source_runs and w.destination_runs]


def test_the_source_never_resumes_what_the_destination_may_still_start(worlds):
    for w in worlds:
        if w.source == "back" and w.destination_alive:
            assert w.destination != "starting", w
            assert "commit" not in w.forth or w.refused, w


def test_without_further_kills_one_runs_the_guest_or_its_only_owner_died_or_a_doubt_is_said(ends):
    for w in ends:
        if w.source_runs or w.destination_runs or w.in_doubt:
            continue
        if w.source_alive:
            # It has let go, so the destination said STARTED; that has died since.
            assert w.source == "gone" and w.destination == "running" and not w.destination_alive, w
        else:
            # The source was the only owner when it was killed: the destination had not been told to start, or refused.
            assert w.destination != "running" or not w.destination_alive, w


def test_a_doubt_is_said_only_after_commit_and_only_while_nothing_was_heard(worlds):
    doubts = [w for w in worlds if w.source == "doubt"]
    assert doubts
    assert all(w.said_commit and w.heard is Heard.END for w in doubts)


def test_a_doubt_is_a_doubt_in_both_directions(ends):
    """Of worlds that the source can't tell apart, in some the destination runs the guest and in some it does not."""
    doubts = [w for w in ends if w.in_doubt]
    assert any(w.destination_runs for w in doubts)
    assert any(not w.destination_runs and w.destination_alive for w in doubts)


def test_an_agent_decides_nothing_once_the_stream_is_handed_over(worlds):
    """With every process but the agents alive and nothing cut, the guest arrives whatever becomes of them."""
    for w in worlds:
        calm = not (w.cut or w.trouble or w.trouble_there or w.refused) and w.relay
        if calm and w.source == "waiting" and w.destination == "prepared" and w.source_alive and w.destination_alive:
            assert ("prepared" in w.back) and worlds[w], w
            assert any(after.source == "committing" for after in worlds[w])


@pytest.mark.parametrize("by", ["the stream", "a question"])
def test_a_late_answer_settles_a_doubt(worlds, by):
    asked = by == "a question"
    doubts = [w for w in worlds if w.in_doubt and (w.answer is not Heard.NOTHING) == asked and bool(w.back) != asked]
    settled = {after.source for w in doubts for after in worlds[w] if after.source != "doubt"}
    assert settled == {"gone", "back"}


def test_no_doubt_stays_while_the_destination_lives_and_can_be_asked(ends):
    assert not [w for w in ends if w.in_doubt and can_be_asked(w)]
    assert [w for w in ends if w.in_doubt and w.destination_alive]  # it listens no more


def test_what_is_answered_is_still_so_when_the_answer_arrives(worlds):
    for w in worlds:
        if w.answer is Heard.REFUSED:
            assert w.destination in ("refusing", "aborted") and w.refused, w
        if w.answer is Heard.STARTED:
            assert w.destination == "running", w


BROKEN = {
    "resume without an answer": explore_with(
        lambda committed, heard: Decision.RESUME if heard is Heard.END else source_decision(committed, heard)
    ),
    "resume after STARTED": explore_with(
        lambda committed, heard: Decision.WAIT if heard is Heard.NOTHING else Decision.RESUME
    ),
    "start after REFUSED was said": explore_with(may_start=lambda _commit, _refused: True),
    "tell a source that asks REFUSED because it has not started yet": explore_with(
        may_tell=lambda ours, _refused: Heard.STARTED if ours else Heard.REFUSED
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_model_notices_a_broken_commit_rule(name):
    assert [w for w in BROKEN[name]() if w.source_runs and w.destination_runs]


LOSING = {
    "the source lets go without an answer": explore_with(
        lambda committed, heard: Decision.GONE if committed else source_decision(committed, heard)
    ),
    "the destination tells a source that asks STARTED before it has": explore_with(
        may_tell=lambda _ours, refused: Heard.REFUSED if refused else Heard.STARTED
    ),
}


@pytest.mark.parametrize("name", LOSING)
def test_the_model_notices_a_guest_that_is_lost_though_both_controllers_live_and_nobody_says_so(name):
    worlds = LOSING[name]()
    lost = [
        w
        for w, successors in worlds.items()
        if not successors and w.source == "gone" and w.source_alive and w.destination_alive and not w.destination_runs
    ]
    assert lost
