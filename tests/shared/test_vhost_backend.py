"""The back end's server, spoken to message by message, with a real device on real guest memory behind it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import vhost_user as vu
from shared.linux import memfd, recv_fds, send_fds
from shared.memory import GuestMemory
from shared.reactor import Future, Reactor
from shared.vhost_backend import SERVER_FEATURES, Server
from shared.vhost_user import Request as R
from tests.descriptors import descriptors
from tests.echo_backend import CONFIG, FEATURES, Echo
from tests.virtqueue import Driver

RAM = 1 << 20
UVA = 0x7000_0000_0000  # where the front end pretends to have guest memory
BOTH = FEATURES | vu.VHOST_USER_F_PROTOCOL_FEATURES
Reply = tuple[bytes, list[int]]


class Peer:
    """A front end by hand: one message at a time, replies read with plain system calls."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.echo = Echo(self.reactor)
        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        self.disconnected: list[Exception | None] = []
        self.server = Server(self.reactor, theirs, self.echo, self.disconnected.append)
        self.memory = GuestMemory.create(RAM)
        self.drivers: list[Driver] = []
        self.fds: list[int] = []

    def turn(self) -> None:
        """Let the server do all it can do now."""
        done: Future[None] = Future()
        self.reactor.call_later(0.0, lambda: self.reactor.call_soon(lambda: done.set_result(None)))
        self.reactor.run_until(done, 30.0)

    def post(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), *, ack: bool = False) -> None:
        flags = vu.VERSION | (vu.NEED_REPLY if ack else 0)
        send_fds(self.sock, struct.pack("=III", request, flags, len(payload)) + payload, list(fds))
        self.turn()

    def answer(self, request: int) -> Reply:
        head, fds = recv_fds(self.sock, 12, 8)
        got, flags, size = struct.unpack("=III", head)
        assert (got, flags) == (request, vu.VERSION | vu.REPLY)
        payload = self.sock.recv(size) if size else b""
        self.fds += fds
        return payload, fds

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.post(request, payload)
        return self.answer(request)[0]

    def acked(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """The back end's verdict on a request."""
        self.post(request, payload, fds, ack=True)
        return vu.unpack_u64(self.answer(request)[0])

    @property
    def silent(self) -> bool:
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def negotiate(self, features: int = BOTH) -> None:
        self.post(R.SET_PROTOCOL_FEATURES, vu.pack_u64(SERVER_FEATURES))
        assert self.acked(R.SET_OWNER) == 0
        assert self.acked(R.SET_FEATURES, vu.pack_u64(features)) == 0

    def region(self, gpa: int = 0, size: int = RAM) -> vu.MemoryRegion:
        return vu.MemoryRegion(gpa, size, UVA + gpa, 0)

    def set_memory(self) -> None:
        assert self.acked(R.SET_MEM_TABLE, vu.pack_regions([self.region()]), (self.memory.regions[0].fd,)) == 0

    def driver(self, index: int = 0) -> Driver:
        made = Driver(self.memory, 0x10000 + 0x10000 * index, index)
        self.drivers.append(made)
        return made

    def address(self, d: Driver, flags: int = 0) -> bytes:
        return vu.VringAddr(d.index, flags, UVA + d.desc, UVA + d.used, UVA + d.avail, d.used).pack()

    def configure(self, d: Driver, base: int = 0) -> None:
        assert self.acked(R.SET_VRING_NUM, vu.VringState(d.index, d.size).pack()) == 0
        assert self.acked(R.SET_VRING_ADDR, self.address(d)) == 0
        assert self.acked(R.SET_VRING_BASE, vu.VringState(d.index, base).pack()) == 0
        assert self.acked(R.SET_VRING_CALL, vu.pack_u64(d.index), (d.call_fd,)) == 0

    def start(self, d: Driver, base: int = 0) -> None:
        self.configure(d, base)
        assert self.acked(R.SET_VRING_KICK, vu.pack_u64(d.index), (d.kick_fd,)) == 0
        assert self.acked(R.SET_VRING_ENABLE, vu.VringState(d.index, 1).pack()) == 0

    def stop(self, d: Driver) -> int:
        return vu.VringState.unpack(self.ask(R.GET_VRING_BASE, vu.VringState(d.index, 0).pack())).num

    def echo_once(self, d: Driver, text: bytes) -> bytes:
        _, (target,) = d.add([text], [len(text)])
        d.kick()
        self.turn()
        ((_, written),) = d.completed()
        return self.memory.read(target, written)

    def close(self) -> None:
        self.server.close()
        self.sock.close()
        for d in self.drivers:
            d.close()
        for fd in self.fds:
            os.close(fd)
        self.memory.close()
        self.reactor.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


@pytest.fixture
def ready(peer: Peer) -> Peer:
    """Negotiated, with guest memory."""
    peer.negotiate()
    peer.set_memory()
    return peer


def test_features_are_the_devices_and_vhosts(peer: Peer) -> None:
    features = vu.unpack_u64(peer.ask(R.GET_FEATURES))
    assert features == FEATURES | vu.VHOST_F_LOG_ALL | vu.VHOST_USER_F_PROTOCOL_FEATURES
    assert vu.unpack_u64(peer.ask(R.GET_PROTOCOL_FEATURES)) == SERVER_FEATURES
    assert vu.unpack_u64(peer.ask(R.GET_QUEUE_NUM)) == 2


def test_the_device_never_sees_vhosts_own_bits(ready: Peer) -> None:
    assert ready.echo.acked == FEATURES


def test_a_feature_that_was_not_offered_is_refused(peer: Peer) -> None:
    peer.negotiate()
    assert peer.acked(R.SET_FEATURES, vu.pack_u64(BOTH | 1 << 40)) != 0


def test_without_reply_ack_a_refusal_closes_the_connection(peer: Peer) -> None:
    peer.post(R.SET_FEATURES, vu.pack_u64(1 << 40), ack=True)
    assert peer.sock.recv(1) == b""
    assert len(peer.disconnected) == 1


def test_a_set_request_without_need_reply_is_not_answered(peer: Peer) -> None:
    peer.negotiate()
    peer.post(R.SET_FEATURES, vu.pack_u64(BOTH))
    assert peer.silent


def test_a_request_is_served_and_interrupts(ready: Peer) -> None:
    d = ready.driver()
    ready.start(d)
    assert ready.echo_once(d, b"hello") == b"olleh"
    assert os.eventfd_read(d.call_fd) == 1


def test_a_ring_runs_only_when_kicked_and_enabled(ready: Peer) -> None:
    d = ready.driver()
    ready.configure(d)
    assert ready.acked(R.SET_VRING_ENABLE, vu.VringState(0, 1).pack()) == 0
    assert ready.echo.starts == 0
    assert ready.acked(R.SET_VRING_KICK, vu.pack_u64(0), (d.kick_fd,)) == 0
    assert ready.echo.starts == 1
    assert ready.acked(R.SET_VRING_ENABLE, vu.VringState(0, 0).pack()) == 0
    assert not ready.echo.rings


def test_without_protocol_features_rings_need_no_enable(peer: Peer) -> None:
    peer.post(R.SET_FEATURES, vu.pack_u64(FEATURES))
    peer.post(R.SET_MEM_TABLE, vu.pack_regions([peer.region()]), (peer.memory.regions[0].fd,))
    d = peer.driver()
    peer.post(R.SET_VRING_NUM, vu.VringState(0, d.size).pack())
    peer.post(R.SET_VRING_ADDR, peer.address(d))
    peer.post(R.SET_VRING_CALL, vu.pack_u64(0), (d.call_fd,))
    peer.post(R.SET_VRING_KICK, vu.pack_u64(0), (d.kick_fd,))
    assert peer.echo_once(d, b"old") == b"dlo"


def test_get_vring_base_stops_and_tells_where_to_go_on(ready: Peer) -> None:
    d = ready.driver()
    ready.start(d)
    for text in (b"a", b"b", b"c"):
        ready.echo_once(d, text)
    assert ready.stop(d) == 3
    d.add([b"late"], [4])
    d.kick()
    ready.turn()
    assert d.completed() == []
    assert ready.stop(d) == 3
    ready.start(d, 3)
    assert len(d.completed()) == 1


def test_after_a_stop_the_call_eventfd_is_let_go(ready: Peer) -> None:
    d = ready.driver()
    ready.start(d)
    before = ready.echo.started[0].call_fd
    ready.stop(d)
    os.eventfd_write(before, 1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(d.call_fd)


def test_a_new_call_eventfd_takes_over_without_a_stop(ready: Peer) -> None:
    d = ready.driver()
    ready.start(d)
    old, d.call_fd = d.call_fd, os.eventfd(0, os.EFD_NONBLOCK)
    ready.fds.append(old)
    assert ready.acked(R.SET_VRING_CALL, vu.pack_u64(0), (d.call_fd,)) == 0
    ready.echo_once(d, b"x")
    assert ready.echo.starts == 1
    assert os.eventfd_read(d.call_fd) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(old)


def test_suspend_holds_rings_back_and_resume_lets_them_go(ready: Peer) -> None:
    d, second = ready.driver(0), ready.driver(1)
    ready.start(d)
    ready.echo_once(d, b"one")
    assert ready.server.suspend() == {0: 1}
    ready.start(second)
    assert ready.echo.starts == 1
    d.add([b"two"], [3])
    d.kick()
    ready.turn()
    assert d.completed() == []
    ready.server.resume()
    assert ready.echo.starts == 3
    assert len(d.completed()) == 1


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("desc", UVA + RAM - 16),
        ("avail", UVA + RAM - 2),
        ("used", UVA + RAM - 4),
        ("desc", UVA - 16),
        ("used", (1 << 64) - 4),
        ("desc", UVA + 0x10008),
        ("used", UVA + 0x12002),
    ],
)
def test_rings_outside_memory_or_unaligned_are_refused(ready: Peer, part: str, where: int) -> None:
    d = ready.driver()
    ready.configure(d)
    addr = vu.VringAddr.unpack(ready.address(d))._replace(**{part: where})
    assert ready.acked(R.SET_VRING_ADDR, addr.pack()) == 0
    assert ready.acked(R.SET_VRING_ENABLE, vu.VringState(0, 1).pack()) == 0
    assert ready.acked(R.SET_VRING_KICK, vu.pack_u64(0), (d.kick_fd,)) != 0
    assert ready.echo.starts == 0


