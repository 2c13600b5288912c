"""The control queue's commands (virtio 1.2, 5.1.6.5): pure decisions, one table."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from net_worker.settings import Settings
from shared.virtio_net import (
    F_CTRL_GUEST_OFFLOADS,
    F_GUEST_ANNOUNCE,
    F_GUEST_CSUM,
    F_MQ,
    GUEST_OFFLOADS,
)

OK, ERR = 0, 1
ANNOUNCE, MQ, GUEST_OFFLOADS_CLASS = 3, 4, 5
LONGEST: Final = 2 + 8 + 1  # one byte more than any command that is known, so that a longer one is told apart


def _acknowledge(settings: Settings, _: int, _acked: int, _most: int) -> Settings | None:
    return replace(settings, announce=False)


def _set_pairs(settings: Settings, pairs: int, _acked: int, most: int) -> Settings | None:
    return replace(settings, pairs=pairs) if 1 <= pairs <= most else None


def _set_offloads(settings: Settings, offloads: int, acked: int, _most: int) -> Settings | None:
    segments_without_checksums = offloads and not offloads & F_GUEST_CSUM
    if offloads & ~(acked & GUEST_OFFLOADS) or segments_without_checksums:
        return None
    return replace(settings, offloads=offloads)


_Act = Callable[[Settings, int, int, int], Settings | None]
# (class, command) -> feature bit that it needs, layout of its data, what it does with the number in it
_COMMANDS: Final[dict[tuple[int, int], tuple[int, str, _Act]]] = {
    (ANNOUNCE, 0): (F_GUEST_ANNOUNCE, "<", _acknowledge),
    (MQ, 0): (F_MQ, "<H", _set_pairs),
    (GUEST_OFFLOADS_CLASS, 0): (F_CTRL_GUEST_OFFLOADS, "<Q", _set_offloads),
}


def decide(command: bytes, settings: Settings, acked: int, most_pairs: int) -> Settings | None:
    """The settings after a command; None: it is refused (VIRTIO_NET_ERR) and changes nothing."""
    if len(command) < 2 or (command[0], command[1]) not in _COMMANDS:
        return None
    feature, layout, act = _COMMANDS[command[0], command[1]]
    if not acked & feature or len(command) != 2 + struct.calcsize(layout):
        return None
    value = struct.unpack_from(layout, command, 2)
    return act(settings, value[0] if value else 0, acked, most_pairs)
