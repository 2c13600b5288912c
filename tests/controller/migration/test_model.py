"""Every interleaving of both controllers, both agents and every kill, over the ownership word: an exhaustive model.

What is modelled is what matters for the commit: the word, the state on its way (source controller, source agent,
stream, destination agent, destination controller), who is alive, who runs the guest. The controllers follow the real
rules (`source_action`, `destination_may_abort`); agents only carry. Any process can be killed between any two steps,
and either side can cancel or fail at any step where the real one can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from controller.migration.ownership import Action, Owner, destination_may_abort, source_action

Rule = Callable[[Owner, bool], Action]

# Where the message with the state is.
NOWHERE, AT_AGENT_A, IN_STREAM, AT_AGENT_B, DELIVERED, LOST = "nowhere", "A", "stream", "B", "delivered", "lost"


@dataclass(frozen=True, slots=True)
class World:
    word: Owner = Owner.SOURCE
    source: str = "building"  # building, ready, paused, offered, settling, back, gone, lost
    destination: str = "built"  # built, loading, loaded, claimed, running, given-up
    message: str = NOWHERE
    source_alive: bool = True
    destination_alive: bool = True
    agent_a: bool = True
    agent_b: bool = True
    source_trouble: bool = False  # something at the source's side went wrong or was cancelled
    destination_cancel: bool = False

    @property
    def source_runs(self) -> bool:
        return self.source_alive and self.source in ("building", "ready", "back")

    @property
    def destination_runs(self) -> bool:
        return self.destination_alive and self.destination == "running"


def source_steps(w: World, rule: Rule) -> Iterator[World]:
    if w.source == "building":
        yield replace(w, source="ready")
    elif w.source == "ready":
        yield replace(w, source="back" if w.source_trouble else "paused")
    elif w.source == "paused":
        if w.source_trouble:
            yield replace(w, source="settling")
        else:
            yield replace(w, source="offered", word=Owner.OFFERED)
    elif w.source == "offered":
        if w.message == NOWHERE and w.agent_a:
            yield replace(w, message=AT_AGENT_A)
        # STARTED, RUNNING by the eventfd, a dead agent, a dead destination, a deadline: all end in the same place.
        if w.source_trouble or w.word is Owner.RUNNING or not w.agent_a or not w.agent_b or not w.destination_alive:
            yield replace(w, source="settling")
        if w.destination == "given-up":
            yield replace(w, source="settling")
    elif w.source == "settling":
        yield from settle(w, rule)


def settle(w: World, rule: Rule) -> Iterator[World]:
    """A word that changes between the look and the swap makes the swap fail and nothing happen: not a step here."""
    for seen_ended in {not w.destination_alive, False}:  # it may have died right after we looked
        action = rule(w.word, seen_ended)
        if action is Action.GONE:
            yield replace(w, source="gone")
        elif action is Action.LOST:
            yield replace(w, source="lost")
        elif action is Action.TAKE_BACK:
            yield replace(w, source="back", word=Owner.SOURCE)


def destination_steps(w: World) -> Iterator[World]:
    source_ended = not w.source_alive
    if w.destination == "built":
        if w.message == DELIVERED:
            yield replace(w, destination="loading")
        elif w.destination_cancel or w.message == LOST or not w.agent_b or broken(w):
            yield replace(w, destination="given-up")
    elif w.destination == "loading":
        yield replace(w, destination="loaded")
        yield replace(w, destination="given-up" if destination_may_abort(False, True, source_ended) else "loaded")
    elif w.destination == "loaded":
        if destination_may_abort(w.destination_cancel, False, source_ended):
            yield replace(w, destination="given-up")
        elif w.word is Owner.OFFERED:
            yield replace(w, destination="claimed", word=Owner.CLAIMED)
        else:
            yield replace(w, destination="given-up")
    elif w.destination == "claimed":
        if w.word is Owner.CLAIMED:
            yield replace(w, destination="running", word=Owner.RUNNING)
            yield replace(w, destination="given-up", word=Owner.OFFERED)  # gives it back
        else:
            yield replace(w, destination="given-up")


def broken(w: World) -> bool:
    """No state will come any more: the source side is gone, and nothing of it is under way."""
    return (not w.agent_a or w.source in ("back", "settling")) and w.message in (NOWHERE, AT_AGENT_A)


def message_steps(w: World) -> Iterator[World]:
    if w.message == AT_AGENT_A:
        yield replace(w, message=IN_STREAM if w.agent_a else LOST)
    elif w.message == IN_STREAM:  # what the kernel has survives agent A
        yield replace(w, message=AT_AGENT_B if w.agent_b else LOST)
    elif w.message == AT_AGENT_B:
        yield replace(w, message=DELIVERED if w.agent_b else LOST)


def kills(w: World) -> Iterator[World]:
    """kill -9; an agent dies with its controller. And the requests that people may make at any time."""
    if w.source_alive:
        yield replace(w, source_alive=False, agent_a=False)
    if w.destination_alive:
        yield replace(w, destination_alive=False, agent_b=False)
    if w.agent_a:
        yield replace(w, agent_a=False)
    if w.agent_b:
        yield replace(w, agent_b=False)
    if not w.source_trouble:
        yield replace(w, source_trouble=True)
    if not w.destination_cancel:
        yield replace(w, destination_cancel=True)


def progress(w: World, rule: Rule) -> Iterator[World]:
    if w.source_alive:
        yield from source_steps(w, rule)
    if w.destination_alive:
        yield from destination_steps(w)
    yield from message_steps(w)


def explore(rule: Rule = source_action) -> dict[World, list[World]]:
    """Every reachable world and its successors without a further kill."""
    seen: dict[World, list[World]] = {}
    waiting = [World()]
    while waiting:
        world = waiting.pop()
        if world not in seen:
            seen[world] = list(progress(world, rule))
            waiting += [*seen[world], *kills(world)]
    return seen


WORLDS = explore()


def test_the_model_reaches_what_it_is_about():
    assert len(WORLDS) > 1000
    ends = {(w.source_runs, w.destination_runs) for w in WORLDS if not WORLDS[w]}
    assert {(True, False), (False, True), (False, False)} <= ends


def test_never_two_run_the_guest():
    assert not [w for w in WORLDS if w.source_runs and w.destination_runs]


def test_nobody_runs_it_while_the_word_is_on_its_way():
    assert not [w for w in WORLDS if w.source_runs and w.word is not Owner.SOURCE]
    assert not [w for w in WORLDS if w.destination_runs and w.word is not Owner.RUNNING]


def test_without_further_kills_everything_ends_with_one_guest_unless_its_only_owner_died():
    for world, successors in WORLDS.items():
        if successors or world.source_runs or world.destination_runs:
            continue
        if world.word is Owner.RUNNING:
            assert not world.destination_alive, world
        elif world.source_alive:
            raise AssertionError(f"the source lives and has not taken its guest back: {world}")
        else:
            # Its only owner was the source; whoever had the complete state was killed, too, or could not load it.
            assert not world.destination_alive or world.destination == "given-up", world


def test_a_destination_with_the_state_goes_on_when_the_source_dies():
    """Unless it can't load it, or the source took it back before it died."""
    for world in WORLDS:
        if world.destination == "loaded" and world.destination_alive and not world.source_alive:
            after = list(destination_steps(world))
            if world.word is Owner.OFFERED:
                assert [w.destination for w in after] == ["claimed"], world


def test_the_source_says_lost_only_when_it_is():
    for world in WORLDS:
        if world.source == "lost":
            assert world.word is Owner.RUNNING and not world.destination_alive
        if world.source == "gone":
            assert world.word is Owner.RUNNING


def test_every_settling_source_comes_to_an_end():
    """No cycle and no dead end but waiting for a living destination that has claimed it."""
    for world, successors in WORLDS.items():
        if world.source == "settling" and world.source_alive and not list(source_steps(world, source_action)):
            assert world.word is Owner.CLAIMED and world.destination_alive
            assert successors, world


def test_the_model_notices_a_source_that_takes_back_what_runs():
    worlds = explore(lambda _word, _ended: Action.TAKE_BACK)
    assert [w for w in worlds if w.source_runs and w.destination_runs]


def test_the_model_notices_a_source_that_waits_for_the_dead():
    worlds = explore(lambda word, ended: Action.WAIT if word is Owner.CLAIMED else source_action(word, ended))
    assert [w for w in worlds if not worlds[w] and w.source == "settling" and w.source_alive]