@pytest.mark.parametrize("size", [0, 3, 65536, 0xFFFF_FFFF])
def test_impossible_ring_sizes_are_refused(ready: Peer, size: int) -> None:
    assert ready.acked(R.SET_VRING_NUM, vu.VringState(0, size).pack()) != 0


def test_a_queue_that_the_device_has_not_got_is_refused(ready: Peer) -> None:
    assert ready.acked(R.SET_VRING_NUM, vu.VringState(2, 8).pack()) != 0
    assert ready.acked(R.SET_VRING_KICK, vu.pack_u64(0xFF), (ready.memory.regions[0].fd,)) != 0


def test_a_region_longer_than_its_file_is_refused(ready: Peer) -> None:
    """Mapping it would succeed, and the first touch beyond the end would be SIGBUS."""
    fd = memfd("short", 4096)
    ready.fds.append(fd)
    for size, offset in ((8192, 0), (4096, 4096), ((1 << 64) - 1, 0)):
        table = vu.pack_regions([vu.MemoryRegion(0, size, UVA, offset)])
        assert ready.acked(R.SET_MEM_TABLE, table, (fd,)) != 0
    assert ready.echo.mappings[0].size == RAM  # the old table stays


def test_regions_and_descriptors_must_match(ready: Peer) -> None:
    assert ready.acked(R.SET_MEM_TABLE, vu.pack_regions([ready.region()])) != 0


