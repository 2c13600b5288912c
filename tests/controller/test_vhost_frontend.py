"""The front end against our own server, with deaths of the back end."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controller.pci.virtio import Virtqueue
from controller.vhost_frontend import dial
from shared import vhost_backend
from shared import vhost_user as vu
from shared.errors import BadGuestAddress, HostError, ProtocolError, Timeout, WorkerLost
from shared.linux import memfd, send_fds
from shared.reactor import within
from shared.vhost_backend import _HANDLERS, Server
from tests.controller.vhost_rig import RAM, Rig, pages
from tests.echo_backend import CONFIG, FEATURES, Echo, drained


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_connect_learns_what_the_back_end_offers(rig: Rig) -> None:
    rig.run(rig.frontend.connect(rig.back_end()))
    assert rig.frontend.features & FEATURES == FEATURES
    assert rig.frontend.max_queues == 2
    assert rig.frontend.can_log
    assert rig.run(rig.frontend.get_config(8)) == [CONFIG[:8]]


def test_activation_runs_every_queue_with_the_acknowledged_features(rig: Rig) -> None:
    rig.up()
    assert rig.echo.acked == FEATURES
    assert rig.echo_once(b"hello", 0) == b"olleh"
    assert rig.echo_once(b"world", 1) == b"dlrow"


def test_only_the_queues_of_the_driver_are_started(rig: Rig) -> None:
    rig.run(rig.frontend.connect(rig.back_end()), rig.frontend.activate(FEATURES, rig.queues()[1:]))
    assert set(rig.echo.rings) == {1}


def test_stop_gives_bases_and_resume_goes_on_from_them(rig: Rig) -> None:
    rig.up()
    rig.echo_once(b"a")
    rig.echo_once(b"b")
    assert rig.run(rig.frontend.stop()) == [{0: 2, 1: 0}]
    assert rig.frontend.bases == {0: 2, 1: 0}
    rig.drivers[0].add([b"while stopped"], [13])
    rig.drivers[0].kick()
    rig.run(rig.frontend.resume())
    rig.until(lambda: rig.drivers[0].used_idx() == 3)
    assert rig.frontend.bases == {}


def test_reset_stops_the_rings_and_a_new_driver_starts_at_zero(rig: Rig) -> None:
    rig.up()
    rig.echo_once(b"a")
    rig.run(rig.frontend.reset())
    assert not rig.echo.rings
    d = rig.drivers[0]
    rig.memory.write(d.avail, bytes(64))
    rig.memory.write(d.used, bytes(64))
    d.avail_index = d.used_index = 0
    rig.run(rig.frontend.activate(FEATURES, rig.queues()))
    assert rig.echo_once(b"again") == b"niaga"


def test_nothing_is_left_open_by_resets_deaths_and_logs(rig: Rig) -> None:
    log = memfd("log", 4096)
    rig.up()

    def descriptors() -> int:
        rig.run(rig.frontend.reset(), rig.frontend.activate(FEATURES, rig.queues()))
        rig.run(rig.frontend.start_logging(log, 4096), rig.frontend.stop_logging())
        rig.kill()
        rig.until(lambda: bool(rig.lost))
        rig.lost.clear()
        rig.run(rig.frontend.replay(rig.back_end()))
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # what the tests before have left must not be closed between two looks
    assert len({descriptors() for _ in range(4)}) == 1
    os.close(log)


def test_a_restored_device_goes_on_where_its_used_ring_ends(rig: Rig) -> None:
    d = rig.drivers[0]
    d.avail_index = d.used_index = 7
    rig.memory.view(d.avail, 4).cast("H")[1] = 7
    rig.memory.view(d.used, 4).cast("H")[1] = 7
    rig.run(rig.frontend.connect(rig.back_end()), rig.frontend.activate(FEATURES, rig.queues(), restored=True))
    assert [rig.echo.started[n].base for n in (0, 1)] == [7, 0]
    assert drained(d.call_fd) >= 1  # an interrupt may have been lost on the way
    assert rig.echo_once(b"on") == b"no"


def test_saved_bases_win_over_the_used_ring(rig: Rig) -> None:
    rig.memory.view(rig.drivers[0].used, 4).cast("H")[1] = 7
    rig.memory.view(rig.drivers[0].avail, 4).cast("H")[1] = 9
    rig.run(
        rig.frontend.connect(rig.back_end(Echo(rig.reactor, lazy=True))),
        rig.frontend.activate(FEATURES, rig.queues(), {0: 9}, restored=True),
    )
    assert rig.echo.started[0].base == 9


def test_rings_outside_memory_fail_the_activation_and_start_nothing(rig: Rig) -> None:
    rig.run(rig.frontend.connect(rig.back_end()))
    good, bad = rig.queues()
    beyond = Virtqueue(1, 8, RAM, bad.avail, bad.used, bad.kick_fd, bad.call_fd)
    with pytest.raises(BadGuestAddress):
        rig.run(rig.frontend.activate(FEATURES, (good, beyond)))
    assert rig.echo.starts == 0
    assert not rig.frontend.active


def test_a_refused_activation_leaves_no_ring_running(rig: Rig) -> None:
    rig.run(rig.frontend.connect(rig.back_end()))
    good, other = rig.queues()
    too_many = Virtqueue(2, 8, other.desc, other.avail, other.used, other.kick_fd, other.call_fd)
    with pytest.raises(ProtocolError, match="_disk0: the back end refused SET_VRING_NUM"):
        rig.run(rig.frontend.activate(FEATURES, (good, too_many)))
    assert not rig.echo.rings
    assert not rig.frontend.active


# Death of the back end ------------------------------------------------------------------------------------------


def test_a_death_is_reported_once_and_the_successor_goes_on(rig: Rig) -> None:
    rig.up()
    rig.echo_once(b"first")
    rig.kill()
    rig.until(lambda: bool(rig.lost))
    d = rig.drivers[0]
    drained(d.call_fd)
    d.add([b"while dead"], [10])
    d.kick()
    rig.run(rig.frontend.replay(rig.back_end()))
    rig.until(lambda: d.used_idx() == 2)
    assert rig.lost == [None]
    assert rig.echo.started[0].base == 1
    assert drained(d.call_fd) >= 1
    d.completed()
    assert rig.echo_once(b"after") == b"retfa"


def test_a_request_that_was_popped_but_not_completed_is_served_by_the_successor(rig: Rig) -> None:
    rig.run(rig.frontend.connect(rig.back_end(Echo(rig.reactor, lazy=True))))
    rig.run(rig.frontend.activate(FEATURES, rig.queues()))
    d = rig.drivers[0]
    _, (target,) = d.add([b"held"], [4])
    d.kick()
    rig.kill()
    rig.run(rig.frontend.replay(rig.back_end()))
    rig.until(lambda: d.used_idx() == 1)
    assert rig.memory.read(target, 4) == b"dleh"


def test_the_inflight_region_survives_the_back_end(rig: Rig) -> None:
    rig.up()
    region = rig.echo.started[1].inflight
    assert region
    marker = b"inflight"
    ctypes.memmove(region + vu.INFLIGHT_HEADER_SIZE, marker, 8)
    rig.kill()
    rig.run(rig.frontend.replay(rig.back_end()))
    again = rig.echo.started[1].inflight
    assert ctypes.string_at(again + vu.INFLIGHT_HEADER_SIZE, 8) == marker


def test_a_reset_device_gets_a_clean_inflight_region(rig: Rig) -> None:
    rig.up()
    ctypes.memset(rig.echo.started[0].inflight, 0xFF, 64)
    rig.run(rig.frontend.reset(), rig.frontend.activate(FEATURES, rig.queues()))
    assert ctypes.string_at(rig.echo.started[0].inflight, 64) == bytes(64)


def test_activation_waits_for_a_successor(rig: Rig) -> None:
    """The vCPU that wrote DRIVER_OK waits a little longer; the guest sees nothing else."""
    rig.run(rig.frontend.connect(rig.back_end()))
    rig.kill()
    rig.until(lambda: bool(rig.lost))
    activation = rig.reactor.spawn(rig.frontend.activate(FEATURES, rig.queues()))
    rig.run(rig.frontend.replay(rig.back_end()), activation)
    assert rig.echo_once(b"late") == b"etal"


@pytest.mark.parametrize("after", range(1, 24))
def test_a_death_at_any_message_of_the_activation_is_survived(rig: Rig, after: int) -> None:
    """The back end dies after it has handled `after` messages since the activation began."""
    rig.run(rig.frontend.connect(rig.back_end()))
    server, handled = rig.servers[-1], 0
    original = server._on_message

    def count(message: vu.Message) -> None:
        nonlocal handled
        original(message)
        handled += 1
        if handled == after:
            server.close()

    server._connection._on_message = count
    activation = rig.reactor.spawn(rig.frontend.activate(FEATURES, rig.queues()))
    rig.until(lambda: bool(rig.lost) or activation.done())
    if rig.lost:
        rig.run(rig.frontend.replay(rig.back_end()))
    rig.run(activation)
    assert rig.echo_once(b"ok") == b"ko"
    assert rig.echo_once(b"two", 1) == b"owt"


def test_stop_waits_for_the_successor_of_a_back_end_that_died(rig: Rig) -> None:
    rig.up()
    rig.echo_once(b"one")
    rig.kill()
    stop = rig.reactor.spawn(rig.frontend.stop())
    rig.until(lambda: bool(rig.lost))
    assert not stop.done()
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.run(stop) == [{0: 1, 1: 0}]
    assert not rig.echo.rings


def test_stop_has_a_deadline_and_can_be_asked_again(rig: Rig) -> None:
    rig.up()
    rig.kill()
    with pytest.raises(Timeout):
        rig.run(rig.frontend.stop(0.05))
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.run(rig.frontend.stop()) == [{0: 0, 1: 0}]


def test_a_back_end_that_says_nonsense_while_it_stops_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the rings have stopped, and which nobody knows: the successor runs all of them."""
    rig.up()
    rig.echo_once(b"one")
    stop = vhost_backend._HANDLERS[vu.Request.GET_VRING_BASE]

    def lie(server: vhost_backend.Server, message: vu.Message) -> bytes:
        stop(server, message)
        return vu.VringState(0, 0).pack()

    with monkeypatch.context() as patch:
        patch.setitem(vhost_backend._HANDLERS, vu.Request.GET_VRING_BASE, lie)
        with pytest.raises(ProtocolError, match="asked for queue 1, told of 0"):
            rig.run(rig.frontend.stop())
    assert [type(error) for error in rig.lost] == [ProtocolError]
    rig.run(rig.frontend.resume(), rig.frontend.replay(rig.back_end()))
    assert rig.echo_once(b"two") == b"owt"
    assert rig.echo_once(b"two", 1) == b"owt"


