"""shared.visible: what others wrote, as one line that does nothing to a terminal."""

from __future__ import annotations

import pytest

from shared.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("ein Gerät, 3 µs", "ein Gerät, 3 µs"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J\x07\x00\x7f\x9b", "\\x1b[2J\\x07\\x00\\x7f\\x9b"),
        ("\u202eabc\u2028", "\\u202eabc\\u2028"),
        ("\udcff", "\\udcff"),
    ],
)
def test_letters_stay_and_what_controls_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(("text", "shown"), [("x" * 8, "x" * 8), ("x" * 9, "x" * 8 + "…"), ("\n" * 8, "\\n" * 4 + "…"),
                                             ("\n" * 4, "\\n" * 4)])  # fmt: skip
def test_it_is_no_longer_than_it_may_be(text: str, shown: str) -> None:
    assert visible(text, 8) == shown