def test_a_new_memory_table_moves_running_rings(ready: Peer) -> None:
    d = ready.driver()
    ready.start(d)
    ready.echo_once(d, b"before")
    old = ready.echo.mappings[0].address
    ready.set_memory()
    assert ready.echo.mappings[0].address != old
    assert ready.echo_once(d, b"after") == b"retfa"


def test_a_ring_whose_memory_goes_away_stops_and_says_so(ready: Peer) -> None:
    d = ready.driver()
    ready.start(d)
    error_fd = os.eventfd(0, os.EFD_NONBLOCK)
    ready.fds.append(error_fd)
    assert ready.acked(R.SET_VRING_ERR, vu.pack_u64(0), (error_fd,)) == 0
    small = vu.pack_regions([ready.region(size=0x8000)])
    assert ready.acked(R.SET_MEM_TABLE, small, (ready.memory.regions[0].fd,)) == 0
    assert not ready.echo.rings
    assert os.eventfd_read(error_fd) == 1


def test_regions_are_added_and_removed_one_by_one(ready: Peer) -> None:
    extra = memfd("more", 0x4000)
    ready.fds.append(extra)
    d = ready.driver()
    ready.start(d)
    more = vu.MemoryRegion(0x1_0000_0000, 0x4000, UVA + (1 << 40), 0)
    assert vu.unpack_u64(ready.ask(R.GET_MAX_MEM_SLOTS)) >= 8
    assert ready.acked(R.ADD_MEM_REG, more.pack_single(), (extra,)) == 0
    assert [m.gpa for m in ready.echo.mappings] == [0, 0x1_0000_0000]
    assert ready.acked(R.ADD_MEM_REG, more.pack_single(), (extra,)) != 0  # overlaps itself
    assert ready.echo_once(d, b"still") == b"llits"
    assert ready.echo.starts == 1
    assert ready.acked(R.REM_MEM_REG, more.pack_single()) == 0
    assert ready.acked(R.REM_MEM_REG, more.pack_single()) != 0
    assert [m.gpa for m in ready.echo.mappings] == [0]


