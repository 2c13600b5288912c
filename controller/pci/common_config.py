"""The common configuration structure of virtio-pci: 56 bytes at the start of BAR 0, and the queues it programs.

Only aligned accesses of a field's own size count; others read 0 and write nothing. The 64-bit ring addresses can be
written in halves or whole and read 0, as in Cloud Hypervisor. device_status is the transport's.

Source: virtio 1.2, section 4.1.4.3 (struct virtio_pci_common_cfg, up to queue_device).
"""

from __future__ import annotations

from collections.abc import Callable

from controller.devices.misuse import Misuse
from controller.devices.state import Fields, State
from controller.pci.msix import NO_VECTOR
from controller.pci.virtio import VirtioDevice
from shared.errors import ProtocolError
from shared.records import Record
from shared.typed import Final

SIZE: Final = 0x38
STATUS: Final = 0x14

_DEVICE_FEATURE: Final = 0x04
_CONFIG_GENERATION: Final = 0x15
_RINGS: Final = (0x20, "desc", 16), (0x28, "avail", 2), (0x30, "used", 4)  # offset, name, alignment


class Queue(Record, frozen=False):
    """What the driver has programmed. Ring addresses are guest physical and may be anything."""

    max_size: int
    size: int
    ready: bool = False
    desc: int = 0
    avail: int = 0
    used: int = 0

    def reset(self) -> None:
        self.size, self.ready = self.max_size, False
        self.desc = self.avail = self.used = 0

    def set_size(self, size: int) -> bool:
        """False, and nothing changes, unless it is a power of two and not above the maximum."""
        if not 0 < size <= self.max_size or size & size - 1:
            return False
        self.size = size
        return True

    def rings(self) -> tuple[tuple[int, int], ...]:
        """(address, bytes) of the three rings, each with its event index."""
        return (self.desc, 16 * self.size), (self.avail, 6 + 2 * self.size), (self.used, 6 + 8 * self.size)


