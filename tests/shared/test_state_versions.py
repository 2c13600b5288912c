"""shared.state_versions: which versions load, what becomes of an older one, and how the others are refused."""

from __future__ import annotations

import pytest

from shared.errors import ProtocolError
from shared.state_versions import KINDS, VM, StateKind, refusals


def add(key):
    return lambda state: {**state, key: len(state)}


CHAIN = StateKind("chain", (add("b"), add("c")), oldest=3)


def test_a_kind_without_upgrades_has_one_version():
    kind = StateKind("new")
    assert (kind.oldest, kind.version) == (1, 1)
    assert kind.upgrade(1, {"a": 0}) == {"a": 0}


@pytest.mark.parametrize(("version", "before"), [(3, {"a": 0}), (4, {"a": 0, "b": 1}), (5, {"a": 0, "b": 1, "c": 2})])
def test_every_known_version_goes_through_the_steps_that_it_lacks(version, before):
    assert CHAIN.version == 5
    given = dict(before)
    assert CHAIN.upgrade(version, given) == {"a": 0, "b": 1, "c": 2}
    assert given == before  # whoever keeps it may load it again


@pytest.mark.parametrize(
    ("version", "what_to_do"),
    [
        (6, "install the release that saved it here, or a newer one"),
        (2, "take it through a release that reads both"),
        (None, "no release of Flotilla"),
        ("5", "no release of Flotilla"),
        (True, "no release of Flotilla"),
    ],
)
def test_any_other_version_is_refused_by_name_with_ours_and_what_to_do(version, what_to_do):
    with pytest.raises(ProtocolError, match=f"chain state has version {version}, this release reads 3 to 5") as caught:
        CHAIN.upgrade(version, {})
    assert what_to_do in caught.value.hint


def test_a_state_that_a_step_cannot_read_is_refused_with_its_version():
    kind = StateKind("keys", (lambda state: {"new": state["old"]},))
    with pytest.raises(ProtocolError, match="keys state of version 1 can't be read: KeyError: 'old'"):
        kind.upgrade(1, {})


def test_what_a_peer_announces_is_refused_for_each_kind_by_name():
    known = {name: kind.version for name, kind in KINDS.items()}
    assert refusals(known) == [] and refusals({}) == []
    found = refusals({**known, "vm": VM.version + 1, "net_worker": 0, "gpu_worker": 1})
    assert [error.message.partition(" ")[0] for error in found] == ["gpu_worker", "net_worker", "vm"]
    assert "no kind that this release knows" in found[0].message and all(error.hint for error in found)


@pytest.mark.parametrize("versions", [None, [], 1, {1: 1}])
def test_an_announcement_that_is_no_map_of_kinds_is_refused(versions):
    with pytest.raises(ProtocolError, match="no map of kinds to versions"):
        refusals(versions)