def test_a_stopped_device_stays_stopped_over_a_death(rig: Rig) -> None:
    rig.up()
    rig.echo_once(b"one")
    rig.run(rig.frontend.stop())
    rig.kill()
    rig.until(lambda: bool(rig.lost))
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.echo.starts == 0
    rig.run(rig.frontend.resume())
    assert rig.echo.started[0].base == 1
    assert rig.echo_once(b"two") == b"owt"


def test_giving_up_fails_who_waits_and_lets_a_reset_pass(rig: Rig) -> None:
    rig.up()
    rig.kill()
    rig.until(lambda: bool(rig.lost))
    stop = rig.reactor.spawn(rig.frontend.stop())
    stop.add_done_callback(lambda _: None)
    rig.frontend.give_up(HostError("no successor"))
    with pytest.raises(HostError, match="no successor"):
        rig.run(stop)
    rig.run(rig.frontend.reset())
    assert not rig.frontend.active


def test_a_successor_that_lacks_negotiated_features_is_refused(rig: Rig) -> None:
    rig.up()
    rig.kill()
    poorer = Echo(rig.reactor)
    poorer.features = 1 << 32
    with pytest.raises(HostError, match="lacks features 0x1 "):
        rig.run(rig.frontend.replay(rig.back_end(poorer)))
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.echo_once(b"x") == b"x"