class CommonConfig:
    """Registers and queues. Reads and writes are looked up by (offset, size)."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device
        self._misuse = Misuse(device.device_id)
        self.queues = [Queue(size, size) for size in device.queue_sizes]
        self.acked_features = 0
        self.status = 0
        self.generation = 0
        self.config_changed = False
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * len(self.queues)
        self._readers = self._make_readers()
        self._writers = self._make_writers()

    def reset(self) -> None:
        """What writing 0 to device_status does. Acknowledged features stay, and so does the generation."""
        self.status = 0
        self.config_changed = False
        self.device_feature_select = self.driver_feature_select = self.queue_select = 0
        self.config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * len(self.queues)
        for queue in self.queues:
            queue.reset()

    def read(self, offset: int, size: int) -> int:
        reader = self._readers.get((offset, size))
        if reader is None:
            self._misuse.report(f"read of {size} bytes at {offset:#x} of the common configuration")
            return 0
        return reader()

    def write(self, offset: int, size: int, value: int) -> None:
        writer = self._writers.get((offset, size))
        if writer is None:
            self._misuse.report(f"write of {size} bytes at {offset:#x} of the common configuration")
        else:
            writer(value)

    def consume_config_change(self) -> None:
        """The device's configuration is about to be read: a change since the last read makes a new generation."""
        if self.config_changed:
            self.config_changed = False
            self.generation = self.generation + 1 & 0xFF

    def _queue(self) -> Queue | None:
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def _make_readers(self) -> dict[tuple[int, int], Callable[[], int]]:
        def of_queue(value: Callable[[Queue], int]) -> Callable[[], int]:
            return lambda: 0 if (queue := self._queue()) is None else value(queue)

        return {
            (0x00, 4): lambda: self.device_feature_select,
            (_DEVICE_FEATURE, 4): self._device_features,
            (0x08, 4): lambda: self.driver_feature_select,
            (0x10, 2): lambda: self.config_vector,
            (0x12, 2): lambda: len(self.queues),
            (STATUS, 1): lambda: self.status,
            (_CONFIG_GENERATION, 1): lambda: self.generation,
            (0x16, 2): lambda: self.queue_select,
            (0x18, 2): of_queue(lambda queue: queue.size),
            (0x1A, 2): self._queue_vector,
            (0x1C, 2): of_queue(lambda queue: int(queue.ready)),
            (0x1E, 2): lambda: self.queue_select,  # queue_notify_off
        }

    def _device_features(self) -> int:
        select = self.device_feature_select
        return self._device.features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0

    def _queue_vector(self) -> int:
        return self.queue_vectors[self.queue_select] if self.queue_select < len(self.queues) else NO_VECTOR

    def _make_writers(self) -> dict[tuple[int, int], Callable[[int], None]]:
        writers: dict[tuple[int, int], Callable[[int], None]] = {
            (0x00, 4): lambda value: setattr(self, "device_feature_select", value),
            (0x08, 4): lambda value: setattr(self, "driver_feature_select", value),
            (0x0C, 4): self._acknowledge,
            (0x10, 2): lambda value: setattr(self, "config_vector", value),
            (0x16, 2): lambda value: setattr(self, "queue_select", value),
            (0x18, 2): self._set_size,
            (0x1A, 2): self._set_vector,
            (0x1C, 2): self._set_ready,
        }
        for offset, name, align in _RINGS:
            low_half, high_half = 0xFFFF_FFFF, 0xFFFF_FFFF << 32
            writers[offset, 4] = self._ring_writer(name, align, 0, high_half)
            writers[offset + 4, 4] = self._ring_writer(name, align, 32, low_half)
            writers[offset, 8] = self._ring_writer(name, align, 0, 0)
        return writers

    def _ring_writer(self, name: str, align: int, shift: int, keep: int) -> Callable[[int], None]:
        def write(value: int) -> None:
            queue = self._queue()
            if queue is None:
                return
            address = getattr(queue, name) & keep | value << shift
            if address % align:
                self._misuse.report(
                    f"{name} ring of queue {self.queue_select} at {address:#x} is not aligned to {align}"
                )
            else:
                setattr(queue, name, address)

        return write

    def _acknowledge(self, value: int) -> None:
        """Bits that were never offered are dropped; none is ever taken back, not even by a reset."""
        if self.driver_feature_select < 2:
            self.acked_features |= value << 32 * self.driver_feature_select & self._device.features

    def _set_size(self, value: int) -> None:
        queue = self._queue()
        if queue is not None and not queue.set_size(value):
            self._misuse.report(
                f"size {value} of queue {self.queue_select}, at most {queue.max_size} is possible"
            )

    def _set_vector(self, value: int) -> None:
        if self.queue_select < len(self.queues):
            self.queue_vectors[self.queue_select] = value

    def _set_ready(self, value: int) -> None:
        queue = self._queue()
        if queue is not None:
            queue.ready = value == 1

    def save(self) -> State:
        """Keys of Cloud Hypervisor's `virtio_pci_common_config`."""
        return {
            "driver_status": self.status,
            "config_generation": self.generation,
            "device_feature_select": self.device_feature_select,
            "driver_feature_select": self.driver_feature_select,
            "queue_select": self.queue_select,
            "msix_config": self.config_vector,
            "msix_queues": list(self.queue_vectors),
        }

    def save_queues(self) -> list[State]:
        """The transport's `queues`. Cloud Hypervisor v53 reads the used index of every queue, ready or not, and
        aborts where that is not RAM, so a queue that is not ready has its used ring at 0 (the private part has
        the truth)."""
        return [
            {
                "max_size": queue.max_size,
                "size": queue.size,
                "ready": queue.ready,
                "desc_table": queue.desc,
                "avail_ring": queue.avail,
                "used_ring": queue.used if queue.ready else 0,
            }
            for queue in self.queues
        ]

    def load(self, fields: Fields, queues: list[Queue]) -> None:
        """Raises ProtocolError; nothing has changed then. `queues` come from load_queues()."""
        status, generation = fields.integer("driver_status", 8), fields.integer("config_generation", 8)
        device_select = fields.integer("device_feature_select", 32)
        driver_select = fields.integer("driver_feature_select", 32)
        queue_select = fields.integer("queue_select", 16)
        config_vector = fields.integer("msix_config", 16)
        queue_vectors = fields.integers("msix_queues", 16, len(self.queues))
        self.status, self.generation = status, generation
        self.device_feature_select, self.driver_feature_select = device_select, driver_select
        self.queue_select = queue_select
        self.config_vector, self.queue_vectors = config_vector, queue_vectors
        self.queues = queues

    def load_queues(self, fields: Fields) -> list[Queue]:
        """The queues of a transport's state, checked against ours."""
        loaded = []
        for own, part in zip(self.queues, fields.sections("queues", len(self.queues)), strict=True):
            queue = Queue(own.max_size, own.max_size)
            if part.integer("max_size", 16) != own.max_size or not queue.set_size(part.integer("size", 16)):
                raise ProtocolError(
                    f"state of {part.where}: size: expected a power of two up to {own.max_size}"
                )
            queue.ready = part.flag("ready")
            queue.desc = part.integer("desc_table", 64)
            queue.avail = part.integer("avail_ring", 64)
            queue.used = part.integer("used_ring", 64)
            loaded.append(queue)
        return loaded
