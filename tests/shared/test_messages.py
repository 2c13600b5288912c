"""shared.messages: the schema, and that no bytes whatever get past decode() as anything but a message."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import errors, messages
from shared.errors import FlotillaError, ProtocolError, WorkerError
from shared.messages import ARGUMENTS, Verb, check_arguments, decode, encode, error_from_wire, error_to_wire

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "v"), values))
def test_what_is_encoded_is_decoded(message):
    assert decode(encode(message)) == {"v": messages.VERSION, **message}


@given(st.binary(max_size=200))
@example(b"\x81\x90\x00")  # a map whose key is a list
@example(b"\x81\x80\x00")  # a map whose key is a map
@example(b"\xc7\x0c\xff" + b"\xff" * 12)  # a timestamp out of range
@example(b"\xdd\xff\xff\xff\xff")  # a list of 4 billion elements
@example(b"\x91" * 2000)  # nested too deep
@example(b"\x81\xa1v" + b"\x91" * messages.MAX_DEPTH + b"\x90")
def test_garbage_is_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        decode(data)


@given(st.dictionaries(st.text(), values).filter(lambda message: message.get("v") != messages.VERSION))
def test_another_version_is_a_protocol_error(message):
    with pytest.raises(ProtocolError, match="version"):
        decode(msgpack.packb(message))


def test_too_long_a_message_is_refused_before_it_is_parsed():
    with pytest.raises(ProtocolError, match="limit 16777216"):
        decode(b"\xc1" * (messages.MAX_MESSAGE + 1))


def test_lists_and_maps_are_counted():
    """A byte each in the message, and sixty to a hundred in memory."""
    inside = {"a": [[]] * (messages.MAX_CONTAINERS - 3)}
    assert decode(encode({"ok": inside}))["ok"] == inside
    for more in ([[]], [{}]):
        with pytest.raises(ProtocolError, match="more than 65536 lists and maps"):
            decode(encode({"ok": {"a": [*inside["a"], *more]}}))


def test_lists_and_maps_inside_each_other_are_counted():
    """repr() and json recurse, and an error that nobody expects would end the reader."""
    value: object = {}
    for _ in range(messages.MAX_DEPTH - 2):
        value = [value]
    message = {"ok": value, **{str(number): [] for number in range(messages.MAX_DEPTH)}}
    assert decode(encode(message))["ok"] == value
    with pytest.raises(ProtocolError, match="more than 64 lists and maps inside each other"):
        decode(encode({**message, "ok": {"a": value}}))


def test_a_list_that_promises_more_than_there_is_allocates_nothing():
    data = (b"\xdd" + (1 << 20).to_bytes(4, "big")) * 900 + bytes(1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="not msgpack"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_peers_error_is_kept_in_part():
    wire = {"type": "WorkerError", "message": "m" * 100_000, "hint": "h" * 100_000, "causes": ["c" * 100_000] * 100_000}
    error = error_from_wire(wire)
    assert type(error) is WorkerError and len(errors.chain(error)) == 1 + messages.MAX_CAUSES
    assert max(map(len, (error.message, error.hint, *errors.chain(error)[1:]))) == messages.MAX_TEXT


def test_every_verb_has_its_row():
    assert set(ARGUMENTS) == set(Verb)


def test_unknown_fields_are_let_through_for_the_next_release():
    arguments = {"level": "debug", "since": 7}
    assert check_arguments(Verb.LOG_LEVEL, arguments) == arguments


@pytest.mark.parametrize("verb", [verb for verb in Verb if any(field.required for field in ARGUMENTS[verb])])
def test_a_missing_field_is_named(verb):
    first = next(field.name for field in ARGUMENTS[verb] if field.required)
    with pytest.raises(ProtocolError, match=f"{verb}: field {first} is missing"):
        check_arguments(verb, {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"level": 3}, "field level has type int"), ([], "arguments are not a map"), (None, "arguments are not a map")],
)
def test_a_wrong_type_is_named(arguments, said):
    with pytest.raises(ProtocolError, match=f"log-level: {said}"):
        check_arguments(Verb.LOG_LEVEL, arguments)


def test_an_unknown_verb_is_named():
    with pytest.raises(ProtocolError, match="unknown verb 'dance'"):
        check_arguments("dance", {})


def tree(cls=FlotillaError):
    return [cls, *(below for child in cls.__subclasses__() for below in tree(child))]


@pytest.mark.parametrize("cls", [cls for cls in tree() if cls.__module__ == "shared.errors"])
def test_an_error_arrives_as_the_class_that_was_raised(cls):
    try:
        try:
            raise OSError(2, "No such file")
        except OSError as cause:
            raise cls("what failed", "what to do") from cause
    except FlotillaError as raised:
        error = error_from_wire(decode(encode({"error": error_to_wire(raised)}))["error"])
    assert type(error) is cls
    assert errors.chain(error) == ["what failed (what to do)", "[Errno 2] No such file"]


def test_a_foreign_exception_arrives_as_a_workers_failure_that_names_it():
    error = error_from_wire(error_to_wire(ZeroDivisionError("by zero")))
    assert type(error) is WorkerError and error.message == "ZeroDivisionError: by zero"


@given(values | st.fixed_dictionaries({}, optional=dict.fromkeys(("type", "message", "hint", "causes"), values)))
@example({"type": "Exception"})
@example({"type": "chain"})
@example({"type": "__builtins__"})
def test_any_error_answer_gives_an_error_and_never_a_surprise(wire):
    assert isinstance(error_from_wire(wire), FlotillaError)
