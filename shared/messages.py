"""The control plane's schema: every verb that travels by ZeroMQ, in one place.

    request   {"v": 1, "id": n, "verb": "quiesce", "args": {…}}
    answer    {"v": 1, "id": n, "ok": {…}}  or  {"v": 1, "id": n, "error": {"type", "message", "hint", "causes"}}
    event     {"v": 1, "event": "progress", "args": {…}}             unsolicited, no answer

Encoded with msgpack. Readers are tolerant: unknown fields are ignored, so that N and N+1 talk to each other; an unknown
verb, a missing field or a wrong type is answered with a typed error and harms nobody. File descriptors never
travel here.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgpack

from shared import errors
from shared.errors import FlotillaError, ProtocolError, WorkerError
from shared.records import Record
from shared.typed import Any

VERSION = 1
MAX_MESSAGE = 16 << 20
MAX_ITEMS = 1 << 21  # of one list or map: what a console has not delivered yet is a list of a million numbers
MAX_CONTAINERS = 1 << 16  # lists and maps of one message: an empty one is a byte of it and a hundred in memory
MAX_DEPTH = 64  # of them inside each other: repr() and json recurse
MAX_TEXT = 4096  # of an error's message, its hint and each of its causes
MAX_CAUSES = 16
SHOWN = 40  # characters of what a peer said that an error repeats


class Verb(StrEnum):
    """What a worker understands. The first nine are the contract of every worker."""

    HELLO = "hello"
    HEARTBEAT = "heartbeat"
    QUIESCE = "quiesce"
    SAVE = "save"
    LOAD = "load"
    RESUME = "resume"
    STATS = "stats"
    LOG_LEVEL = "log-level"
    FAULT = "fault"
    SHUTDOWN = "shutdown"
    ANNOUNCE = "announce"  # network workers: the guest lives here now, let it and the network know
    FLUSH = "flush"  # a disk's worker: what the guest has written is on stable storage when this is answered
    API = "api"  # api process -> controller: one HTTP request
    METRICS = "metrics"  # metrics exporter -> controller: all figures (shared/figures.py), and no other verb
    SEND = "send"  # controller -> migration agent
    RECEIVE = "receive"
    DELIVER = "deliver"  # a message for the peer, from shared/handover.py; its fds are one datagram on the sidecar
    MAP = "map"  # guest RAM for the agent of a remote migration; the descriptors come by the sidecar
    PUMP = "pump"  # one round of pages
    CANCEL = "cancel"  # the SEND or RECEIVE under way fails with MigrationCancelled


class Field(Record):
    name: str
    type: type | tuple[type, ...]
    required: bool = True


ARGUMENTS: dict[Verb, tuple[Field, ...]] = {
    Verb.HELLO: (),
    Verb.HEARTBEAT: (),
    Verb.QUIESCE: (),
    Verb.SAVE: (),
    Verb.LOAD: (Field("kind", str), Field("version", int), Field("state", dict)),
    Verb.RESUME: (),
    Verb.STATS: (),
    Verb.LOG_LEVEL: (Field("level", str),),
    Verb.FAULT: (
        *(Field("what", str), Field("value", int, required=False)),
        Field("options", dict, required=False),
    ),
    Verb.SHUTDOWN: (),
    Verb.ANNOUNCE: (),
    Verb.FLUSH: (),
    Verb.API: (Field("method", str), Field("path", str), Field("body", (bytes, type(None)), required=False)),
    Verb.METRICS: (),
    Verb.SEND: (Field("url", str), Field("local", bool)),
    Verb.RECEIVE: (Field("url", str),),
    Verb.DELIVER: (Field("type", int), Field("body", bytes), Field("fds", int)),
    Verb.MAP: (Field("regions", list), Field("bitmap", int)),
    Verb.PUMP: (Field("sync", bool),),
    Verb.CANCEL: (),
}


def encode(message: dict[str, Any]) -> bytes:
    return bytes(msgpack.packb({"v": VERSION, **message}, use_bin_type=True))


def decode(data: bytes) -> dict[str, Any]:
    """One message. Raises ProtocolError for anything that is not one."""
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"control message of {len(data)} bytes (limit {MAX_MESSAGE})")
    message = unpack(data, "control message")
    if not isinstance(message, dict) or message.get("v") != VERSION:
        version = message.get("v") if isinstance(message, dict) else "?"
        raise ProtocolError(f"control message of version {version!s:.{SHOWN}}")
    return message


def unpack(data: bytes, what: str) -> object:
    """What a peer has packed, which may have been taken over: what it costs here is bounded. Raises ProtocolError."""
    containers = 0

    def count(container: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise ProtocolError(f"{what} of more than {MAX_CONTAINERS} lists and maps")
        return container

    try:
        _check_whole(data)
        unpacked = msgpack.unpackb(
            data, raw=False, strict_map_key=False, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS,
            list_hook=count, object_hook=count,
        )  # fmt: skip
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:  # TypeError: a list as a key
        raise ProtocolError(f"{what} is not msgpack") from error
    if containers > MAX_DEPTH and _deeper_than(MAX_DEPTH, unpacked):
        raise ProtocolError(f"{what} of more than {MAX_DEPTH} lists and maps inside each other")
    return unpacked


def _check_whole(data: bytes) -> None:
    """Raises ValueError or UnpackException. A list's memory is allocated when its length has been read, so a few bytes
    with a length and nothing behind it, each inside the one before, would be gigabytes."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    unpacker.skip()
    if unpacker.tell() != len(data):
        raise ValueError("bytes behind the message")


def _deeper_than(depth: int, message: object) -> bool:
    level = [message]
    for _ in range(depth):
        level = [below for each in level for below in _items(each) if isinstance(below, (dict, list))]
        if not level:
            return False
    return True


def _items(container: Any) -> Iterable[object]:
    return container.values() if isinstance(container, dict) else container


def check_arguments(verb: str, arguments: object) -> dict[str, Any]:
    """The arguments of a request, checked against the table. Raises ProtocolError that names verb and field."""
    try:
        fields = ARGUMENTS[Verb(verb)]
    except ValueError:
        raise ProtocolError(f"unknown verb {verb[:SHOWN]!r}", "both processes must be of the same release") from None
    if not isinstance(arguments, dict):
        raise ProtocolError(f"{verb}: arguments are not a map")
    for field in fields:
        if field.name not in arguments:
            if field.required:
                raise ProtocolError(f"{verb}: field {field.name} is missing")
        elif not isinstance(arguments[field.name], field.type):
            raise ProtocolError(f"{verb}: field {field.name} has type {type(arguments[field.name]).__name__}")
    return arguments


def error_to_wire(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": error.message if isinstance(error, FlotillaError) else f"{type(error).__name__}: {error}",
        "hint": error.hint if isinstance(error, FlotillaError) else "",
        "causes": errors.chain(error)[1:],
    }


def error_from_wire(wire: object) -> FlotillaError:
    """The error again, of the same class if it is one of ours, WorkerError otherwise, with its causes chained."""
    if not isinstance(wire, dict):
        return ProtocolError("an error answer without an error")
    kind = getattr(errors, str(wire.get("type")), None)
    cls = kind if isinstance(kind, type) and issubclass(kind, FlotillaError) else WorkerError
    error: FlotillaError = cls(str(wire.get("message", ""))[:MAX_TEXT], str(wire.get("hint", ""))[:MAX_TEXT])
    below: BaseException = error
    causes = wire.get("causes")
    for text in causes[:MAX_CAUSES] if isinstance(causes, list) else []:
        below.__cause__ = FlotillaError(str(text)[:MAX_TEXT])
        below = below.__cause__
    return error
