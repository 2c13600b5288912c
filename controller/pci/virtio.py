"""What the virtio-pci transport and a device's front end say to each other.

The transport owns registers, vectors and eventfds; the device owns the back end. Whoever implements VirtioDevice
may also call its transport: VirtioPci.config_changed() and VirtioPci.needs_reset().

Source: virtio 1.2, sections 2.1 (status), 2.6 (split virtqueues), 5 (device types).
"""

from __future__ import annotations

from collections.abc import Coroutine
from enum import IntFlag

from shared.records import Record
from shared.typed import Any, Protocol

VIRTIO_F_VERSION_1 = 1 << 32


class Status(IntFlag):
    """device_status."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class Virtqueue(Record):
    """One queue that the driver has set up. Ring addresses are guest physical and lie in RAM."""

    index: int
    size: int
    desc: int
    avail: int
    used: int
    kick_fd: int  # ioeventfd: the driver has made buffers available
    call_fd: int  # eventfd: the back end has used buffers


class VirtioDevice(Protocol):
    """A device behind the transport."""

    @property
    def device_id(self) -> str: ...
    @property
    def virtio_type(self) -> int: ...
    @property
    def queue_sizes(self) -> tuple[int, ...]: ...
    @property
    def features(self) -> int:
        """Offered, VERSION_1 included."""

    @property
    def has_config(self) -> bool: ...

    def read_config(self, offset: int, size: int) -> int: ...

    def write_config(self, offset: int, size: int, value: int) -> Coroutine[Any, Any, None] | None:
        """A coroutine when the back end has to be told; the writing vCPU waits for it."""

    async def activate(self, acked_features: int, queues: tuple[Virtqueue, ...]) -> None:
        """Start the back end on the queues that are ready. Raises FlotillaError: the device needs a reset then."""

    async def reset(self) -> None:
        """Returns when the back end has stopped touching guest memory."""

    def save(self) -> dict[str, object]:
        """State under the key names of the reference's cloud-hypervisor-machine page, section 7.7."""

    def load(self, state: dict[str, object]) -> None: ...


class RingMemory(Protocol):
    """Guest memory as far as the transport needs it (shared.memory.GuestMemory)."""

    def host_address(self, gpa: int, size: int) -> int:
        """Raises BadGuestAddress for what is not RAM."""
