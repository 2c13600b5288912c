"""The pieces of controller.migration that need no second process: word, listener, codec, arguments, phases."""

from __future__ import annotations

import os
import socket
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.events import EventMonitor
from controller.migration import codec
from controller.migration.arguments import (
    Bounds,
    SendArguments,
    Strategy,
    parse_receive,
    parse_resolve,
    parse_send,
    parse_url,
    unix_path,
)  # fmt: skip
from controller.migration.descriptors import check_eventfd, check_ram, pidfd_pid
from controller.migration.listener import Listener
from controller.migration.ownership import Action, Owner, Ownership, source_action
from controller.migration.progress import SUCCESSORS, Direction, Phase, Progress, figures
from shared.chardev import BACKLOG_LIMIT
from shared.errors import ConfigError, HostError, MigrationCancelled, MigrationError, ProtocolError
from shared.handover import AGENTS_ONLY, Message
from shared.linux import memfd


def test_word_is_shared_by_two_mappings_and_moves_only_from_what_it_is():
    one = Ownership.create()
    other = Ownership.attach(os.dup(one.fd))
    assert one.word is Owner.SOURCE
    assert one.move(Owner.SOURCE, Owner.OFFERED)
    assert other.word is Owner.OFFERED
    assert other.move(Owner.OFFERED, Owner.CLAIMED)
    assert not one.move(Owner.OFFERED, Owner.SOURCE)
    assert one.word is Owner.CLAIMED
    one.close()
    other.close()


def test_word_of_no_meaning_counts_as_running():
    word = Ownership.create()
    os.pwrite(word.fd, b"\xff\xff\xff\xff", 0)
    assert word.word is Owner.RUNNING
    word.close()


@pytest.mark.parametrize(("size", "seal"), [(4096, False), (100, True), (0, True)])
def test_word_page_that_could_kill_us_is_refused(size, seal):
    fd = memfd("x", size, seal=seal)
    with pytest.raises(ProtocolError, match="sealed memfd of one page"):
        Ownership.attach(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("word", "ended", "action"),
    [
        (Owner.SOURCE, False, Action.TAKE_BACK),
        (Owner.OFFERED, False, Action.TAKE_BACK),
        (Owner.OFFERED, True, Action.TAKE_BACK),
        (Owner.CLAIMED, False, Action.WAIT),
        (Owner.CLAIMED, True, Action.TAKE_BACK),
        (Owner.RUNNING, False, Action.GONE),
        (Owner.RUNNING, True, Action.LOST),
    ],
)
def test_the_sources_rule(word, ended, action):
    assert source_action(word, ended) is action


def test_descriptors_are_what_they_should_be(tmp_path):
    event, process, ram = os.eventfd(0), os.pidfd_open(os.getpid()), memfd("x", 8192)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    check_eventfd(event)
    assert os.get_blocking(event) is False
    assert pidfd_pid(process) == os.getpid()
    check_ram(ram, 8192)
    with pytest.raises(ProtocolError, match="8192 bytes where 8193"):
        check_ram(ram, 8193)
    for check in (check_eventfd, pidfd_pid, lambda fd: check_ram(fd, 0)):
        with pytest.raises(ProtocolError):
            check(plain)
    for fd in (event, process, ram, plain):
        os.close(fd)


# Listener


def test_listener_is_private_and_its_name_goes_once(tmp_path):
    path = str(tmp_path / "sock")
    listener = Listener(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.remove_name()
    assert not os.path.exists(path) and not listener.named
    with open(path, "w"):
        pass
    listener.close()
    assert os.path.exists(path)  # somebody else's by now


def test_listener_leaves_a_name_that_somebody_replaced(tmp_path):
    path = str(tmp_path / "sock")
    listener = Listener(path)
    os.unlink(path)
    os.mkdir(path)
    listener.close()
    assert os.path.isdir(path)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_listener_refuses_a_live_socket_of_any_type_without_a_trace(tmp_path, kind):
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX, kind) as live:
        live.bind(path)
        if kind != socket.SOCK_DGRAM:
            live.listen(1)
        with pytest.raises(ConfigError, match="somebody listens"):
            Listener(path)
        live.setblocking(False)
        if kind == socket.SOCK_STREAM:
            with pytest.raises(BlockingIOError):
                live.accept()
    os.unlink(path)


def test_listener_replaces_a_stale_socket(tmp_path):
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    Listener(path).close()
    assert not os.path.exists(path)


