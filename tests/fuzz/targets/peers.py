"""What other processes and the peer of a migration say: control messages, the migration stream and its bodies."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import zmq

from controller.config.codec import from_json, to_json
from controller.config.model import PayloadConfig, VmConfig
from controller.config.validate import validate
from controller.migration import codec
from migration_agent.pages import Sink
from shared import messages
from shared.control import Channel, context
from shared.errors import FlotillaError, ProtocolError
from shared.handover import AGENTS_ONLY, LIMITS, Message
from shared.linux import memfd
from shared.messages import ARGUMENTS, Verb
from shared.pages import COUNTS, PAGE_SIZE, RUN, Regions
from shared.reactor import Reactor
from shared.state_versions import KINDS, refusals
from shared.wire import HEADER, Decoder, Frame, Hello, PageList, encode, encode_hello
from tests.fuzz.choices import Choices
from tests.fuzz.engine import Target
from tests.fuzz.turns import settle
from vcpu_worker.ch_form import from_ch

SECONDS = 30.0
TAIL = {"v": 1, "id": 999_999, "verb": "hello", "args": {}}


# Control messages ------------------------------------------------------------------------------------------------


class ControlRig:
    """A channel as each process has one, and a peer that says anything."""

    def __init__(self, folder: str) -> None:
        self.reactor = Reactor()
        self.endpoint = f"ipc://{folder}/c"
        self.channel = Channel(self.reactor, self.endpoint, bind=True)
        self.channel.handlers = dict.fromkeys(Verb, lambda arguments: {"heard": len(arguments)})
        self.channel.on_event = lambda name, arguments: arguments.get(name)
        self.peer = context().socket(zmq.DEALER)
        self.peer.set(zmq.LINGER, 0)
        self.peer.connect(self.endpoint)
        self.number = 0

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        call = self.reactor.spawn(self.call(), "call")
        settle(self.reactor)
        for _ in range(1 + choices.below(4)):
            frames = [self.message(choices)]
            self.peer.send_multipart(frames if choices.below(8) < 7 else [*frames, choices.bytes(4)])
        # The channel answers this, whatever came before it.
        self.number += 1
        self.peer.send(msgpack.packb({**TAIL, "id": 1 << 40 | self.number}))
        poll = zmq.Poller()
        poll.register(self.peer, zmq.POLLIN)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            settle(self.reactor)
            while poll.poll(0):
                answer = messages.decode(self.peer.recv())
                if answer.get("id") == 1 << 40 | self.number:
                    assert answer["ok"] == {"heard": 0}, answer
                    call.cancel()
                    settle(self.reactor)
                    return
            poll.poll(10)
        raise AssertionError("the channel does not answer any more")

    async def call(self) -> None:
        """What a process waits for when the peer answers nonsense."""
        with contextlib.suppress(FlotillaError):
            answer = await self.channel.call("heartbeat", None)
            answer.get("epoch")

    def message(self, choices: Choices) -> bytes:
        kind = choices.below(6)
        if kind == 0:
            return choices.bytes(choices.below(64))
        if kind == 4:  # lists that promise more than there is, or are too many, or too deep
            return choices.bytes(choices.below(6)) * (1 + choices.below(2000))
        if kind == 5:
            return msgpack.packb({"v": 1, "id": 1, "verb": "x" * choices.below(60000), "args": choices.junk()})
        if kind == 1:
            verb = choices.one_of(list(Verb))
            arguments = {field.name: choices.junk() for field in ARGUMENTS[verb]}
            whole: dict[str, Any] = {"v": 1, "id": choices.number(16), "verb": str(verb), "args": arguments}
        elif kind == 2:
            pending = next(iter(self.channel._pending), 0)
            error = {"type": choices.one_of(("WorkerError", "Exception", "chain", "")), "message": "m", "causes": ["c"]}
            whole = {"v": 1, "id": pending, choices.one_of(("ok", "error")): choices.one_of(({"a": 1}, error))}
        else:
            whole = {"v": 1, "event": "progress", "args": {"a": 1}}
        packed = msgpack.packb(_packable(choices.damage(whole)))
        return packed if choices.below(8) else packed[: choices.below(40)]

    def close(self) -> None:
        self.peer.close()
        self.channel.close()
        self.reactor.close()


def _packable(value: Any) -> Any:
    """msgpack has 64-bit numbers only, and damage may have gone beyond."""
    if isinstance(value, dict):
        return {_packable(key): _packable(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_packable(below) for below in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(1 << 63), min(value, (1 << 64) - 1))
    return value


def control() -> Iterator[Callable[[bytes], None]]:
    with tempfile.TemporaryDirectory(prefix="fl.") as folder:
        rig = ControlRig(folder)
        try:
            yield rig.run
        finally:
            rig.close()


# The stream ------------------------------------------------------------------------------------------------------


class StreamRig:
    """The destination's end: decoder, bodies, pages into RAM of two regions."""

    def __init__(self) -> None:
        self.fds = [memfd("fuzz-ram", 16 * PAGE_SIZE), memfd("fuzz-ram", 8 * PAGE_SIZE)]
        parts = [(0, 16 * PAGE_SIZE, 0, self.fds[0]), (1 << 20, 8 * PAGE_SIZE, 0, self.fds[1])]
        self.regions = Regions(parts, writable=True)

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        sizes, stream = choices.bytes(4), choices.rest()
        decoder, sink, at, turn = Decoder(), Sink(self.regions), 0, 0
        reader, writer = os.pipe2(os.O_NONBLOCK)
        try:
            while at < len(stream):
                step = min(1 + sizes[turn % 4], decoder.wants)
                turn += 1
                assert decoder.wants > 0
                item = decoder.feed(stream[at : at + step])
                at += step
                if isinstance(item, Frame):
                    assert len(item.body) <= LIMITS[item.type].body
                    with contextlib.suppress(ProtocolError):
                        body(item.type, item.body)
                elif isinstance(item, PageList):
                    sink.begin(item)
                    while sink.left and at < len(stream):
                        os.write(writer, stream[at : at + min(sink.left, 5000)])
                        at += sink.read(reader)
                elif item is not None:
                    assert isinstance(item, Hello)
            residue = decoder.residue()
            if not decoder.idle and residue and decoder._greeted:
                assert Decoder.resumed(residue).residue() == residue
        finally:
            os.close(reader)
            os.close(writer)
            decoder.close()

    def close(self) -> None:
        self.regions.close()


