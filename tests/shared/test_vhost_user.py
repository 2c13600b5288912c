"""Framing and payloads of vhost-user, on real sockets."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import vhost_user as vu
from shared.errors import ProtocolError
from shared.linux import send_fds
from shared.reactor import Future, Reactor
from shared.vhost_user import Connection, Message, Request

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


class Receiver:
    """A Connection whose messages are collected; `closed` becomes true or the error."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        ours, self.peer = socket.socketpair()
        self.messages: list[Message] = []
        self.closed: list[Exception | None] = []
        self.connection = Connection(self.reactor, ours, self.messages.append, self.closed.append)

    def run(self, condition: str) -> None:
        """Drive the reactor until `messages` or `closed` is not empty."""
        done: Future[None] = Future()

        def check() -> None:
            if getattr(self, condition):
                done.set_result(None)
            else:
                self.reactor.call_later(0.001, check)

        check()
        self.reactor.run_until(done, 30.0)

    def close(self) -> None:
        self.connection.close()
        self.peer.close()
        for message in self.messages:
            message.close_fds()
        self.reactor.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def open_files() -> str:
    """What the descriptors of this process are."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the listing's own
            pass
    return " ".join(names)


def header(request: int, size: int, flags: int = vu.VERSION) -> bytes:
    return struct.pack("=III", request, flags, size)


@given(U32, U32)
def test_vring_state_survives_the_wire(queue: int, num: int) -> None:
    state = vu.VringState(queue, num)
    assert vu.VringState.unpack(state.pack()) == state


@given(st.lists(st.tuples(U64, U64, U64, U64), max_size=vu.MAX_REGIONS))
def test_memory_table_survives_the_wire(regions: list[tuple[int, int, int, int]]) -> None:
    table = [vu.MemoryRegion(*region) for region in regions]
    assert vu.unpack_regions(vu.pack_regions(table)) == table


@given(st.integers(0, 200), st.binary(max_size=56))
def test_config_span_survives_the_wire(offset: int, data: bytes) -> None:
    span = vu.ConfigSpan(offset, 0, data)
    assert vu.ConfigSpan.unpack(span.pack()) == span


@given(U64, U64, U16, U16)
def test_inflight_area_is_read_with_and_without_its_padding(size: int, offset: int, queues: int, entries: int) -> None:
    area = vu.InflightArea(size, offset, queues, entries)
    assert len(area.pack()) == 24
    assert vu.InflightArea.unpack(area.pack()) == area
    assert vu.InflightArea.unpack(area.pack()[:20]) == area


@given(st.binary(max_size=300))
def test_no_payload_of_any_kind_raises_anything_but_protocol_error(payload: bytes) -> None:
    unpackers = (
        vu.unpack_u64, vu.VringState.unpack, vu.VringAddr.unpack, vu.unpack_regions, vu.LogArea.unpack,
        vu.MemoryRegion.unpack_single, vu.ConfigSpan.unpack, vu.InflightArea.unpack,
    )  # fmt: skip
    for unpack in unpackers:
        try:
            unpack(payload)
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    ("payload", "unpack"),
    [
        (vu.pack_u64(1) + b"\0", vu.unpack_u64),
        (struct.pack("=II", 9, 0) + bytes(9 * 32), vu.unpack_regions),
        (struct.pack("=II", 2, 0) + bytes(32), vu.unpack_regions),
        (struct.pack("=III", 250, 7, 0) + bytes(7), vu.ConfigSpan.unpack),
        (struct.pack("=III", 0, 8, 0) + bytes(7), vu.ConfigSpan.unpack),
    ],
)
def test_payload_of_the_wrong_length_is_refused(payload: bytes, unpack: object) -> None:
    assert callable(unpack)
    with pytest.raises(ProtocolError):
        unpack(payload)


def test_inflight_stride_is_that_of_the_specification() -> None:
    assert vu.inflight_stride(128) == 2112  # 16 + 128 * 16, rounded up to 64
    assert vu.inflight_stride(4) % 64 == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6), st.integers(1, 17))
def test_messages_survive_any_segmentation(payloads: list[bytes], step: int) -> None:
    receiver = Receiver()
    try:
        stream = b"".join(header(7 + n, len(p)) + p for n, p in enumerate(payloads))
        for start in range(0, len(stream), step):
            receiver.peer.sendall(stream[start : start + step])
            receiver.connection._readable()
        assert [(m.request, m.payload) for m in receiver.messages] == [(7 + n, p) for n, p in enumerate(payloads)]
    finally:
        receiver.close()


def test_descriptors_stay_with_their_message_when_many_are_pipelined(receiver: Receiver) -> None:
    """The kernel hands out the bytes of neighbours in one read unless the reader asks for no more than one message."""
    names = ["first", "second", "third"]
    for name in names:
        fd = os.memfd_create(name)
        send_fds(receiver.peer, header(1, 0), [])
        send_fds(receiver.peer, header(12, 8) + vu.pack_u64(0), [fd])
        os.close(fd)
    receiver.connection._readable()
    with_fds = [m for m in receiver.messages if m.request == 12]
    assert [len(m.fds) for m in receiver.messages] == [0, 1] * 3
    assert [os.readlink(f"/proc/self/fd/{m.fds[0]}").split(":")[1].split()[0] for m in with_fds] == names
    assert all(not os.get_inheritable(m.fds[0]) for m in with_fds)


@pytest.mark.parametrize(
    "stream",
    [header(1, 0, flags=0x2), header(5, vu.MAX_PAYLOAD + 1), header(24, 0xFFFF_FFFF)],
    ids=["version", "too-long", "4-GiB"],
)
def test_a_header_that_is_not_ours_ends_the_connection(receiver: Receiver, stream: bytes) -> None:
    receiver.peer.sendall(stream)
    receiver.run("closed")
    assert isinstance(receiver.closed[0], ProtocolError)
    assert not receiver.messages


def test_more_than_eight_descriptors_end_the_connection_and_leak_none(receiver: Receiver) -> None:
    before = set(os.listdir("/proc/self/fd"))
    fds = [os.memfd_create("too-many") for _ in range(9)]
    send_fds(receiver.peer, header(5, 4), fds)
    for fd in fds:
        os.close(fd)
    receiver.run("closed")
    assert receiver.closed[0] is not None
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


def test_eof_in_the_middle_of_a_message_closes_its_descriptors(receiver: Receiver) -> None:
    fd = os.memfd_create("orphan")
    send_fds(receiver.peer, header(5, 40) + bytes(8), [fd])
    os.close(fd)
    receiver.peer.close()
    receiver.run("closed")
    assert receiver.closed == [None]
    assert "orphan" not in open_files()


def test_what_the_socket_does_not_take_is_sent_later_with_its_descriptor(receiver: Receiver) -> None:
    """The socket is full of messages when one with a descriptor comes; that one arrives whole, in order, once."""
    receiver.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    receiver.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = 0
    while not receiver.connection._backlog:
        receiver.connection.send(Message(Request.SET_VRING_NUM, bytes(1000)))
        sent += 1
    fd = os.memfd_create("late")
    receiver.connection.send(Message(Request.SET_VRING_KICK, bytes(8)), (fd,))
    os.close(fd)
    arrived: list[Message] = []
    reader = vu._Assembler()
    done: Future[None] = Future()
    receiver.peer.setblocking(False)

    def drain() -> None:
        while (message := reader.read(receiver.peer)) is not None:
            arrived.append(message)
        if len(arrived) == sent + 1:
            done.set_result(None)

    receiver.reactor.add_reader(receiver.peer.fileno(), drain)
    receiver.reactor.run_until(done, 30.0)
    receiver.reactor.remove_reader(receiver.peer.fileno())
    assert [len(m.fds) for m in arrived] == [0] * sent + [1]
    assert not receiver.closed
    for message in arrived:
        message.close_fds()


def test_a_peer_that_never_reads_is_given_up(receiver: Receiver) -> None:
    for _ in range(2000):
        receiver.connection.send(Message(Request.SET_VRING_NUM, bytes(1000)))
    assert isinstance(receiver.closed[0], ProtocolError)
    assert len(receiver.closed) == 1