def test_pages_written_are_marked_in_the_dirty_log(ready: Peer) -> None:
    log = memfd("log", 4096)
    ready.fds.append(log)
    d = ready.driver()
    ready.start(d)
    ready.echo_once(d, b"unseen")
    ready.post(R.SET_LOG_BASE, vu.LogArea(4096, 0).pack(), (log,))
    ready.answer(R.SET_LOG_BASE)
    ready.echo_once(d, b"not logged before LOG_ALL")
    assert os.pread(log, 4096, 0) == bytes(4096)
    assert ready.acked(R.SET_FEATURES, vu.pack_u64(BOTH | vu.VHOST_F_LOG_ALL)) == 0
    assert ready.acked(R.SET_VRING_ADDR, ready.address(d, vu.VRING_F_LOG)) == 0
    d.next_buffer = 0x80FF0
    ready.echo_once(d, b"x" * 16)
    target = 0x81000
    bits = int.from_bytes(os.pread(log, 4096, 0), "little")
    assert bits == 1 << (d.used >> 12) | 1 << (target >> 12)
    assert ready.echo.starts == 1  # switching the log stops no ring
    assert ready.acked(R.SET_FEATURES, vu.pack_u64(BOTH)) == 0
    os.pwrite(log, bytes(4096), 0)
    ready.echo_once(d, b"y")
    assert os.pread(log, 4096, 0) == bytes(4096)


def test_set_log_base_is_always_answered(ready: Peer) -> None:
    """Front ends wait for it without asking for an acknowledgement."""
    fd = memfd("short-log", 4096)
    ready.fds.append(fd)
    ready.post(R.SET_LOG_BASE, vu.LogArea(1 << 20, 0).pack(), (fd,))
    assert vu.unpack_u64(ready.answer(R.SET_LOG_BASE)[0]) != 0


def test_configuration_is_read_and_written(ready: Peer) -> None:
    span = vu.ConfigSpan.unpack(ready.ask(R.GET_CONFIG, vu.ConfigSpan(4, 0, bytes(8)).pack()))
    assert span.data == CONFIG[4:12]
    assert ready.acked(R.SET_CONFIG, vu.ConfigSpan(0, 0, b"\xff").pack()) == 0
    assert ready.echo.config[0] == 0xFF
    assert ready.acked(R.SET_CONFIG, vu.ConfigSpan(12, 0, bytes(8)).pack()) != 0


def test_configuration_longer_than_the_devices_is_padded(ready: Peer) -> None:
    span = vu.ConfigSpan.unpack(ready.ask(R.GET_CONFIG, vu.ConfigSpan(0, 0, bytes(60)).pack()))
    assert span.data == CONFIG + bytes(44)


def test_a_config_change_reaches_the_front_ends_channel(ready: Peer) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert ready.acked(R.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),)) == 0
        ready.server.config_changed()
        assert struct.unpack("=III", ours.recv(64)) == (vu.BackendRequest.CONFIG_CHANGE_MSG, vu.VERSION, 0)


