"""shared.records: what dataclasses and typing.NamedTuple would do, and what we do not take from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from shared.records import NamedTuple, Record, defaults, field, fields, replace


class Point(Record):
    x: int
    y: int = 0

    @property
    def total(self) -> int:
        return self.x + self.y


class Twin(Record):
    x: int
    y: int = 0


class Bag(Record, frozen=False):
    name: str
    items: list[int] = field(default_factory=list)


class Span(NamedTuple):
    """A tuple."""

    start: int
    size: int = 1

    @property
    def end(self) -> int:
        return self.start + self.size


def test_fields_by_position_by_name_and_by_default():
    assert (Point(1, 2).x, Point(1, y=3).y, Point(x=5).y, Point(1, 2).total) == (1, 3, 0, 3)
    assert fields(Point) == fields(Point(1)) == ("x", "y")
    assert defaults(Point) == {"y": 0}


def test_a_default_factory_is_called_for_each_instance():
    first, second = Bag("a"), Bag("b")
    first.items.append(1)
    assert second.items == []
    assert Bag("c", [7]).items == [7]


@pytest.mark.parametrize(
    ("arguments", "keywords", "named"),
    [((), {}, "x is missing"), ((1, 2, 3), {}, "3 values"), ((1,), {"z": 2}, "z"), ((1,), {"x": 2}, "x")],
)
@pytest.mark.parametrize("kind", [Point, Span])
def test_a_call_that_does_not_fit_is_a_type_error_that_says_why(kind: Any, arguments, keywords, named):
    if kind is Span:
        named, keywords = named.replace("x is", "start is"), {key.replace("x", "start"): 2 for key in keywords}
        named = "start" if named == "x" else named
    with pytest.raises(TypeError, match=named):
        kind(*arguments, **keywords)


def test_records_are_equal_by_value_and_only_within_their_class():
    assert Point(1, 2) == Point(1, 2) != Point(1, 3)
    assert Point(1, 2) != Twin(1, 2)
    assert Point(1, 2) != (1, 2)
    assert Bag("a", [1]) == Bag("a", [1])


def test_a_frozen_record_has_a_hash_and_a_changeable_one_has_none():
    assert {Point(1, 2): "here"}[Point(1, 2)] == "here"
    with pytest.raises(TypeError, match="unhashable"):
        hash(Bag("a"))


def test_a_frozen_record_refuses_every_change():
    point: Any = Point(1, 2)
    with pytest.raises(AttributeError, match=r"Point\.x"):
        point.x = 5
    with pytest.raises(AttributeError, match=r"Point\.x"):
        del point.x
    assert point == Point(1, 2)


def test_a_changeable_record_takes_a_change():
    bag = Bag("a")
    bag.name = "b"
    assert bag == Bag("b")


@pytest.mark.parametrize("instance", [Bag("a"), Span(1)])
def test_instances_have_slots_only(instance: Any):
    with pytest.raises(AttributeError):
        instance.unknown = 1
    assert not hasattr(instance, "__dict__")


def test_repr_is_the_call_that_would_make_it():
    assert repr(Bag("a", [1])) == "Bag(name='a', items=[1])"
    assert repr(Span(3)) == "Span(start=3, size=1)"


def test_replace_changes_a_copy():
    point, span = Point(1, 2), Span(1, 2)
    assert (replace(point, y=9), point) == (Point(1, 9), Point(1, 2))
    assert (span._replace(size=9), replace(span, size=9), span) == (Span(1, 9), Span(1, 9), Span(1, 2))
    with pytest.raises(TypeError, match="z"):
        replace(point, z=1)


def test_a_named_tuple_is_a_tuple():
    start, size = Span(4, 2)
    assert (start, size, Span(4, 2).end) == (4, 2, 6)
    assert Span(4, 2) == (4, 2)
    assert isinstance(copy.deepcopy(Span(4, 2)), Span)
    assert Span.__doc__ == "A tuple."


def test_both_match_by_position():
    match Point(1, 2), Span(3, 4):
        case Point(1, y), Span(start, 4):
            assert (y, start) == (2, 3)
        case _:
            pytest.fail("no match")


def test_records_do_not_inherit_fields():
    with pytest.raises(TypeError, match="Wide"):
        type(Point)("Wide", (Point,), {"__annotations__": {"z": "int"}})
