"""metrics_exporter.source: a controller whose answers and notes are wrong costs one scrape and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from metrics_exporter import source
from metrics_exporter.source import Measured, Source
from shared.control import Channel, unlink_endpoint
from shared.errors import HostError, ProtocolError
from shared.figures import Figures, to_wire
from shared.linux import memfd, send_fds
from shared.reactor import Reactor
from tests.descriptors import descriptors

SECONDS = 20.0
GARBAGE = bytes.fromhex("c1ff00")


class Rig:
    """The source's controller is this test: `answer` is what it says, `send` puts a note beside it."""

    def __init__(self, folder: Path) -> None:
        self.reactor = Reactor()
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.answer: dict[str, Any] = to_wire(Figures(version="1"))
        endpoint = f"ipc://{folder}/controller"
        self.controller = Channel(self.reactor, endpoint, bind=True)
        self.controller.handlers["metrics"] = lambda _: self.answer
        self.source = Source(self.reactor, endpoint, self._theirs)
        self.reactor.run_until(self.source.connected(), SECONDS)
        unlink_endpoint(endpoint)
        self.reactor.run_until(self.source.measure(), SECONDS)
        self.descriptors = descriptors()

    def close(self) -> None:
        self.source._channel.close()
        self.controller.close()
        self.ours.close()
        self._theirs.close()
        self.reactor.close()

    def send(self, note: bytes, *contents: bytes) -> None:
        files = [memfd("note", 4096) for _ in contents]
        for file, content in zip(files, contents, strict=True):
            os.pwrite(file, content, 0)
        send_fds(self.ours, note, files)
        for file in files:
            os.close(file)

    def measure(self) -> Measured:
        return self.reactor.run_until(self.source.measure(), SECONDS)

    def goes_on(self) -> None:
        """Nothing is left of what came before, and the next one is measured as ever."""
        assert not descriptors() - self.descriptors
        self.answer = to_wire(Figures(version="2"))
        self.send(msgpack.packb({"pids": [7]}), rollup(3))
        measured = self.measure()
        assert (measured.figures.version, measured.pss_bytes) == ("2", {7: 3 << 10})
        assert not descriptors() - self.descriptors


def rollup(kib: int) -> bytes:
    return b"00-ff ---p 00000000 00:00 0 [rollup]\nRss:  9 kB\nPss:  %d kB\nPss_Anon: 1 kB\n" % kib


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(source, "FRESH_SECONDS", 0.0)
    made = Rig(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("note", "says"),
    [
        (GARBAGE, "not msgpack"),
        (b"\x81", "not msgpack"),
        (msgpack.packb("\u00fc").replace(b"\xc3", b"\xff"), "not msgpack"),
        (b"\x81\x90\x01", "not msgpack"),
        (msgpack.packb(5), "without pids"),
        (msgpack.packb({"pid": [1]}), "without pids"),
        (msgpack.packb({"pids": 1}), "without pids"),
        (msgpack.packb({"pids": [1, "2"]}), "no number"),
        (msgpack.packb({"pids": [[1], 2]}), "no number"),
    ],
    ids=["garbage", "cut", "no text", "key", "no map", "none", "no list", "text", "list"],
)
def test_a_note_that_is_none_is_the_scrapes_error(rig: Rig, note: bytes, says: str) -> None:
    rig.send(note, rollup(1), rollup(2))
    with pytest.raises(ProtocolError, match=says):
        rig.measure()
    rig.goes_on()


@pytest.mark.parametrize(
    "answer",
    [
        {"processes": 5},
        {"processes": [5]},
        {"migration": []},
        {"processes": [{"restarts": "often"}]},
        {"workers": [{"stats": {"errors": "many"}}]},
        {"exits": [{"counts": {"vcpu": 1}}]},
        {"kvm": [{"table": "text"}]},
        {"version": None},
    ],
)
def test_an_answer_of_another_shape_is_the_scrapes_error(rig: Rig, answer: dict[str, Any]) -> None:
    rig.answer = answer
    with pytest.raises(ProtocolError, match="figures"):
        rig.measure()
    rig.goes_on()


def test_an_empty_note_with_descriptors_leaves_none_behind(rig: Rig) -> None:
    rig.send(b"", rollup(1))
    assert rig.measure().pss_bytes == {}
    rig.goes_on()


def test_more_descriptors_than_pids_are_closed_too(rig: Rig) -> None:
    rig.send(msgpack.packb({"pids": [1]}), rollup(1), rollup(2))
    assert rig.measure().pss_bytes == {1: 1 << 10}
    rig.goes_on()


@pytest.mark.parametrize(
    "content",
    [b"", b"Pss:", b"Pss: many kB\n", b"Pss: -1 kB\n", b"Pss: " + b"9" * 4000, bytes(100)],
    ids=["empty", "cut", "text", "negative", "huge", "zeros"],
)
def test_a_file_that_is_no_rollup_tells_nothing_of_its_process(rig: Rig, content: bytes) -> None:
    rig.send(msgpack.packb({"pids": [1, 2]}), content, rollup(2))
    assert rig.measure().pss_bytes == {2: 2 << 10}
    rig.goes_on()


def test_descriptors_that_cannot_be_received_are_the_scrapes_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> tuple[bytes, list[int]]:
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(source, "recv_fds", refused)
        with pytest.raises(HostError, match="too many open files"):
            rig.measure()
    rig.goes_on()


def test_an_error_that_nobody_foresaw_reaches_who_waits_and_ends_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> int | None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(source, "_pss", broken)
        rig.send(msgpack.packb({"pids": [1]}), rollup(1))
        with pytest.raises(ZeroDivisionError):
            rig.measure()
    rig.goes_on()