def stream() -> Iterator[Callable[[bytes], None]]:
    rig = StreamRig()
    try:
        yield rig.run
    finally:
        rig.close()


def stream_seeds() -> list[bytes]:
    hello = b"\xff\x05\x00\x40" + encode_hello()
    pages = COUNTS.pack(1, 1) + RUN.pack(0x1000, 2) + RUN.pack(1 << 20, 8) + bytes(2 * PAGE_SIZE)
    found = [hello + encode(Message.HEARTBEAT) + HEADER.pack(Message.PAGES, 0, len(pages)) + pages[:600]]
    return found + [hello + encode(kind, codec.encode(kind, BODIES[kind])) for kind in BODIES]


# Bodies ----------------------------------------------------------------------------------------------------------

CONFIG = to_json(VmConfig(payload=PayloadConfig(kernel="/k", cmdline="console=ttyS0")))
INFO = {
    "cpuid": [[0, 0, 0, 13, 1, 2, 3]], "kvm": {"XCRS": 1}, "disk_sizes": {"_disk0": 512},
    "state_versions": {name: kind.version for name, kind in KINDS.items()},
}  # fmt: skip
MACHINE = {"config": CONFIG, "parts": [[0, 512 << 20, 0, 0]], "info": INFO, "paused": False, "release": "1"}
TIMING = {"load_ms": 1.5}
ERROR = {"error": messages.error_to_wire(ProtocolError("why", "hint"))}
BODIES: dict[Message, dict[str, Any]] = {
    Message.BUILD: {**MACHINE, "disks": ["_disk0"], "taps": [["_net1", 2]]},
    Message.BUILT: {"timing": TIMING},
    Message.STATE: {"state": {"vm": {}, "vcpus": [{}]}, "paused_at": 1.0},
    Message.STARTED: {"timing": TIMING, "running_at": 2.0},
    Message.MACHINE: MACHINE,
    Message.ACCEPTED: {"took_ms": 1},
    Message.END_OF_RAM: {"copied": {"rounds": 1}},
    Message.PREPARED: {"timing": TIMING, "ticket": ["name", "secret"]},
    Message.COMMIT: {"paused_ms": 3},
    Message.HEARD: {},
    Message.ASK: {"name": "n"},
    Message.OUTCOME: {"outcome": "started", "secret": "s"},
    Message.REFUSED: ERROR,
    Message.WITHDRAWN: ERROR,
}


