"""A virtio device whose back end is a vhost-user process, as the transport sees it.

Features and configuration space are known without the back end (Cloud Hypervisor's tables), so the guest can look at
the device while its worker is still coming up; activation waits for `ready`. A third party's disk is asked instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from controller.bus import Effect
from controller.config.model import DiskConfig
from controller.pci.virtio import VIRTIO_F_VERSION_1, Virtqueue
from controller.vhost_frontend import Frontend
from shared import log, virtio_blk
from shared.errors import FlotillaError, HostError, ProtocolError
from shared.reactor import Event, describe

if TYPE_CHECKING:
    from controller.pci.virtio_pci import VirtioPci

TYPE_BLOCK, TYPE_CONSOLE, TYPE_RNG = 2, 3, 4
CONSOLE_F_SIZE = 1
# cols, rows (0: unknown), max_nr_ports, emerg_wr
CONSOLE_CONFIG = bytes.fromhex("0000 0000 01000000 00000000")
CONSOLE_QUEUES, RNG_QUEUES = (256, 256), (256,)


class VhostDevice:
    """Implements controller.pci.virtio.VirtioDevice."""

    def __init__(
        self,
        device_id: str,
        virtio_type: int,
        queue_sizes: tuple[int, ...],
        features: int,
        config: bytes,
        frontend: Frontend,
        ready: Event,
        writable: range = range(0),
    ) -> None:
        """`writable`: the bytes of the configuration space that a driver may change."""
        self.device_id = device_id
        self.virtio_type = virtio_type
        self.queue_sizes = queue_sizes
        self.features = features
        self.frontend = frontend
        self.transport: VirtioPci | None = None
        self._config = bytearray(config)
        self._writable = writable
        self._ready = ready
        self._bases: dict[int, int] | None = None  # of a restored device, until it is activated

    @property
    def has_config(self) -> bool:
        return bool(self._config)

    def read_config(self, offset: int, size: int) -> int:
        return int.from_bytes(self._config[offset : offset + size].ljust(size, b"\0"), "little")

    def write_config(self, offset: int, size: int, value: int) -> Effect | None:
        """Bytes that are not writable are ignored; the others go to the back end, and the vCPU waits for it."""
        if offset not in self._writable or offset + size > self._writable.stop:
            return None
        data = value.to_bytes(size, "little")
        self._config[offset : offset + size] = data
        return self._pass_on(offset, data)

    async def _pass_on(self, offset: int, data: bytes) -> None:
        await self._ready.wait()
        try:
            await self.frontend.set_config(offset, data)
        except FlotillaError as error:
            log.warn(f"{self.device_id}: configuration write at {offset}: {describe(error)}")

    async def activate(self, acked_features: int, queues: tuple[Virtqueue, ...]) -> None:
        restored, self._bases = self._bases, None
        if restored is None:
            await self._ready.wait()
            await self._check_features(acked_features)
        await self.frontend.activate(acked_features, queues, restored, restored=restored is not None)
        if self._writable:
            await self.frontend.set_config(self._writable.start, bytes(self._config[self._writable.start : self._writable.stop]))

    async def _check_features(self, acked: int) -> None:
        lacking = acked & ~self.frontend.features
        if lacking:
            raise HostError(f"{self.device_id}: its back end lacks features {lacking:#x} that the guest was offered")

    async def reset(self) -> None:
        await self.frontend.reset()

    async def stop(self) -> dict[int, int]:
        return await self.frontend.stop()

    def save(self) -> dict[str, object]:
        """The transport adds acked_features. Ring positions are ours alone: Cloud Hypervisor reads them from RAM."""
        bases = {str(index): base for index, base in self.frontend.bases.items()}
        return {
            "avail_features": self.features,
            "config": bytes(self._config),
            "flotilla": {"bases": bases},
        }

    def load(self, state: dict[str, object]) -> None:
        """A VM keeps the features that it was offered. Raises ProtocolError."""
        features, config, private = (state.get(key) for key in ("avail_features", "config", "flotilla"))
        if not isinstance(features, int) or not isinstance(config, bytes) or len(config) != len(self._config):
            raise ProtocolError(f"state of {self.device_id}: avail_features or config is missing or malformed")
        self.features = features
        self._config[:] = config
        bases = private.get("bases") if isinstance(private, dict) else None
        self._bases = {int(index): int(base) for index, base in (bases or {}).items()}


def block_device(disk: DiskConfig, frontend: Frontend, image: int | None, ready: Event) -> VhostDevice:
    """A disk. `image` is None for a back end that somebody else runs: its size is unknown until it is asked."""
    assert disk.id is not None
    sizes = (disk.queue_size,) * disk.num_queues
    if image is None:
        offered = virtio_blk.F_SEG_MAX | virtio_blk.F_BLK_SIZE | virtio_blk.F_FLUSH | VIRTIO_F_VERSION_1
        offered |= virtio_blk.F_MQ if disk.num_queues > 1 else 0
        space = bytes(virtio_blk.CONFIG_SIZE)
        return VhostDevice(disk.id, TYPE_BLOCK, sizes, offered, space, frontend, ready)
    try:
        geometry = virtio_blk.geometry(image)
    except OSError as error:
        raise HostError(f"--disk path={disk.path}: {error.strerror}") from error
    offered = virtio_blk.features(geometry, readonly=disk.readonly, sparse=disk.sparse, num_queues=disk.num_queues)
    space = virtio_blk.config_space(geometry, offered, num_queues=disk.num_queues, queue_size=disk.queue_size)
    offset = virtio_blk.WRITEBACK_OFFSET
    return VhostDevice(disk.id, TYPE_BLOCK, sizes, offered, space, frontend, ready, range(offset, offset + 1))


def console_device(frontend: Frontend, ready: Event) -> VhostDevice:
    offered = CONSOLE_F_SIZE | VIRTIO_F_VERSION_1
    return VhostDevice("__console", TYPE_CONSOLE, CONSOLE_QUEUES, offered, CONSOLE_CONFIG, frontend, ready)


def rng_device(frontend: Frontend, ready: Event) -> VhostDevice:
    return VhostDevice("__rng", TYPE_RNG, RNG_QUEUES, VIRTIO_F_VERSION_1, b"", frontend, ready)
