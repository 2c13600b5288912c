"""shared.control: a peer that says nonsense gets an error, or gives one to who asked it; the channel goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from shared import messages
from shared.control import Channel, context, unlink_endpoint
from shared.errors import ProtocolError
from shared.reactor import Future, Reactor

SECONDS = 30.0


class Peer:
    """A channel as every process has one, and the bare socket of whoever is at its other end."""

    def __init__(self, folder: Path) -> None:
        self.reactor = Reactor()
        self.endpoint = f"ipc://{folder}/c"
        self.channel = Channel(self.reactor, self.endpoint, bind=True)
        self.channel.handlers = {"hello": lambda _: {"heard": True}}
        self.heard: Future[tuple[str, dict[str, Any]]] = Future()
        self.channel.on_event = lambda name, arguments: self.heard.set_result((name, arguments))
        self.socket = context().socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.connect(self.endpoint)

    def say(self, **message: Any) -> None:
        self.socket.send(msgpack.packb({"v": messages.VERSION, **message}))

    def answer(self) -> dict[str, Any]:
        """The next thing that the channel says."""
        end = time.monotonic() + SECONDS
        while not self.socket.poll(10):
            assert time.monotonic() < end, f"the channel says nothing for {SECONDS} s"
            self.reactor.call_soon(lambda: None)
            self.reactor._round()
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
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path)
    made.goes_on()  # they are connected
    yield made
    made.close()


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
