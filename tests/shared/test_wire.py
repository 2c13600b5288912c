"""The framing: what one side writes the other reads, in whatever pieces it comes; everything else is refused early."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.handover import LIMITS, MAX_BODY, Message
from shared.wire import HEADER, Decoder, Frame, Hello, encode, encode_hello

frames = st.lists(
    st.sampled_from([m for m in Message if LIMITS[m].body and m is not Message.PAGES]).flatmap(
        lambda m: st.tuples(st.just(m), st.binary(max_size=300))
    ),
    max_size=6,
)


def read(decoder: Decoder, data: bytes, cuts: list[int]) -> list[Hello | Frame]:
    """Feed as a stream socket would: never more than is wanted, and cut at will."""
    items = []
    position = 0
    for number in range(1_000_000):
        if position == len(data):
            break
        size = min(decoder.wants, cuts[number % len(cuts)], len(data) - position)
        item = decoder.feed(data[position : position + size])
        position += size
        if item is not None:
            items.append(item)
    return items


@given(frames, st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_frames_survive_any_segmentation(sent, cuts):
    data = encode_hello() + b"".join(encode(kind, body) for kind, body in sent)
    decoder = Decoder()
    items = read(decoder, data, cuts)
    assert items == [Hello(1), *(Frame(kind, body) for kind, body in sent)]
    assert decoder.idle


@given(st.binary(max_size=400), st.booleans(), st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_no_bytes_raise_anything_but_protocol_error(data, greeted, cuts):
    decoder = Decoder()
    try:
        read(decoder, (encode_hello() if greeted else b"") + data, cuts)
    except ProtocolError:
        return
    assert decoder.wants >= 1


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1))
def test_a_header_announces_no_more_than_its_limit(kind, flags, length):
    decoder = Decoder()
    read(decoder, encode_hello(), [64])
    try:
        decoder.feed(HEADER.pack(kind, flags, length))
    except ProtocolError:
        return
    assert kind in iter(Message) and flags == 0 and length <= LIMITS[Message(kind)].body <= MAX_BODY


@pytest.mark.parametrize("first", [b"\x01\x00\x00\x00", b"X", b"FLOTILLE", b"flotilla", b"\x16\x03\x01"])
def test_a_stranger_is_told_at_the_first_wrong_byte(first):
    with pytest.raises(ProtocolError, match=f"first bytes are {first[:3].hex(' ')}"):
        Decoder().feed(first)


def test_cloud_hypervisors_stream_cannot_be_taken_for_ours():
    with pytest.raises(ProtocolError) as caught:
        Decoder().feed(b"\x01")
    assert "01" in str(caught.value)
    with pytest.raises(ProtocolError) as caught:
        Decoder().feed(b"\x01\x00")
    assert "Cloud Hypervisor" in caught.value.hint


def pipe_fds(count: int) -> list[int]:
    return [os.eventfd(0) for _ in range(count)]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_descriptors_come_with_the_header_and_belong_to_the_frame():
    decoder = Decoder()
    read(decoder, encode_hello(), [64])
    fds = pipe_fds(3)
    header = encode(Message.BUILD, b"body", fds)[: HEADER.size]
    assert decoder.feed(header[:3], fds[:2]) is None
    assert decoder.feed(header[3:], fds[2:]) is None
    frame = decoder.feed(b"body")
    assert isinstance(frame, Frame) and frame.fds == fds
    decoder.close()
    assert all(map(is_open, fds))
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("announced", [0, 1, 3, 64])
def test_descriptors_that_were_not_announced_are_refused_and_closed(announced):
    decoder = Decoder()
    read(decoder, encode_hello(), [64])
    fds = pipe_fds(2)
    with pytest.raises(ProtocolError, match=f"announces {announced} file descriptors and brings 2"):
        decoder.feed(HEADER.pack(Message.BUILD, announced, 4), fds)
    decoder.close()
    assert not any(map(is_open, fds))


def test_descriptors_in_the_hello_or_in_a_body_are_refused():
    decoder = Decoder()
    with pytest.raises(ProtocolError, match="came with the hello"):
        decoder.feed(encode_hello(), pipe_fds(1))
    decoder.close()
    decoder = Decoder()
    read(decoder, encode_hello(), [64])
    decoder.feed(HEADER.pack(Message.BUILD, 0, 4))
    with pytest.raises(ProtocolError, match="in the middle of a message"):
        decoder.feed(b"x", pipe_fds(1))
    decoder.close()


def test_nothing_that_a_peer_would_refuse_is_encoded():
    with pytest.raises(ProtocolError, match="limit"):
        encode(Message.REFUSED, bytes(LIMITS[Message.REFUSED].body + 1))
    with pytest.raises(ProtocolError, match="65 file descriptors"):
        encode(Message.BUILD, b"", range(65))