def test_listener_names_what_is_in_the_way(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} exists and is not a socket"):
        Listener(str(tmp_path))
    with pytest.raises(HostError, match="/nowhere/sock: No such file"):
        Listener("/nowhere/sock")


# Codec

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 99), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), values, max_size=5))
def test_states_survive_the_codec(state):
    assert codec.decode(Message.STATE, codec.encode(Message.STATE, {"state": state})) == {"state": state}


def test_state_with_all_that_a_console_may_hold_back_survives_the_codec():
    """A terminal that nobody reads: a mebibyte that was printed and goes with the guest."""
    state = {"console": {"in_buffer": [0xFF] * 4096, "out_buffer": [0xFF] * (BACKLOG_LIMIT + 4096)}}
    assert codec.decode(Message.STATE, codec.encode(Message.STATE, {"state": state})) == {"state": state}


@given(st.sampled_from(Message), st.binary(max_size=200))
def test_no_bytes_from_the_peer_raise_anything_but_protocol_error(kind, data):
    try:
        body = codec.decode(kind, data)
        if kind is Message.BUILD:
            codec.parts_of(body)
            codec.disks_of(body)
            codec.taps_of(body)
    except ProtocolError:
        pass


@pytest.mark.parametrize("kind", sorted(AGENTS_ONLY))
@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc0"])
def test_message_that_is_for_agents_is_refused_by_name(kind, data):
    with pytest.raises(ProtocolError, match=f"{kind.name} from the peer is not for a controller"):
        codec.decode(kind, data)


def test_length_that_would_allocate_gigabytes_is_refused():
    with pytest.raises(ProtocolError, match="not msgpack"):
        codec.decode(Message.STATE, b"\x81\xa5state\xdd\xff\xff\xff\xff")
    nested = b"\xdd\x00\x10\x00\x00" * 1000
    with pytest.raises(ProtocolError, match="not msgpack"):
        codec.decode(Message.STATE, b"\x81\xa5state" + nested)


def test_what_cannot_travel_is_named():
    with pytest.raises(MigrationError, match="STATE: can't be encoded"):
        codec.encode(Message.STATE, {"state": {"x": object()}})
    with pytest.raises(MigrationError, match="STATE: can't be encoded"):
        codec.encode(Message.STATE, {"state": {"x": 1 << 64}})
    with pytest.raises(MigrationError, match=r"STATE has \d+ bytes"):
        codec.encode(Message.STATE, {"state": {"x": bytes(17 << 20)}})


@pytest.mark.parametrize("part", [1, [1, 2, 3], [0, -1, 0, 0], [0, True, 0, 0], [0, 1.5, 0, 0], "abcd"])
def test_parts_are_checked(part):
    with pytest.raises(ProtocolError, match="memory region"):
        codec.parts_of({"parts": [part]})


def test_disks_are_checked():
    with pytest.raises(ProtocolError, match="disks"):
        codec.disks_of({"disks": ["a", "a"]})
    with pytest.raises(ProtocolError, match="disks"):
        codec.disks_of({"disks": [1]})


def test_taps_are_checked():
    assert codec.taps_of({}) == {}
    assert codec.taps_of({"taps": [["_net1", 1], ["_net2", 4]]}) == {"_net1": 1, "_net2": 4}
    for taps in (5, [1], [["a"]], [[1, 1]], [["a", "1"]], [["a", True]], [["a", 0]], [["a", 1], ["a", 1]]):
        with pytest.raises(ProtocolError, match=r"BUILD from the peer: (taps|a TAP)"):
            codec.taps_of({"taps": taps})


# Arguments