def test_a_back_end_that_closes_during_negotiation_raises_and_is_not_reported(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(WorkerLost):
        rig.run(rig.frontend.connect(ours))
    assert rig.lost == []


def test_a_back_end_that_talks_nonsense_is_dropped(rig: Rig) -> None:
    rig.up()
    server = rig.servers[-1]
    server._connection.send(vu.Message(vu.Request.GET_FEATURES, vu.pack_u64(0), vu.VERSION | vu.REPLY))
    rig.until(lambda: bool(rig.lost))
    assert isinstance(rig.lost[0], ProtocolError)


def test_a_hung_back_end_is_given_up_after_the_deadline(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.up()
    with monkeypatch.context() as patch:
        patch.setattr("controller.vhost_frontend.SECONDS", 0.05)
        rig.servers[-1]._connection._on_message = vu.Message.close_fds
        asked = rig.reactor.spawn(rig.frontend.get_config(4))
        rig.until(lambda: bool(rig.lost))
    assert isinstance(rig.lost[0], Timeout)
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.run(asked) == [CONFIG[:4]]


def refuse(monkeypatch: pytest.MonkeyPatch, request: vu.Request) -> Callable[[], None]:
    """Every back end refuses this message until what is returned is called."""
    refusing = True

    def handler(server: Server, message: vu.Message) -> bytes | vu.Message | None:
        if refusing:
            raise ProtocolError("not any more")
        return before(server, message)

    def end() -> None:
        nonlocal refusing
        refusing = False

    before = _HANDLERS[request]
    monkeypatch.setitem(_HANDLERS, request, handler)
    return end


def test_a_back_end_that_refuses_to_resume_is_given_up_and_its_successor_runs(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.up()
    rig.echo_once(b"one")
    rig.run(rig.frontend.stop())
    obey = refuse(monkeypatch, vu.Request.SET_VRING_KICK)
    with pytest.raises(ProtocolError, match="refused SET_VRING_KICK"):
        rig.run(rig.frontend.resume())
    assert isinstance(rig.lost[0], ProtocolError) and not rig.frontend.connected
    rig.run(rig.frontend.resume())
    obey()
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.echo.started[0].base == 1
    assert rig.echo_once(b"two") == b"owt"
    assert len(rig.lost) == 1


def test_a_back_end_that_does_not_answer_the_resume_is_given_up_when_nobody_waits_any_more(rig: Rig) -> None:
    rig.up()
    rig.run(rig.frontend.stop())
    rig.servers[-1]._connection._on_message = vu.Message.close_fds
    with pytest.raises(Timeout):
        rig.run(within(rig.reactor, 0.05, rig.frontend.resume(), "resume"))
    assert isinstance(rig.lost[0], Timeout)
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.echo_once(b"two") == b"owt"


def test_a_back_end_that_refuses_to_stop_is_given_up_and_its_successor_runs(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its rings may have been stopped."""
    rig.up()
    rig.echo_once(b"one")
    stop = _HANDLERS[vu.Request.GET_VRING_BASE]
    answer = vu.VringState(1, 5).pack()
    with monkeypatch.context() as patch:
        patch.setitem(_HANDLERS, vu.Request.GET_VRING_BASE, lambda s, m: stop(s, m) and answer)
        with pytest.raises(ProtocolError, match="asked for queue 0, told of 1"):
            rig.run(rig.frontend.stop())
    assert isinstance(rig.lost[0], ProtocolError)
    rig.run(rig.frontend.resume(), rig.frontend.replay(rig.back_end()))
    assert rig.echo_once(b"two") == b"owt"
    assert rig.run(rig.frontend.stop()) == [{0: 2, 1: 0}]


def test_a_back_end_that_refuses_a_restored_device_is_given_up_and_its_successor_runs(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.run(rig.frontend.connect(rig.back_end()))
    obey = refuse(monkeypatch, vu.Request.SET_VRING_ADDR)
    with pytest.raises(ProtocolError, match="refused SET_VRING_ADDR"):
        rig.run(rig.frontend.activate(FEATURES, rig.queues(), restored=True))
    assert isinstance(rig.lost[0], ProtocolError) and rig.frontend.active
    obey()
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.echo_once(b"on") == b"no"


def test_a_restored_device_whose_back_end_is_away_runs_when_it_comes_although_nobody_waits_any_more(rig: Rig) -> None:
    rig.run(rig.frontend.connect(rig.back_end()))
    rig.kill()
    rig.until(lambda: bool(rig.lost))
    with pytest.raises(Timeout):
        activation = rig.frontend.activate(FEATURES, rig.queues(), restored=True)
        rig.run(within(rig.reactor, 0.05, activation, "activation"))
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.echo_once(b"on") == b"no"


def test_a_restored_device_is_started_by_nobody_who_lacks_what_its_guest_uses(rig: Rig) -> None:
    poorer = Echo(rig.reactor)
    poorer.features = 1 << 32
    rig.run(rig.frontend.connect(rig.back_end(poorer)))
    with pytest.raises(HostError, match="lacks features 0x1 "):
        rig.run(rig.frontend.activate(FEATURES, rig.queues(), restored=True))
    rig.run(rig.frontend.replay(rig.back_end()))
    assert rig.echo_once(b"x") == b"x"


def test_configuration_that_the_driver_wrote_is_told_to_the_successor_before_its_first_request(rig: Rig) -> None:
    rig.up()
    rig.run(rig.frontend.set_config(3, b"\x77"))
    assert rig.echo.config[3] == 0x77
    rig.kill()
    successor = Echo(rig.reactor)
    seen: list[int] = []
    successor.on_work = lambda _index: seen.append(successor.config[3])
    rig.run(rig.frontend.replay(rig.back_end(successor)))
    rig.echo_once(b"x")
    assert set(seen) == {0x77}


def test_a_configuration_change_is_reported(rig: Rig) -> None:
    changed: list[bool] = []
    rig.frontend.on_config_change = lambda: changed.append(True)
    rig.up()
    rig.servers[-1].config_changed()
    rig.until(lambda: bool(changed))
    assert changed == [True]


# Dirty log ------------------------------------------------------------------------------------------------------


def test_logging_covers_exactly_what_the_back_end_writes_and_survives_its_death(rig: Rig) -> None:
    log = memfd("log", RAM // 4096 // 8)
    d = rig.drivers[0]
    d.next_buffer = 0x100000
    rig.up()
    rig.run(rig.frontend.start_logging(log, RAM // 4096 // 8))
    rig.echo_once(b"x" * 100)
    assert pages(log) == {d.used >> 12, 0x100}
    os.pwrite(log, bytes(RAM // 4096 // 8), 0)
    rig.kill()
    rig.run(rig.frontend.replay(rig.back_end()))
    d.next_buffer = 0x200000
    rig.echo_once(b"x" * 100)
    assert pages(log) == {d.used >> 12, 0x200}
    os.pwrite(log, bytes(RAM // 4096 // 8), 0)
    rig.run(rig.frontend.stop_logging())
    rig.echo_once(b"y")
    assert pages(log) == set()
    os.close(log)


def test_logging_can_be_switched_on_before_the_driver_comes(rig: Rig) -> None:
    log = memfd("log", RAM // 4096 // 8)
    rig.run(rig.frontend.connect(rig.back_end()))
    rig.run(rig.frontend.start_logging(log, RAM // 4096 // 8))
    rig.run(rig.frontend.activate(FEATURES, rig.queues()))
    rig.echo_once(b"x")
    assert rig.drivers[0].used >> 12 in pages(log)
    os.close(log)


def test_dial_waits_for_the_socket_and_names_it_when_it_never_comes(rig: Rig, tmp_path: Path) -> None:
    path = str(tmp_path / "late.sock")
    with socket.socket(socket.AF_UNIX) as listener:

        def listen() -> None:
            listener.bind(path)
            listener.listen(1)

        rig.reactor.call_later(0.02, listen)
        (sock,) = rig.run(dial(rig.reactor, path))
        assert isinstance(sock, socket.socket)
        sock.close()
        os.unlink(path)
    with pytest.raises(WorkerLost, match=r"never\.sock"):
        rig.run(dial(rig.reactor, str(tmp_path / "never.sock"), 0.0))


# Back ends that lie ---------------------------------------------------------------------------------------------


class Liar:
    """The other end of a front end's socket, which says what a test wants."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self._heard = b""

    def asked(self, request: vu.Request, flags: int = vu.VERSION) -> bool:
        """Whether this is what the front end has said last."""
        with contextlib.suppress(BlockingIOError):
            self._heard += self.theirs.recv(1 << 16)
        return self._heard.endswith(vu.Message(request, flags=flags).pack())

    def reply(self, request: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        send_fds(self.theirs, vu.Message(request, payload, vu.VERSION | vu.REPLY).pack(), fds)


def test_a_back_end_that_hangs_up_behind_its_last_answer_is_lost_and_not_connected(rig: Rig) -> None:
    """It was taken for connected, with no link, and whoever spoke to it next never let the reactor go on."""
    liar = Liar()
    connecting = rig.reactor.spawn(rig.frontend.connect(liar.ours), "connect")
    for request, answer in (
        (vu.Request.GET_FEATURES, FEATURES | vu.VHOST_USER_F_PROTOCOL_FEATURES),
        (vu.Request.GET_PROTOCOL_FEATURES, vu.ProtocolFeature.REPLY_ACK),
    ):
        rig.until(lambda request=request: liar.asked(request))
        liar.reply(request, vu.pack_u64(answer))
    rig.until(lambda: liar.asked(vu.Request.SET_OWNER, vu.VERSION | vu.NEED_REPLY))
    liar.reply(vu.Request.SET_OWNER, vu.pack_u64(0))
    liar.theirs.close()
    with pytest.raises(WorkerLost):
        rig.run(connecting)
    assert not rig.frontend.connected
    asked = rig.reactor.spawn(rig.frontend.get_config(4), "config")
    rig.run(rig.frontend.connect(rig.back_end()))
    assert rig.run(asked) == [CONFIG[:4]]


def test_descriptors_that_come_with_a_reply_without_any_are_closed(rig: Rig) -> None:
    liar = Liar()
    connecting = rig.reactor.spawn(rig.frontend.connect(liar.ours), "connect")
    rig.until(lambda: liar.asked(vu.Request.GET_FEATURES))
    liar.reply(vu.Request.GET_FEATURES, vu.pack_u64(FEATURES))
    rig.run(connecting)
    before = len(os.listdir("/proc/self/fd"))
    activating = rig.reactor.spawn(rig.frontend.activate(FEATURES, rig.queues()), "activate")
    rig.until(lambda: liar.asked(vu.Request.GET_FEATURES))
    # A back end without REPLY_ACK is asked for its features once more: by then it has read all before that.
    liar.reply(vu.Request.GET_FEATURES, vu.pack_u64(FEATURES), (0, 1, 2))
    rig.run(activating)
    assert len(os.listdir("/proc/self/fd")) == before
    liar.theirs.close()