def body(kind: Message, data: bytes) -> None:
    """What a controller makes of a body before it acts on it."""
    given = codec.decode(kind, data)
    if kind is Message.BUILD:
        codec.disks_of(given)
        codec.taps_of(given)
    if kind in (Message.BUILD, Message.MACHINE):
        codec.parts_of(given)
        refusals(given["info"].get("state_versions", {}))
        validate(from_json(given["config"], strict=False))
    if kind in (Message.REFUSED, Message.WITHDRAWN):
        assert isinstance(str(messages.error_from_wire(given["error"])), str)


def bodies() -> Iterator[Callable[[bytes], None]]:
    kinds = sorted(set(BODIES) | AGENTS_ONLY)

    def run(data: bytes) -> None:
        choices = Choices(data)
        kind = choices.one_of(kinds)
        if choices.below(4):
            body(kind, msgpack.packb(_packable(choices.damage(BODIES.get(kind, {})))))
        else:
            body(kind, choices.rest())

    yield run


# Cloud Hypervisor's form of a vCPU -------------------------------------------------------------------------------


def ch_vcpu() -> dict[str, Any]:
    return {
        "cpuid": [dict.fromkeys(("function", "index", "flags", "eax", "ebx", "ecx", "edx"), 1)],
        "msrs": [{"index": 16, "data": 1}],
        "regs": [1] * 144, "sregs": [2] * 312, "xcrs": [0] * 392, "mp_state": [0] * 4, "vcpu_events": [0] * 64,
        "fpu": {
            "fpr": [[0] * 16] * 8, "xmm": [[1] * 16] * 16,
            **dict.fromkeys(("fcw", "fsw", "ftwx", "last_opcode", "last_ip", "last_dp", "mxcsr"), 3),
        },
        "lapic_state": {"regs": [-1] * 1024}, "xsave": {"region": [7] * 1024, "extra": [1]},
        "tsc_khz": 1000, "nested_state": [0] * 128, "hyperv_synic": False,
    }  # fmt: skip


def ch_form() -> Iterator[Callable[[bytes], None]]:
    template = ch_vcpu()
    from_ch(template)

    def run(data: bytes) -> None:
        state, cpuid = from_ch(Choices(data).damage(template))
        assert all(0 <= number < 1 << 32 for entry in cpuid for number in entry)
        assert len(state["lapic_state"]) == 1024 and len(state["xsave"]) >= 4096
        assert all(struct.pack("<IQ", index, value) for index, value in state["msrs"])

    yield run


TARGETS = (
    Target("control", control, about="msgpack messages of another process, on a channel that must go on answering"),
    Target("stream", stream, stream_seeds, "a migration's byte stream: hello, frames, page lists and pages"),
    Target("bodies", bodies, about="bodies of a migration's messages, and the configuration in them"),
    Target("ch_form", ch_form, about="a vCPU in the form of Cloud Hypervisor's stream"),
)
