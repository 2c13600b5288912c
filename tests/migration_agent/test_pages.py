"""Pages through two streams: rounds, messages between their frames, halts, and ends in the middle."""

from __future__ import annotations

import socket

import pytest

from migration_agent.pages import Pump, Sink
from migration_agent.stream import Stream
from shared.errors import FlotillaError, MigrationCancelled, ProtocolError
from shared.handover import Message
from shared.linux import bytes_at, memfd
from shared.pages import COUNTS, PAGE_SIZE, RUN, Bitmap, Regions
from shared.reactor import Future, Reactor
from shared.wire import HEADER, Frame, Hello, Item, encode, encode_hello

SECONDS = 20
SIZE = 16 << 20


@pytest.fixture
def reactor():
    made = Reactor()
    yield made
    made.close()


class End:
    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self.reactor = reactor
        self.items: list[Item] = []
        self.ended: Future[FlotillaError] = Future()
        self.got: Future[Frame] = Future()
        self.stream = Stream(reactor, sock, self._item, self.ended.set_result)

    def _item(self, item: Item) -> None:
        self.items.append(item)
        if isinstance(item, Frame) and item.type is Message.END_OF_RAM:
            self.got.set_result(item)


class Pair:
    def __init__(self, reactor: Reactor) -> None:
        self.source_fd, self.copy_fd = memfd("a", SIZE), memfd("b", SIZE)
        self.regions = Regions([(0, SIZE, 0, self.source_fd)], writable=True)
        size = Bitmap.bytes_for(SIZE)
        self.bits = Bitmap(memfd("bits", size), size)
        self.pump = Pump(self.regions, self.bits)
        self.copy = Regions([(0, SIZE, 0, self.copy_fd)], writable=True)
        self.sink = Sink(self.copy)
        one, two = socket.socketpair()
        self.one, self.two = End(reactor, one), End(reactor, two)
        self.two.stream.sink = self.sink
        self.one.stream.send(encode_hello())

    def fill(self, byte: int) -> None:
        bytes_at(self.regions.table[0].host, SIZE)[:] = bytes([byte]) * SIZE

    @property
    def arrived(self) -> bytes:
        return bytes(bytes_at(self.copy.table[0].host, SIZE))

    def close(self) -> None:
        self.one.stream.close()
        self.two.stream.close()
        self.pump.close()
        self.sink.close()


@pytest.fixture
def pair(reactor):
    made = Pair(reactor)
    yield made
    made.close()


def test_rounds_arrive_whole_and_an_end_of_ram_comes_after_them(reactor, pair):
    for byte in (3, 4):
        pair.fill(byte)
        pair.bits.set(0, SIZE)
        reactor.run_until(pair.one.stream.pump(pair.pump), SECONDS)
        assert pair.pump.moved.pages == SIZE // PAGE_SIZE
    pair.one.stream.send(encode(Message.END_OF_RAM))
    reactor.run_until(pair.two.got, SECONDS)
    assert pair.arrived == b"\4" * SIZE
    assert pair.sink.moved.pages == 2 * SIZE // PAGE_SIZE
    assert pair.sink.moved.bytes == 2 * pair.pump.moved.bytes


def test_a_message_overtakes_the_rest_of_a_round(reactor, pair):
    pair.fill(5)
    pair.bits.set(0, SIZE)
    done = pair.one.stream.pump(pair.pump)
    assert not done.done() and pair.pump.mid_frame  # the socket is full
    pair.one.stream.send(encode(Message.HEARTBEAT))
    reactor.run_until(done, SECONDS)
    pair.one.stream.send(encode(Message.END_OF_RAM))
    reactor.run_until(pair.two.got, SECONDS)
    kinds = [item.type if isinstance(item, Frame) else type(item).__name__ for item in pair.two.items[1:]]
    assert kinds.index(Message.HEARTBEAT) < 3 and kinds[-1] is Message.END_OF_RAM
    assert pair.arrived == b"\5" * SIZE


def test_a_halted_round_ends_between_two_frames_and_leaves_its_bits(reactor, pair):
    pair.fill(6)
    pair.bits.set(0, SIZE)
    done = pair.one.stream.pump(pair.pump)
    pair.pump.halt(MigrationCancelled("no more"))
    sent = pair.one.stream.send(encode(Message.END_OF_RAM))
    reactor.run_until(pair.two.got, SECONDS)
    with pytest.raises(MigrationCancelled):
        reactor.run_until(done, SECONDS)
    assert sent.done()
    left = pair.bits.count()
    assert 0 < left < SIZE // PAGE_SIZE
    assert pair.arrived.count(b"\6") == SIZE - left * PAGE_SIZE


def test_a_peer_that_hangs_up_ends_the_round_and_an_end_within_pages_is_named(reactor, pair):
    pair.fill(7)
    pair.bits.set(0, SIZE)
    done = pair.one.stream.pump(pair.pump)
    pair.two.stream.close()
    with pytest.raises(FlotillaError, match="connection to the peer"):
        reactor.run_until(done, SECONDS)


def test_what_the_peer_said_before_it_hung_up_comes_before_the_round_fails(reactor, pair):
    pair.fill(7)
    pair.bits.set(0, SIZE)
    pair.two.stream.send(encode_hello() + encode(Message.REFUSED, b"why"))
    pair.two.stream.close()
    known: list[list[Item]] = []
    done = pair.one.stream.pump(pair.pump)
    done.add_done_callback(lambda _: known.append(list(pair.one.items)))
    with pytest.raises(FlotillaError, match="connection to the peer broke"):
        reactor.run_until(done, SECONDS)
    assert known == [[Hello(1), Frame(Message.REFUSED, b"why")]]


@pytest.mark.parametrize("cut", [4, 12, 20, 40, 5000])
def test_a_stream_cut_within_pages_ends_with_a_reason(reactor, pair, cut):
    body = COUNTS.pack(1, 0) + RUN.pack(0, 2) + b"p" * (2 * PAGE_SIZE)
    data = HEADER.pack(Message.PAGES, 0, len(body)) + body
    pair.one.stream.send(data[:cut])
    pair.one.stream.close()
    assert "in the middle of a message" in str(reactor.run_until(pair.two.ended, SECONDS))


def test_pages_before_there_is_ram_are_refused(reactor, pair):
    pair.two.stream.sink = None
    pair.one.stream.send(HEADER.pack(Message.PAGES, 0, 8) + COUNTS.pack(0, 0))
    error = reactor.run_until(pair.two.ended, SECONDS)
    assert isinstance(error, ProtocolError) and "no RAM yet" in str(error)


def test_an_address_outside_ram_ends_the_stream_by_name(reactor, pair):
    body = COUNTS.pack(0, 1) + RUN.pack(SIZE, 1)
    pair.one.stream.send(HEADER.pack(Message.PAGES, 0, len(body)) + body)
    assert f"{SIZE:#x}" in str(reactor.run_until(pair.two.ended, SECONDS))


def test_a_detached_stream_takes_what_was_read_of_a_frame_along(reactor, pair):
    pair.one.stream.send(encode(Message.WITHDRAWN, b"half")[:9])
    while b"h" not in pair.two.stream._decoder.residue():
        reactor.run_until(_turn(reactor), SECONDS)
    sock, residue = pair.two.stream.detach()
    assert residue == encode(Message.WITHDRAWN, b"half")[:9]
    sock.close()


async def _turn(reactor: Reactor) -> None:
    future: Future[None] = Future()
    reactor.call_later(0.001, lambda: future.set_result(None))
    await future
