"""What a vhost-user back end's server and its device say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.vhost_memory import Mapping


@dataclass(frozen=True, slots=True)
class Ring:
    """A split virtqueue that is to run. `desc`, `avail` and `used` are addresses here, whole and range-checked.

    `base` is the next avail index as the front end knows it. A device that keeps an inflight region starts at `base`
    plus the number of entries that the region still marks in flight, and completes those first: after a crash the
    front end can only give used.idx. A region whose version is 0 is new and the device's to initialise.
    """

    index: int
    size: int
    desc: int
    avail: int
    used: int
    base: int
    kick_fd: int
    call_fd: int
    log_used: bool  # with a dirty log set, the used ring's writes belong into it, from `used_gpa` on
    used_gpa: int
    inflight: int  # address of this queue's part of the inflight region; 0: none
    inflight_desc_num: int


class Backend(Protocol):
    """A device. Failures are FlotillaError or OSError; they cost the message, not the process."""

    num_queues: int
    features: int  # virtio features, without the two that belong to vhost-user
    protocol_features: int  # beyond SERVER_FEATURES

    def set_features(self, features: int) -> None: ...

    def set_memory(self, mappings: tuple[Mapping, ...]) -> None:
        """Guest memory from now on. What it does not contain is unmapped as soon as this returns."""

    def set_log(self, address: int, size: int) -> None:
        """Dirty bitmap, one bit per 4 KiB of guest address, to be set by atomic OR; (0, 0): no logging.

        The former bitmap is unmapped as soon as this returns.
        """

    def start_queue(self, ring: Ring) -> None:
        """Serve the ring, beginning with what is available already: its kick may have been consumed.

        When this raises, nothing of the ring may be in use: no stop_queue() follows.
        """

    def stop_queue(self, index: int) -> int:
        """The next avail index; returns when nothing of the queue is in flight any more."""
        ...

    def get_config(self, offset: int, size: int) -> bytes: ...

    def set_config(self, offset: int, data: bytes) -> None: ...
