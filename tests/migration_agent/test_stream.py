"""The stream over a real socket pair: frames with descriptors through, ends named, a slow reader waited for."""

from __future__ import annotations

import os
import socket

import pytest

from migration_agent.stream import Stream
from shared.errors import FlotillaError, MigrationError
from shared.handover import MAX_BODY, Message
from shared.linux import send_fds
from shared.reactor import Future, Reactor
from shared.wire import HEADER, Frame, Hello, encode, encode_hello

SECONDS = 20


@pytest.fixture
def reactor():
    made = Reactor()
    yield made
    made.close()


class End:
    """One stream and what it has said."""

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self.reactor = reactor
        self.items: list[Hello | Frame] = []
        self.ended: Future[FlotillaError] = Future()
        self._waiting: tuple[int, Future[None]] | None = None
        self.stream = Stream(reactor, sock, self._item, self.ended.set_result)

    def _item(self, item: Hello | Frame) -> None:
        self.items.append(item)
        if self._waiting is not None and len(self.items) >= self._waiting[0]:
            self._waiting[1].set_result(None)

    def wait(self, count: int) -> None:
        future: Future[None] = Future()
        self._waiting = (count, future)
        if len(self.items) < count:
            self.reactor.run_until(future, SECONDS)


@pytest.fixture
def ends(reactor):
    one, two = socket.socketpair()
    pair = End(reactor, one), End(reactor, two)
    yield pair
    for end in pair:
        end.stream.close()
        for item in end.items:
            if isinstance(item, Frame):
                for fd in item.fds:
                    os.close(fd)


def test_frames_with_descriptors_arrive_whole_and_in_order(reactor, ends):
    one, two = ends
    big = os.urandom(MAX_BODY)
    fds = [os.eventfd(7), os.eventfd(8)]
    one.stream.send(encode_hello())
    one.stream.send(encode(Message.BUILD, big, fds), fds)
    sent = one.stream.send(encode(Message.WITHDRAWN, b"end"))
    two.wait(3)
    reactor.run_until(sent, SECONDS)
    assert two.items[0] == Hello(1)
    frame = two.items[1]
    assert isinstance(frame, Frame) and frame.body == big
    assert [os.eventfd_read(fd) for fd in frame.fds] == [7, 8]
    assert two.items[2] == Frame(Message.WITHDRAWN, b"end")
    assert fds == []  # closed by the sender


def test_sent_is_known_only_when_the_kernel_has_all_of_it(reactor, ends):
    one, two = ends
    reactor.remove_reader(two.stream._sock.fileno())
    sent = one.stream.send(encode_hello() + encode(Message.STATE, bytes(MAX_BODY)))
    assert not sent.done() and one.stream.congested
    reactor.add_reader(two.stream._sock.fileno(), two.stream._read)
    reactor.run_until(sent, SECONDS)
    assert not one.stream.congested


def test_what_was_sent_before_a_close_still_arrives(reactor, ends):
    one, two = ends
    one.stream.send(encode_hello() + encode(Message.REFUSED, b"why"))
    two.stream.send(b"unread, which makes the close a reset")
    one.stream.close()
    error = reactor.run_until(two.ended, SECONDS)
    assert two.items == [Hello(1), Frame(Message.REFUSED, b"why")]
    assert isinstance(error, MigrationError)


def test_an_end_within_a_message_is_told_from_one_between_two(reactor, ends):
    one, two = ends
    one.stream.send(encode_hello())
    two.wait(1)
    one.stream.send(HEADER.pack(Message.STATE, 0, 10) + b"123")
    one.stream.close()
    assert "in the middle of a message" in str(reactor.run_until(two.ended, SECONDS))


def test_more_descriptors_than_any_message_has_are_refused(reactor):
    raw, theirs = socket.socketpair()
    end = End(reactor, theirs)
    event = os.eventfd(0)
    raw.sendall(encode_hello())
    end.wait(1)
    send_fds(raw, HEADER.pack(Message.BUILD, 64, 0), [event] * 100)
    assert "descriptors were lost" in str(reactor.run_until(end.ended, SECONDS))
    end.stream.close()
    raw.close()
    os.close(event)


def test_writing_to_a_peer_that_hung_up_fails_the_message(reactor, ends):
    one, two = ends
    two.stream.close()
    sent = one.stream.send(encode_hello() + bytes(MAX_BODY))
    with pytest.raises(MigrationError, match="connection to the peer"):
        reactor.run_until(sent, SECONDS)
    reactor.run_until(one.ended, SECONDS)


def test_what_the_peer_said_before_it_hung_up_comes_before_a_message_fails(reactor, ends):
    """Nothing of it had been read when the message was written."""
    one, two = ends
    two.stream.send(encode_hello() + encode(Message.REFUSED, b"why"))
    two.stream.close()
    known: list[list[Hello | Frame]] = []
    sent = one.stream.send(encode_hello())
    sent.add_done_callback(lambda _: known.append(list(one.items)))
    with pytest.raises(MigrationError, match="connection to the peer broke"):
        reactor.run_until(sent, SECONDS)
    assert known == [[Hello(1), Frame(Message.REFUSED, b"why")]]
    assert one.ended.done()


def test_a_message_to_a_peer_that_hung_up_fails_when_nothing_more_is_read(reactor, ends):
    one, two = ends
    two.stream.close()
    before = one.stream.send(encode_hello())
    one.stream.stop_reading()
    after = one.stream.send(encode(Message.END_OF_RAM))
    for sent in (before, after):
        with pytest.raises(MigrationError, match="connection to the peer broke"):
            reactor.run_until(sent, SECONDS)
