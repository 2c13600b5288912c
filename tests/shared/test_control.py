"""shared.control: a peer that says nonsense gets an error, or gives one to who asked it; the channel goes on.

And one that was taken over: what floods, reads nothing or asks without end costs no standstill and no memory.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from console_worker.console import CHUNK_LIMIT, IN_BUFFER_LIMIT
from shared import messages
from shared.chardev import BACKLOG_LIMIT, READ_SIZE
from shared.control import BURST, EXPORTER, WORKER, Channel, Limits, context, unlink_endpoint
from shared.errors import ProtocolError, StateError, Timeout
from shared.figures import ExitFigures, Figures, KvmFigures, ProcessFigures, WorkerFigures, to_wire
from shared.reactor import Event, Future, Reactor

SECONDS = 30.0
FLOOD = """
import sys, msgpack, zmq
peer = zmq.Context().socket(zmq.DEALER)
peer.connect(sys.argv[1])
event = msgpack.packb({"v": 1, "event": "x"})
while True:
    peer.send(event)
"""


class Peer:
    """A channel as every process has one, and the bare socket of whoever is at its other end."""

    def __init__(self, folder: Path, limits: Limits = WORKER) -> None:
        self.reactor = Reactor()
        self.endpoint = f"ipc://{folder}/c"
        self.channel = Channel(self.reactor, self.endpoint, bind=True, limits=limits)
        self.channel.handlers = {"hello": lambda _: {"heard": True}}
        self.nonsense: list[str] = []
        self.channel.on_nonsense = lambda error: self.nonsense.append(str(error))
        self.heard: Future[tuple[str, dict[str, Any]]] = Future()
        self.channel.on_event = lambda name, arguments: self.heard.set_result((name, arguments))
        self.socket = context().socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.SNDHWM, 1)
        self.socket.set(zmq.RCVHWM, 1)
        self.socket.connect(self.endpoint)

    def say(self, **message: Any) -> None:
        self.socket.send(msgpack.packb({"v": messages.VERSION, **message}))

    def turn(self) -> None:
        self.reactor.call_soon(lambda: None)
        self.reactor._round()

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"not within {SECONDS} s"
            self.socket.poll(1)
            self.turn()

    def answer(self) -> dict[str, Any]:
        """The next thing that the channel says."""
        end = time.monotonic() + SECONDS
        while not self.socket.poll(10):
            assert time.monotonic() < end, f"the channel says nothing for {SECONDS} s"
            self.turn()
        return messages.decode(self.socket.recv())

    def goes_on(self) -> None:
        self.say(id=77, verb="hello", args={})
        assert self.answer() == {"v": messages.VERSION, "id": 77, "ok": {"heard": True}}

    def close(self) -> None:
        self.socket.close()
        self.channel.close()
        self.reactor.close()
        unlink_endpoint(self.endpoint)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[[Limits], Peer]]:
    peers: list[Peer] = []

    def make(limits: Limits) -> Peer:
        peers.append(Peer(tmp_path, limits))
        peers[-1].goes_on()  # they are connected
        return peers[-1]

    yield make
    for each in peers:
        each.close()


@pytest.fixture
def peer(made: Callable[[Limits], Peer]) -> Peer:
    return made(WORKER)


@pytest.mark.parametrize("number", [[1], {"a": 1}, "1", 1.5, None, True])
def test_a_message_whose_id_is_no_number(peer: Peer, number: object) -> None:
    peer.say(id=number, ok={})
    assert peer.answer()["error"]["type"] == "ProtocolError"
    peer.goes_on()


@pytest.mark.parametrize("arguments", [[1], "x", 5])
def test_an_event_whose_arguments_are_no_map(peer: Peer, arguments: object) -> None:
    peer.say(event="progress", args=arguments)
    assert peer.answer()["error"]["type"] == "ProtocolError"
    assert not peer.heard.done()
    peer.goes_on()


def test_an_event_without_arguments(peer: Peer) -> None:
    peer.say(event="progress")
    assert peer.reactor.run_until(peer.heard, SECONDS) == ("progress", {})


@pytest.mark.parametrize("answer", [[1], "x", 5])
def test_an_answer_that_is_no_map_fails_the_call_alone(peer: Peer, answer: object) -> None:
    call = peer.reactor.spawn(peer.channel.call("save", SECONDS), "save")
    number = peer.answer()["id"]
    peer.say(id=number, ok=answer)
    with pytest.raises(ProtocolError, match="ok is no map"):
        peer.reactor.run_until(call, SECONDS)
    peer.goes_on()


# A peer that was taken over -------------------------------------------------------------------------------------------


def test_a_flood_of_messages_leaves_timers_and_descriptors_their_turns(made: Callable[[Limits], Peer]) -> None:
    """Whatever is kept for the reader: a short queue alone is empty now and then."""
    peer, began = made(Limits(arrived=1000)), 50 * BURST  # the flood has risen by then
    heard, seen = 0, dict.fromkeys(("timer", "descriptor"), 0)
    descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def hears(*_: object) -> None:
        nonlocal heard
        heard += 1
        if heard == began:
            os.eventfd_write(descriptor, 1)
            peer.reactor.call_later(0, lambda: sees("timer"))
        assert heard < began + 100 * BURST, f"the reactor does nothing else: {seen}"

    def sees(what: str) -> None:
        seen[what] = heard
        if all(seen.values()):
            peer.reactor.stop()

    def readable() -> None:
        os.eventfd_read(descriptor)
        sees("descriptor")

    peer.channel.on_event = hears
    peer.reactor.add_reader(descriptor, readable)
    flood = subprocess.Popen([sys.executable, "-c", FLOOD, peer.endpoint])
    try:
        peer.reactor.call_later(SECONDS, lambda: peer.reactor.stop(1))
        assert peer.reactor.run() == 0, "no flood"
    finally:
        flood.send_signal(signal.SIGKILL)
        flood.wait()
        os.close(descriptor)
    assert max(seen.values()) <= began + 4 * BURST


def test_a_flood_of_large_messages_is_taken_in_by_bytes(peer: Peer) -> None:
    heard: list[str] = []
    peer.channel.on_event = lambda name, _: heard.append(name)
    for _ in range(6):
        peer.say(event="x", args={"data": bytes(800 << 10)})
    assert peer.socket.poll(1000 * SECONDS, zmq.POLLOUT) and select.select([peer.channel._fd], [], [], SECONDS)[0]
    peer.channel._drain()
    assert 1 <= len(heard) <= 2
    peer.until(lambda: len(heard) == 6)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"id": 1, "verb": "hello", "args": {}}, "request 'hello' of one that has nothing to ask"),
        ({"event": "x"}, "event 'x', which nobody waits for"),
        ({"id": 1, "ok": {}}, "an answer to what nobody asked"),
        ({"id": 0, "error": {}}, "an answer to what nobody asked"),
    ],
    ids=["request", "event", "answer", "complaint"],
)
def test_what_nobody_asked_is_nonsense_on_a_channel_without_handlers_and_is_not_answered(
    peer: Peer, message: dict[str, Any], says: str
) -> None:
    peer.channel.handlers, peer.channel.on_event = {}, None
    for _ in range(3):
        peer.say(**message)
    peer.until(lambda: len(peer.nonsense) == 3)
    assert peer.nonsense == [says] * 3
    call = peer.reactor.spawn(peer.channel.call("stats", SECONDS))
    asked = peer.answer()
    assert asked["verb"] == "stats"
    peer.say(id=asked["id"], ok={"a": 1})
    assert peer.reactor.run_until(call, SECONDS) == {"a": 1}


def test_an_answer_that_comes_too_late_is_no_nonsense_and_a_second_one_is(peer: Peer) -> None:
    peer.channel.handlers = {}
    with pytest.raises(Timeout):
        peer.reactor.run_until(peer.channel.call("stats", 0.0), SECONDS)
    number = peer.answer()["id"]
    peer.say(id=number, ok={})
    call = peer.reactor.spawn(peer.channel.call("stats", SECONDS))
    peer.say(id=peer.answer()["id"], ok={"a": 1})
    assert peer.reactor.run_until(call, SECONDS) == {"a": 1}
    assert peer.nonsense == []
    peer.say(id=number, ok={})
    peer.until(lambda: peer.nonsense)
    assert peer.nonsense == ["an answer to what nobody asked"]


def test_a_peer_that_does_not_read_its_messages_is_nonsense(made: Callable[[Limits], Peer]) -> None:
    peer = made(Limits(unread=8))
    for _ in range(2000):
        peer.channel.emit("x", data=bytes(16 << 10))
        if peer.nonsense:
            break
    assert peer.nonsense == ["the peer does not read its messages"]
    with pytest.raises(ProtocolError, match="stats: the peer does not read its messages"):
        for _ in range(2000):  # zmq makes room by and by, as far as the kernel has some
            with pytest.raises(Timeout):
                peer.reactor.run_until(peer.channel.call("stats", 0.0, data=bytes(16 << 10)), SECONDS)


def test_an_unknown_verb_is_repeated_in_part(peer: Peer) -> None:
    peer.say(id=1, verb="x" * 100_000, args={})
    answer = peer.answer()
    assert "x" * messages.SHOWN in answer["error"]["message"] and len(str(answer)) < 400


def test_a_message_of_a_newer_version_is_repeated_in_part(peer: Peer) -> None:
    peer.say(v="x" * 100_000)
    assert len(str(peer.answer())) < 400


def test_a_message_longer_than_the_limit_never_comes(made: Callable[[Limits], Peer]) -> None:
    peer = made(Limits(message=1024))
    peer.say(event="large", args={"data": bytes(2048)})
    end = time.monotonic() + SECONDS
    while not peer.socket.poll(10):  # zmq hangs up, and the peer's connects again
        assert time.monotonic() < end
        if peer.socket.poll(0, zmq.POLLOUT):
            peer.say(id=78, verb="hello", args={})
        peer.turn()
    assert peer.answer()["id"] == 78
    assert not peer.heard.done()


def test_what_has_come_and_is_not_read_is_bounded(peer: Peer) -> None:
    sent = 0
    while sent < 1000 and peer.socket.poll(500, zmq.POLLOUT):
        peer.say(event="x", args={"data": bytes(16 << 10)})
        sent += 1
    assert sent < 300


@pytest.mark.parametrize("frames", [[b"x", b"y"], [b"", b"y"], [b"x"] * 100])
def test_a_message_of_another_number_of_frames(peer: Peer, frames: list[bytes]) -> None:
    peer.socket.send_multipart([*frames[:-1], msgpack.packb({"v": 1, "event": "x"})])
    assert peer.answer()["error"]["message"] == f"a control message of {len(frames)} frames"
    assert peer.nonsense and not peer.heard.done()
    peer.goes_on()


def test_a_routers_message_of_another_number_of_frames(tmp_path: Path) -> None:
    reactor, endpoint = Reactor(), f"ipc://{tmp_path}/r"
    channel = Channel(reactor, endpoint, bind=True, router=True)
    channel.handlers = {"hello": lambda _: {"heard": True}}
    said: list[ProtocolError] = []
    channel.on_nonsense = said.append
    other = context().socket(zmq.DEALER)
    try:
        other.set(zmq.LINGER, 0)
        other.connect(endpoint)
        request = messages.encode({"id": 1, "verb": "hello", "args": {}})
        other.send_multipart([b"", request])
        other.send(request)

        async def answers() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            while len(found) < 2:
                if other.poll(0):
                    found.append(messages.decode(other.recv()))
                await within_a_turn(reactor)
            return found

        first, second = reactor.run_until(answers(), SECONDS)
        assert first["error"]["message"] == "a control message of 3 frames" and len(said) == 1
        assert second["ok"] == {"heard": True}
    finally:
        other.close()
        channel.close()
        reactor.close()
        unlink_endpoint(endpoint)


async def within_a_turn(reactor: Reactor) -> None:
    done: Future[None] = Future()
    reactor.call_soon(lambda: done.set_result(None))
    await done


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, object(), "\udcff"])
def test_an_answer_that_cannot_be_encoded_is_an_error_answer(peer: Peer, value: object) -> None:
    peer.channel.handlers["stats"] = lambda _: {"counter": value}
    peer.say(id=5, verb="stats", args={})
    answer = peer.answer()
    assert answer["id"] == 5 and answer["error"]["type"] in ("OverflowError", "TypeError", "UnicodeEncodeError")
    peer.goes_on()


def test_requests_beyond_those_under_way_are_refused(made: Callable[[Limits], Peer]) -> None:
    peer = made(Limits(requests=2))
    go_on, began = Event(), 0

    async def slow() -> dict[str, Any]:
        nonlocal began
        began += 1
        await go_on.wait()
        return {}

    peer.channel.handlers["stats"] = lambda _: slow()
    for number in range(1, 6):
        peer.say(id=number, verb="stats", args={})
    refused = [peer.answer() for _ in range(3)]
    peer.until(lambda: began)
    assert [answer["id"] for answer in refused] == [3, 4, 5]
    peer.turn()
    assert began == 2
    error = messages.error_from_wire(refused[0]["error"])
    assert isinstance(error, StateError) and error.message == "too many requests under way"
    go_on.set()
    assert {peer.answer()["id"], peer.answer()["id"]} == {1, 2}
    peer.goes_on()


# Room for what is legal ---------------------------------------------------------------------------------------------


def test_a_consoles_longest_state_fits() -> None:
    typed, printed = [255] * (IN_BUFFER_LIMIT + READ_SIZE), [255] * (BACKLOG_LIMIT + CHUNK_LIMIT)
    state = {"kind": "console_worker", "version": 1, "state": {"console": {"in_buffer": typed, "out_buffer": printed}}}
    data = messages.encode({"id": 1, "ok": state})
    assert len(data) < WORKER.message * 3 // 4
    assert messages.decode(data)["ok"] == state


def test_figures_of_a_large_vm_fit() -> None:
    counts = {who: [1 << 60] * 64 for who in ("native", "python", "kernel")}
    figures = Figures(
        processes=tuple(ProcessFigures("vcpu", f"vcpu{number}", 1 << 22, "running", 5, 7, 7) for number in range(600)),
        workers=tuple(WorkerFigures("blk", f"_disk{n}", {f"n{m}": 1 << 60 for m in range(256)}) for n in range(100)),
        exits=tuple(ExitFigures(f"vcpu{number}", counts) for number in range(512)),
        kvm=tuple(KvmFigures(f"vcpu{number}", bytes(8 << 10)) for number in range(512)),
    )
    data = messages.encode({"id": 1, "ok": to_wire(figures)})
    assert len(data) < messages.MAX_MESSAGE // 2
    assert messages.decode(data)["ok"]["exits"][511]["counts"] == counts


def test_an_exporters_requests_fit() -> None:
    assert len(messages.encode({"id": (1 << 64) - 1, "verb": "metrics", "args": {}})) < EXPORTER.message
