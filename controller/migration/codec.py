"""Bodies of the messages between two controllers: msgpack maps, one row of fields per type. Readers are tolerant.

    BUILD      config (VmConfig as CH's JSON), parts [[gpa, size, offset, slot]…], disks [id…],
               taps [[id, queue pairs]…], info, paused, release
               fds: ownership page, eventfd, the source's pidfd, RAM (one per part), disks (in the order of `disks`),
               TAPs (in the order of `taps`, one per queue pair)
    BUILT      timing;  fd: the destination's pidfd (local)
    STATE      state (Migratable.save), paused_at (CLOCK_MONOTONIC in seconds; None: it was paused before), source
               (local: the source's breakdown so far; may be missing)
    STARTED    timing, running_at (CLOCK_MONOTONIC of the moment in which the guest went on, seconds)
    MACHINE    config, parts, info, paused, release: a remote migration's BUILD
    ACCEPTED   took_ms (what the checks took)
    END_OF_RAM copied (figures of the rounds; may be missing)
    PREPARED   timing, ticket [name, secret] (for ASK and OUTCOME; an older peer leaves it out)
    COMMIT     paused_ms (how long the guest has been paused; None: it was paused before), source (its breakdown so far;
               may be missing)
    HEARD      –
    ASK        name (of the ticket)
    OUTCOME    outcome ("started", "refused" or "nothing"), secret (of the ticket; empty with "nothing")
    REFUSED    error (shared.messages.error_to_wire);  WITHDRAWN the same
"""

from __future__ import annotations

from typing import Any

import msgpack

from shared.errors import MigrationError, ProtocolError
from shared.handover import AGENTS_ONLY, LIMITS, Message
from shared.messages import Field, unpack

FIELDS: dict[Message, tuple[Field, ...]] = {
    Message.BUILD: (
        Field("config", dict),
        Field("parts", list),
        Field("disks", list),
        Field("info", dict),
        Field("paused", bool),
    ),
    Message.BUILT: (Field("timing", dict),),
    Message.STATE: (Field("state", dict),),
    Message.STARTED: (Field("timing", dict), Field("running_at", (float, int))),
    Message.MACHINE: (
        Field("config", dict),
        Field("parts", list),
        Field("info", dict),
        Field("paused", bool),
    ),
    Message.ACCEPTED: (Field("took_ms", (float, int)),),
    Message.END_OF_RAM: (),
    Message.PREPARED: (Field("timing", dict),),
    Message.COMMIT: (),
    Message.HEARD: (),
    Message.ASK: (Field("name", str),),
    Message.OUTCOME: (Field("outcome", str), Field("secret", str)),
    Message.REFUSED: (Field("error", dict),),
    Message.WITHDRAWN: (Field("error", dict),),
}


def encode(kind: Message, body: dict[str, Any]) -> bytes:
    """Raises MigrationError for what can't travel: a value of another type, or too much of it."""
    try:
        data = bytes(msgpack.packb(body, use_bin_type=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise MigrationError(f"{kind.name}: can't be encoded: {error}") from error
    if len(data) > LIMITS[kind].body:
        raise MigrationError(f"{kind.name} has {len(data)} bytes (limit {LIMITS[kind].body})")
    return data


def decode(kind: Message, data: bytes) -> dict[str, Any]:
    """Raises ProtocolError that names message and field."""
    if kind in AGENTS_ONLY:
        raise ProtocolError(f"{kind.name} from the peer is not for a controller")
    body = unpack(data, f"{kind.name} from the peer")
    if not isinstance(body, dict):
        raise ProtocolError(f"{kind.name} from the peer is not a map")
    for field in FIELDS[kind]:
        if field.name not in body:
            raise ProtocolError(f"{kind.name} from the peer: field {field.name} is missing")
        if not isinstance(body[field.name], field.type):
            raise ProtocolError(
                f"{kind.name} from the peer: field {field.name} has type {type(body[field.name]).__name__}"
            )
    return body


def parts_of(body: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """`parts` of a BUILD, checked."""
    parts = []
    for part in body["parts"]:
        if not isinstance(part, list) or len(part) != 4 or not all(type(n) is int and n >= 0 for n in part):
            raise ProtocolError("BUILD from the peer: a memory region is not (gpa, size, offset, slot)")
        parts.append((part[0], part[1], part[2], part[3]))
    return parts


def disks_of(body: dict[str, Any]) -> list[str]:
    """`disks` of a BUILD, checked."""
    disks = body["disks"]
    if not all(isinstance(name, str) for name in disks) or len(set(disks)) != len(disks):
        raise ProtocolError("BUILD from the peer: disks are not a list of different ids")
    return list(disks)


def taps_of(body: dict[str, Any]) -> dict[str, int]:
    """`taps` of a BUILD, checked: how many descriptors each device has. An older peer leaves it out."""
    taps: dict[str, int] = {}
    given = body.get("taps", [])
    if not isinstance(given, list):
        raise ProtocolError("BUILD from the peer: taps are not a list")
    for tap in given:
        if not isinstance(tap, list) or len(tap) != 2 or not isinstance(tap[0], str) or type(tap[1]) is not int:
            raise ProtocolError("BUILD from the peer: a TAP is not (id, queue pairs)")
        if tap[0] in taps or tap[1] < 1:
            raise ProtocolError("BUILD from the peer: taps are not different ids with a queue pair or more each")
        taps[tap[0]] = tap[1]
    return taps