def test_an_inflight_region_is_made_for_who_asks(ready: Peer) -> None:
    ready.post(R.GET_INFLIGHT_FD, vu.InflightArea(0, 0, 2, 8).pack(), ack=True)
    payload, (fd,) = ready.answer(R.GET_INFLIGHT_FD)
    area = vu.InflightArea.unpack(payload)
    assert ready.silent  # one answer, although an acknowledgement was asked for
    assert os.fstat(fd).st_size == area.mmap_size == 2 * vu.inflight_stride(8)
    assert ready.acked(R.SET_INFLIGHT_FD, payload, (fd,)) == 0
    ready.start(ready.driver(0))
    ready.start(ready.driver(1))
    first, second = ready.echo.started[0], ready.echo.started[1]
    assert second.inflight - first.inflight == vu.inflight_stride(8)
    assert first.inflight_desc_num == 8


@pytest.mark.parametrize(
    "area",
    [
        vu.InflightArea(64, 0, 1, 8),
        vu.InflightArea(1 << 20, 0, 1, 8),
        vu.InflightArea(4096, 1 << 63, 1, 8),
        vu.InflightArea(1 << 40, 0, 65535, 65535),
    ],
)
def test_an_inflight_region_that_does_not_fit_its_file_is_refused(ready: Peer, area: vu.InflightArea) -> None:
    fd = memfd("inflight", 4096)
    ready.fds.append(fd)
    assert ready.acked(R.SET_INFLIGHT_FD, area.pack(), (fd,)) != 0


def test_a_ring_larger_than_its_inflight_region_is_refused(ready: Peer) -> None:
    fd = memfd("inflight", 4096)
    ready.fds.append(fd)
    assert ready.acked(R.SET_INFLIGHT_FD, vu.InflightArea(4096, 0, 1, 4).pack(), (fd,)) == 0
    d = ready.driver()
    ready.configure(d)
    ready.acked(R.SET_VRING_ENABLE, vu.VringState(0, 1).pack())
    assert ready.acked(R.SET_VRING_KICK, vu.pack_u64(0), (d.kick_fd,)) != 0


@pytest.mark.parametrize("request_", [R.RESET_DEVICE, R.RESET_OWNER])
def test_reset_stops_every_ring(ready: Peer, request_: R) -> None:
    ready.start(ready.driver(0))
    ready.start(ready.driver(1))
    assert ready.acked(request_) == 0
    assert not ready.echo.rings


def test_status_is_kept_and_zero_resets(ready: Peer) -> None:
    ready.start(ready.driver())
    assert ready.acked(R.SET_STATUS, vu.pack_u64(15)) == 0
    assert vu.unpack_u64(ready.ask(R.GET_STATUS)) == 15
    assert ready.acked(R.SET_STATUS, vu.pack_u64(0)) == 0
    assert not ready.echo.rings


def test_an_unknown_request_is_refused_and_its_descriptors_are_closed(ready: Peer) -> None:
    fd = memfd("stray-descriptor", 4096)
    before = descriptors()
    assert ready.acked(99, b"", (fd,)) != 0
    assert not descriptors() - before
    os.close(fd)


def guest_ram_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("ch_ram" in line for line in maps)


def test_the_end_of_the_front_end_stops_and_releases_everything(ready: Peer) -> None:
    ready.start(ready.driver())
    before = guest_ram_mappings()
    ready.sock.close()
    ready.turn()
    assert ready.disconnected == [None]
    assert not ready.echo.rings
    assert ready.echo.mappings == ()
    assert guest_ram_mappings() == before - 1  # the test's own stays


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from([*R, 0, 77]), st.binary(max_size=80), st.integers(0, 2), st.booleans()), max_size=8
    )
)
def test_no_sequence_of_messages_crashes_the_server(messages: list[tuple[int, bytes, int, bool]]) -> None:
    """Whatever comes, it is answered, ignored or ends the connection; nothing leaves the reactor as an exception."""
    peer = Peer()
    before = len(os.listdir("/proc/self/fd"))
    fd = memfd("any", 4096)
    try:
        peer.negotiate()
        peer.set_memory()
        peer.start(peer.driver())
        for request, payload, count, ack in messages:
            try:
                peer.post(request, payload, (fd,) * count, ack=ack)
            except (BrokenPipeError, ConnectionResetError):
                break
    finally:
        os.close(fd)
        peer.server.close()
        peer.server.close()
        assert peer.echo.mappings == ()
        peer.close()
    assert len(os.listdir("/proc/self/fd")) < before
