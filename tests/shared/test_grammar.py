"""shared.grammar: option strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import grammar
from shared.errors import ConfigError
from shared.grammar import Converter, parse, split

KEYS: dict[str, Converter] = {
    "path": grammar.string,
    "readonly": grammar.toggle,
    "size": grammar.byte_size,
    "n": grammar.integer,
    "list": grammar.integer_list,
    "names": grammar.string_list,
    "pairs": grammar.tuple_list(grammar.integer, grammar.integer_list),
    "topology": grammar.colon_list(4),
    "mode": grammar.choice(byte_range=1, full=2),
    "later": grammar.not_yet(grammar.toggle, False),
}
BARE = {"off": 0, "tty": 1}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("path=a", {"path": "a"}),
        (" path=a,n=1 ", {"path": "a", "n": 1}),
        ('path="a,b",n=1', {"path": "a,b", "n": 1}),
        ('path="a=[b",n=1', {"path": "a=[b", "n": 1}),
        ("path=a=b", {"path": "a=b"}),
        ("path=,n=1", {"n": 1}),
        ("readonly=on", {"readonly": True}),
        ("readonly=TRUE", {"readonly": True}),
        ("readonly=Off", {"readonly": False}),
        ("readonly=false", {"readonly": False}),
        ("size=1", {"size": 1}),
        ("size=2K", {"size": 2048}),
        ("size=512M", {"size": 512 << 20}),
        ("size=4G", {"size": 4 << 30}),
        ("size=18446744073709551615", {"size": 2**64 - 1}),
        ("list=3", {"list": (3,)}),
        ("list=[0,2-4]", {"list": (0, 2, 3, 4)}),
        ("list=[]", {"list": ()}),
        ('names=[a,"b,c"]', {"names": ("a", "b,c")}),
        ("names=a", {"names": ("a",)}),
        ("pairs=[0@[1,2],1@[3]],n=7", {"pairs": ((0, (1, 2)), (1, (3,))), "n": 7}),
        ("pairs=[0@3]", {"pairs": ((0, (3,)),)}),
        ("topology=2:2:1:1", {"topology": (2, 2, 1, 1)}),
        ("mode=byte-range", {"mode": 1}),
        ("mode=FULL", {"mode": 2}),
        ("later=off", {"later": False}),
        ("tty", {"tty": 1}),
        ("off,n=2", {"off": 0, "n": 2}),
    ],
)
def test_options(text: str, found: dict[str, object]) -> None:
    assert parse(text, KEYS, BARE) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1", "Unknown option: speed"),
        ("path", "Invalid syntax: path"),
        ("path=a,", "Invalid syntax: path=a,"),
        ("path=a,path=b", "path is given twice"),
        ('path="a', "a double quote is not closed"),
        ("list=[1", "a square bracket has no partner"),
        ("list=1]", "a square bracket has no partner"),
        ("readonly=maybe", "Invalid value: maybe"),
        ("size=1T", "Unable to convert 1T for size"),
        ("size=K", "Unable to convert K for size"),
        ("size=1.5G", "Unable to convert 1.5G for size"),
        ("size=-1", "Unable to convert -1 for size"),
        ("size=18446744073709551616", "Unable to convert 18446744073709551616 for size"),
        ("size=17179869184G", "Unable to convert 17179869184G for size"),
        ("n=0x10", "Unable to convert 0x10 for n"),
        ("n=1_0", "Unable to convert 1_0 for n"),
        ("n=٣", "Unable to convert ٣ for n"),
        ("list=[4-2]", "Unable to convert [4-2] for list"),
        ("list=1-2", "Unable to convert 1-2 for list"),
        ("list=[0-99999999999]", "Unable to convert [0-99999999999] for list"),
        ("list=[a]", "Unable to convert [a] for list"),
        ("pairs=0@3", "Unable to convert 0@3 for pairs"),
        ("pairs=[0]", "Unable to convert [0] for pairs"),
        ("pairs=[@1]", "Unable to convert [@1] for pairs"),
        ("topology=1:2:3", "Unable to convert 1:2:3 for topology"),
        ("topology=1:2:3:x", "Unable to convert 1:2:3:x for topology"),
        ("mode=half", "mode is one of byte-range, full"),
        ("later=on", "later=on is not available yet in this version of Flotilla"),
        ("tty=1", "Unknown option: tty"),
    ],
)
def test_bad_options_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, KEYS, BARE)
    assert message in str(caught.value)


def test_a_tilde_is_the_home_folder_at_the_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-a-test")
    assert grammar.path("path", "~/a") == "/home-of-a-test/a"
    assert grammar.path("path", '"~/a,b"') == "/home-of-a-test/a,b"
    assert grammar.path("path", "/x/~/a") == "/x/~/a"
    assert grammar.path("path", "~root/a") == "~root/a"


words = st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), max_size=12)


@given(st.lists(words))
def test_quoted_words_come_back_from_a_list(items: list[str]) -> None:
    text = ",".join(f'"{item}"' for item in items)
    assert grammar.string_list("names", f"[{text}]") == tuple(items)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), words.filter(bool)))
def test_quoted_values_come_back_from_options(options: dict[str, str]) -> None:
    text = ",".join(f'{key}="{value}"' for key, value in options.items())
    assert parse(text, dict.fromkeys("abcd", grammar.string)) == options


@given(st.integers(0, 2**64 - 1), st.sampled_from([("", 0), ("K", 10), ("M", 20), ("G", 30)]))
def test_sizes_come_back(number: int, unit: tuple[str, int]) -> None:
    text = f"{number}{unit[0]}"
    if number << unit[1] < 2**64:
        assert grammar.byte_size("size", text) == number << unit[1]
    else:
        with pytest.raises(ConfigError):
            grammar.byte_size("size", text)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 40), st.integers(0, 20)), max_size=8))
def test_integer_lists_come_back(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{low}-{low + more}" if more else str(low) for low, more in ranges)
    expected = [number for low, more in ranges for number in range(low, low + more + 1)]
    assert grammar.integer_list("list", f"[{text}]") == tuple(expected)


@given(st.text(max_size=40))
def test_split_loses_nothing(text: str) -> None:
    try:
        parts = split(text)
    except ConfigError:
        return
    assert ",".join(parts) == text


fragments = st.sampled_from(
    [*KEYS, *BARE, *'=,"[]@-:~', "0", "7", "99999999999999999999999", "on", "K", " ", "٣"]
)


@given(st.lists(fragments).map("".join) | st.text())
def test_any_text_is_options_or_a_config_error(text: str) -> None:
    try:
        found = parse(text, KEYS, BARE)
    except ConfigError as error:
        assert str(error)
    else:
        assert set(found) <= {*KEYS, *BARE}