def test_bodies_of_both_requests():
    assert parse_receive({"receiver_url": "unix:/a"}) == "unix:/a"
    assert parse_send({"destination_url": "unix:/a"}) == SendArguments("unix:/a", False)
    given_all = {"destination_url": "unix:/a", "local": True, "timeout_s": 5, "connections": 1, "tls_dir": None}
    assert parse_send(given_all) == SendArguments("unix:/a", True, Bounds(timeout_s=5, strict=False))
    bounded = {"destination_url": "tcp:h:1", "downtime_ms": 20, "timeout_s": 7, "timeout_strategy": "Ignore"}
    assert parse_send(bounded) == SendArguments("tcp:h:1", False, Bounds(20, 7, Strategy.IGNORE))
    assert parse_resolve({"guest": "here"}) and not parse_resolve({"guest": "there"})


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ([], "not an object"),
        ({}, "destination_url is missing"),
        ({"destination_url": 5}, "destination_url is missing"),
        ({"destination_url": "unix:/a", "local": "on"}, "local is not a boolean"),
        ({"destination_url": "unix:/a", "loacl": True}, "unknown field loacl"),
        ({"destination_url": "unix:/a", "downtime_ms": 0}, "downtime_ms is not a whole number"),
        ({"destination_url": "unix:/a", "timeout_s": "5"}, "timeout_s is not a whole number"),
        ({"destination_url": "unix:/a", "timeout_s": True}, "timeout_s is not a whole number"),
        ({"destination_url": "unix:/a", "timeout_strategy": "retry"}, "timeout_strategy is neither"),
        ({"destination_url": "unix:/a", "connections": 4}, "connections is not available yet"),
        ({"destination_url": "unix:/a", "memory_mode": "postcopy"}, "memory_mode is not available yet"),
        ({"destination_url": "unix:/a", "tls_dir": "/tls"}, "tls_dir is not available yet"),
    ],
)
def test_bad_bodies_are_named(body, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_send(body)


BAD_URLS = ["", "unix:", "/tmp/x", "file:/x", "unix:/a\0b", "unix:/" + "x" * 107]
BAD_URLS += ["tcp:", "tcp:h", "tcp:h:", "tcp::1", "tcp:h:0", "tcp:h:65536", "tcp:h:-1", "tcp:h:1x"]


@pytest.mark.parametrize("url", BAD_URLS)
def test_bad_urls_are_refused(url):
    with pytest.raises(ConfigError, match="URL"):
        parse_url(url)


def test_urls_of_both_kinds():
    assert parse_url("unix:/a").path == "/a"
    tcp = parse_url("tcp:[::1]:80")
    assert (tcp.host, tcp.port, tcp.path) == ("::1", 80, "")


def test_local_migration_needs_a_unix_socket():
    with pytest.raises(ConfigError, match="tcp:h:1: a local migration needs unix:<path>"):
        unix_path("tcp:h:1")


@pytest.mark.parametrize("body", [None, {}, {"guest": "nowhere"}, {"guest": "here", "sure": True}])
def test_a_resolution_says_here_or_there(body):
    with pytest.raises(ConfigError, match=r"vm.migration-resolve"):
        parse_resolve(body)


# Progress


def test_phases_lead_to_an_end_from_everywhere():
    for direction, table in SUCCESSORS.items():
        ends = {Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED, Phase.LOST}
        assert all(successors for successors in table.values()), direction
        assert not ends & set(table), direction


def test_report_of_a_failure_has_the_chain():
    seen: list[tuple[str, dict | None]] = []
    events = EventMonitor(time.monotonic())
    events.subscribers.append(lambda _source, event, properties: seen.append((event, properties)))
    progress = Progress(events, Direction.RECEIVE)
    assert progress.report()["state"] == "none"
    progress.to(Phase.LISTENING)
    assert progress.ongoing and progress.report()["state"] == "ongoing"
    error = MigrationCancelled("outer")
    error.__cause__ = MigrationError("inner")
    progress.fail(error)
    assert progress.report()["state"] == "cancelled" and progress.report()["error"] == ["outer", "inner"]
    assert seen == [
        ("migration-phase", {"direction": "receive", "phase": "listening"}),
        ("migration-phase", {"direction": "receive", "phase": "cancelled"}),
        ("migration-receive-failed", None),
    ]


def test_of_a_peers_figures_numbers_are_kept_and_nothing_else():
    good = {"save_ms": 1.5, "pause": {"workers": {"vcpus": 2}}}
    bad = {7: 1, "x" * 65: 1, "text": "5", "flag": True, "list": [1], "nan": float("nan"), "endless": float("inf")}
    assert figures({**bad, **good, "none": None}) == good
    for nothing in (None, 5, [], "map", [{"save_ms": 1}]):
        assert figures(nothing) == {}


def test_peers_figures_without_end_fit_into_a_commit():
    deep: dict = {}
    for _ in range(1000):
        deep = {"\U0001f600" * 64: deep, **{f"{number:\U0001f600<64}": number for number in range(1000)}}
    assert len(codec.encode(Message.COMMIT, {"paused_ms": None, "source": figures(deep)})) < 60000


def test_a_phase_out_of_order_is_a_bug():
    progress = Progress(EventMonitor(time.monotonic()), Direction.SEND)
    with pytest.raises(AssertionError, match="idle to offered"):
        progress.to(Phase.OFFERED)
