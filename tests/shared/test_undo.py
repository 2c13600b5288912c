from __future__ import annotations

import pytest

from shared.undo import Undo


def test_steps_are_taken_in_reverse_and_once() -> None:
    seen: list[int] = []
    undo = Undo()
    for number in (1, 2, 3):
        undo.add(seen.append, number)
    undo.close()
    undo.close()
    assert seen == [3, 2, 1]


def test_block_that_raises_is_undone_and_one_that_does_not_is_kept() -> None:
    seen: list[str] = []
    with Undo() as kept:
        kept.add(seen.append, "kept")
    with pytest.raises(KeyError), Undo() as undone:
        undone.add(seen.append, "undone")
        raise KeyError
    assert seen == ["undone"]


def test_step_that_raises_does_not_keep_the_others_from_being_taken() -> None:
    seen: list[int] = []
    undo = Undo()
    undo.add(seen.append, 1)
    undo.add({}.pop, "missing")
    undo.add(seen.append, 2)
    with pytest.raises(KeyError):
        undo.close()
    assert seen == [2, 1]
