"""Local migration end to end: real controllers, agents, zygotes; what goes well, and what is refused and how."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from shared.handover import MAX_BODY, Message
from shared.linux import recv_fds, send_fds
from shared.wire import HEADER, encode, encode_hello

GIGABYTE = 1 << 30


def test_guest_moves_and_its_source_has_nothing_left(lab):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    sent = source.call("send", url=lab.url, settings={"report": 60})
    received = destination.done("receive")
    assert sent["error"] is None and sent["fate"] == "there" and sent["processes"] == []
    assert received["error"] is None and received["running"]
    assert received["processes"] == ["toy_runner"] and received["paths"] == []
    lab.runs_on(destination)
    assert not os.path.exists(lab.url.removeprefix("unix:"))
    assert source.events == ["migration-started", "migration-finished"]
    assert destination.events == [
        "migration-receive-ready", "migration-receive-started", "migration-receive-finished",
    ]  # fmt: skip
    assert source.phases == [
        "connecting", "building", "pausing", "saving", "offered", "handed-over", "completed",
    ]  # fmt: skip
    assert destination.phases == [
        *("listening", "greeting", "ready", "building", "built", "loading", "claimed", "running", "completed"),
    ]


def test_progress_has_the_breakdown_of_both_sides(lab):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    progress = source.call("send", url=lab.url, settings={"report": 60})["progress"]
    other = destination.done("receive")["progress"]
    assert progress["state"] == other["state"] == "completed"
    assert (progress["direction"], other["direction"]) == ("send", "receive")
    assert progress["bytes_transferred"] == other["bytes_transferred"] > 70000  # the state, not the RAM
    # word, eventfd, pidfd, RAM, disk, 2 TAP queues; the other's pidfd
    assert progress["fds_passed"] == other["fds_passed"] == 7 + 1
    assert 0 < progress["downtime_ms"] < progress["total_ms"]
    assert other["downtime_ms"] == progress["downtime_ms"]  # one clock, and each tells the other its half
    breakdown = progress["breakdown"]
    assert set(breakdown["pause"]) == {"total_ms", "workers"} and set(breakdown["pause"]["workers"]) == {"runner"}
    assert set(breakdown["build"]) == {"total_ms", "destination_ms"}
    assert {"connect_ms", "save_ms", "transfer_ms"} < set(breakdown)
    assert set(breakdown["destination"]) == {"load", "load_ms", "start", "start_ms"}
    assert {"build_ms", "load_ms", "start_ms"} < set(other["breakdown"])
    before = ("connect_ms", "build", "pause", "save_ms")
    assert other["breakdown"]["source"] == {name: breakdown[name] for name in before}
    assert progress["error"] is None


def test_hop_after_hop_leaks_no_descriptor(lab):
    one, two = lab.source(), lab.controller()
    lab.migrate(one, two)
    lab.migrate(two, one)
    before = one.call("fds")["fds"], two.call("fds")["fds"]
    for _ in range(3):
        lab.migrate(one, two)
        lab.migrate(two, one)
    assert one.fds_come_down_to(before[0]) and two.fds_come_down_to(before[1])


def test_failures_leak_no_descriptor_either(lab):
    source, destination = lab.source(), lab.controller()
    lab.migrate(source, destination)
    lab.migrate(destination, source)
    before = source.call("fds")["fds"], destination.call("fds")["fds"]
    for step in ("build", "load") * 2:
        destination.receive(lab.url, fail=step)
        assert source.call("send", url=lab.url)["error"]
        assert destination.done("receive")["error"]
    assert source.fds_come_down_to(before[0]) and destination.fds_come_down_to(before[1])


def test_paused_guest_stays_paused_and_can_be_resumed(lab):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    sent = source.call("send", url=lab.url, paused=True)
    received = destination.done("receive")
    assert sent["error"] is None and received["error"] is None
    assert received["running"] is False and lab.ram.owner == 0
    assert sent["progress"]["downtime_ms"] is None
    destination.call("resume")
    lab.runs_on(destination)


def test_paused_guest_stays_paused_when_its_migration_fails(lab):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, fail="load")
    sent = source.call("send", url=lab.url, paused=True)
    assert sent["error"][0].endswith("the guest stays here, paused as it was") and not sent["running"]
    assert destination.done("receive")["error"]
    assert lab.ram.owner == 0
    source.call("resume")
    lab.runs_on(source)


@pytest.mark.parametrize("step", ("build", "load"))
def test_destination_that_fails_tells_the_source_why(lab, step):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, fail=step)
    sent = source.call("send", url=lab.url)
    received = destination.done("receive")
    assert sent["error"][:3] == [
        f"migration to {lab.url} failed; the guest runs on here",
        "the destination refused it",
        f"the toy can't {step} (that was the plan)",
    ]
    if step == "build":
        assert sent["error"][3] == "for a reason below"
        assert "pausing" not in source.phases  # the guest never noticed
    assert received["error"][:2] == [f"receiving from {lab.url} failed", f"the toy can't {step} (that was the plan)"]
    assert received["processes"] == [] and not received["has_vm"]
    assert "migration-failed" in source.events and "migration-receive-failed" in destination.events
    lab.runs_on(source)
    lab.migrate(source, destination)


@pytest.mark.parametrize("step", ("pause", "save"))
def test_source_that_fails_tells_the_destination_why(lab, step):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url)
    sent = source.call("send", url=lab.url, fail=step)
    assert sent["error"][1] == f"the toy can't {step} (that was the plan)"
    received = destination.done("receive")
    assert received["error"][1:] == ["the source gave up", f"the toy can't {step} (that was the plan)"]
    lab.runs_on(source)
    lab.migrate(source, destination)


def test_guest_that_cannot_be_started_stays_with_its_new_owner(lab):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, fail="start")
    sent = source.call("send", url=lab.url, settings={"report": 0.1})
    received = destination.done("receive")
    assert sent["error"] is None  # it is not the source's any more
    assert received["has_vm"] and "could not be started" in received["error"][0]
    destination.call("resume")
    lab.runs_on(destination)


def test_guest_that_cannot_be_resumed_is_said_to_be_paused(lab):
    source, destination = lab.source(), lab.controller()
    destination.receive(lab.url, fail="load")
    sent = source.call("send", url=lab.url, fail="resume")
    assert "paused, for it could not be resumed (the toy can't resume" in sent["error"][0]
    assert sent["running"] is False
    assert destination.done("receive")["error"]
    source.call("resume")
    lab.runs_on(source)


# Bad URLs and paths ----------------------------------------------------------------------------------------------


def test_send_to_a_socket_nobody_listens_on(lab):
    source = lab.source()
    sent = source.call("send", url=lab.url)
    assert f"nobody listens on {lab.url.removeprefix('unix:')}" in sent["error"][1]
    assert sent["processes"] == ["toy_runner"]
    lab.runs_on(source)


def test_receive_replaces_a_stale_socket(lab):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(lab.url.removeprefix("unix:"))
    lab.migrate(lab.source(), lab.controller())


def test_receive_refuses_a_live_socket_and_does_not_disturb_it(lab):
    source, first, second = lab.source(), lab.controller(), lab.controller()
    first.receive(lab.url)
    refused = second.call("receive", url=lab.url)
    assert "is a socket that somebody listens on" in refused["error"][1] and lab.url[5:] in refused["error"][1]
    assert source.call("send", url=lab.url)["error"] is None
    assert first.done("receive")["error"] is None
    lab.runs_on(first)


def test_receive_refuses_another_file(lab):
    path = lab.url.removeprefix("unix:")
    with open(path, "w") as file:
        file.write("precious")
    refused = lab.controller().call("receive", url=lab.url)
    assert f"{path} exists and is not a socket" in refused["error"][1]
    with open(path) as file:
        assert file.read() == "precious"


def test_name_is_announced_while_it_exists_so_that_a_janitor_can_remove_it(lab):
    path = lab.url.removeprefix("unix:")
    destination = lab.controller()
    destination.receive(lab.url)
    assert destination.paths == [(path, True)] and os.path.exists(path)
    destination.do("cancel")
    destination.done("receive")
    assert destination.paths == [(path, True), (path, False)] and not os.path.exists(path)
    killed = lab.controller()
    killed.receive(lab.url)
    killed.kill()
    assert killed.paths == [(path, True)]
    os.unlink(path)


# Bad peers -------------------------------------------------------------------------------------------------------


def knock(lab) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(lab.url[5:])
    return sock


STRANGERS = {
    "garbage": (b"\xde\xad\xbe\xef" * 8, "does not speak Flotilla's migration protocol: its first bytes are de ad"),
    "cloud-hypervisor": (b"\x01\x00" + bytes(14), "Cloud Hypervisor's own migration"),
    "http": (b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n", "is the URL that of an API socket?"),
    "other version": (encode_hello(77), "version 77, ours 1"),
    "gigabyte": (encode_hello() + HEADER.pack(Message.BUILD, 0, GIGABYTE), f"of {GIGABYTE} bytes (limit {MAX_BODY})"),
    "unknown type": (encode_hello() + HEADER.pack(999, 0, 0), "unknown type 999"),
    "too many fds": (encode_hello() + HEADER.pack(Message.BUILD, 65, 0), "65 file descriptors (limit 64)"),
    "fds that never came": (encode_hello() + HEADER.pack(Message.BUILD, 3, 0), "3 file descriptors and brings 0"),
    "wrong order": (encode_hello() + encode(Message.STATE, b"\x81\xa5state\x80"), "not in state ready"),
    "wrong direction": (encode_hello() + encode(Message.BUILT), "not in state ready"),
    "not msgpack": (encode_hello() + encode(Message.BUILD, b"\xc1"), "not msgpack"),
    "not a map": (encode_hello() + encode(Message.BUILD, b"\x01"), "not a map"),
    "empty map": (encode_hello() + encode(Message.BUILD, b"\x80"), "field config is missing"),
    "heartbeat with a body": (encode_hello() + HEADER.pack(Message.HEARTBEAT, 0, 1), "HEARTBEAT of 1 bytes"),
}  # fmt: skip


def test_receiver_survives_every_stranger_and_receives_afterwards(lab):
    source, destination = lab.source(), lab.controller()
    for name, (said, complaint) in STRANGERS.items():
        destination.receive(lab.url)
        with knock(lab) as peer:
            peer.sendall(said)
            received = destination.done("receive")
            assert complaint in " ".join(received["error"]), name
        assert received["processes"] == [] and received["paths"] == [], name
    lab.migrate(source, destination)


def test_receiver_survives_ends_and_silence(lab):
    source, destination = lab.source(), lab.controller()
    cases = {
        b"": "the peer closed the connection",
        b"FLOT": "in the middle of a message",
        encode_hello(): "the peer closed the connection",
        encode_hello() + b"\x02": "in the middle of a message",
        encode_hello() + HEADER.pack(Message.BUILD, 0, 100) + b"x": "in the middle of a message",
    }
    for said, complaint in cases.items():
        destination.receive(lab.url)
        with knock(lab) as peer:
            peer.sendall(said)
            peer.shutdown(socket.SHUT_WR)  # a close would be a reset, with the other's hello unread
            assert complaint in " ".join(destination.done("receive")["error"]), said
    for settings, said, complaint in (
        ({"hello": 0.2}, b"", "the peer said nothing for 0.2 s"),
        ({"hello": 0.2}, b"FLOTILLA", "the peer said nothing for 0.2 s"),
        ({"idle": 0.2}, encode_hello(), "the peer has been silent for 0.2 s"),
        ({"build": 0.2}, encode_hello(), "BUILD or MACHINE or ASK from the peer"),
    ):
        destination.receive(lab.url, settings=settings)
        with knock(lab) as peer:
            peer.sendall(said)
            assert complaint in " ".join(destination.done("receive")["error"]), settings
    lab.migrate(source, destination)


def test_receiver_tells_a_peer_that_breaks_the_protocol_why(lab):
    destination = lab.controller()
    destination.receive(lab.url)
    with knock(lab) as peer:
        peer.sendall(encode_hello() + HEADER.pack(Message.BUILD, 0, GIGABYTE))
        said = b""
        while data := peer.recv(65536):
            said += data
    assert said.startswith(encode_hello()) and f"BUILD of {GIGABYTE} bytes".encode() in said
    assert destination.done("receive")["error"]


def test_receiver_checks_what_the_descriptors_are(lab):
    """A BUILD whose descriptors are others than it says, one after the other."""
    import msgpack

    destination = lab.controller()
    page, event, process = os.memfd_create("x", os.MFD_ALLOW_SEALING), os.eventfd(0), os.pidfd_open(os.getpid())
    body = {"config": {}, "parts": [[0, 4096, 0, 0]], "disks": [], "info": {}, "paused": False}
    sealed = lab.ram_fd
    for fds, complaint in (
        ([page, event, process, sealed], "not a sealed memfd of one page"),
        ([sealed, sealed, process, sealed], "where an eventfd belongs"),
        ([sealed, event, event, sealed], "where a pidfd belongs"),
        ([sealed, event, process, page], "sealed against shrinking"),
        ([sealed, event, process], "1 regions, 0 disks, 0 TAP queues and 3 descriptors"),
    ):
        destination.receive(lab.url)
        with knock(lab) as peer:
            peer.sendall(encode_hello())
            data = encode(Message.BUILD, msgpack.packb(body), fds)
            send_fds(peer, data, fds)
            assert complaint in " ".join(destination.done("receive")["error"])
    before = destination.call("fds")["fds"]
    destination.receive(lab.url)
    with knock(lab) as peer:
        peer.sendall(encode_hello())
        send_fds(peer, encode(Message.BUILD, msgpack.packb(body), [page] * 4), [page] * 4)
        assert destination.done("receive")["error"]
    assert destination.fds_come_down_to(before)
    for fd in (page, event, process):
        os.close(fd)


def answer(listener: socket.socket) -> socket.socket:
    sock = listener.accept()[0]
    sock.settimeout(20)
    assert sock.recv(10, socket.MSG_WAITALL) == encode_hello()
    return sock


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "its first bytes are 53 53 48"),
        (b"", "the peer closed the connection"),
        (encode_hello() + HEADER.pack(Message.BUILT, 0, GIGABYTE), f"BUILT of {GIGABYTE} bytes"),
        (encode_hello() + encode(Message.STARTED, b"\x80"), "started received: not in state"),
        (encode_hello(9), "version 9, ours 1"),
    ],
)
def test_source_survives_a_destination_that_talks_nonsense(lab, said, complaint):
    source = lab.source()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(lab.url[5:])
        listener.listen(1)
        source.do("send", url=lab.url)
        with answer(listener) as peer:
            peer.sendall(said)
            if not said:
                peer.shutdown(socket.SHUT_RDWR)
            sent = source.done("send")
    os.unlink(lab.url[5:])
    assert complaint in " ".join(sent["error"])
    assert sent["running"] and "pausing" not in source.phases
    lab.runs_on(source)


def test_source_survives_a_destination_that_says_nothing(lab):
    source = lab.source()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(lab.url[5:])
        listener.listen(1)
        sent = source.call("send", url=lab.url, settings={"hello": 0.2})
    os.unlink(lab.url[5:])
    assert "the peer said nothing for 0.2 s" in sent["error"]
    lab.runs_on(source)


def test_a_destination_that_says_started_without_having_claimed_gets_no_guest(lab):
    """Messages decide nothing: the word does."""
    import msgpack

    source = lab.source()
    ours = os.pidfd_open(os.getpid())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(lab.url[5:])
        listener.listen(1)
        source.do("send", url=lab.url)
        with answer(listener) as peer:
            peer.sendall(encode_hello())
            for fd in frame(peer, Message.BUILD):
                os.close(fd)
            send_fds(peer, encode(Message.BUILT, msgpack.packb({"timing": {}}), [ours]), [ours])
            frame(peer, Message.STATE)
            peer.sendall(encode(Message.STARTED, msgpack.packb({"timing": {}, "running_at": 0.0})))
            sent = source.done("send")
    os.unlink(lab.url[5:])
    os.close(ours)
    assert "said STARTED and has not claimed it" in " ".join(sent["error"])
    lab.runs_on(source)


def frame(peer: socket.socket, wanted: Message) -> list[int]:
    """Read up to and with the next frame of a type, heartbeats aside; its descriptors."""
    while True:
        header, fds = recv_fds(peer, HEADER.size)
        kind, _, length = struct.unpack("<HHI", header)
        while length:  # with a timeout of Python's, MSG_WAITALL waits for nothing
            data = peer.recv(length)
            assert data, f"the end, and {length} bytes of {Message(kind).name} are to come"
            length -= len(data)
        if kind == wanted:
            return fds
