"""A vhost-user device that the guest may look at while its worker is still coming up.

What our own workers offer is known beforehand (Cloud Hypervisor's tables), so the VM's first instruction does
not wait for them: only an activation does.
"""

from __future__ import annotations

from controller.config.model import DiskConfig
from controller.pci.virtio import VIRTIO_F_VERSION_1, Virtqueue
from controller.vhost_frontend import Frontend
from controller.vhost_user_device import BLOCK as BLOCK_KIND
from controller.vhost_user_device import CONSOLE, CONSOLE_CONFIG, RNG, DeviceKind, VhostUserDevice
from shared import virtio_blk
from shared.disk_geometry import measure
from shared.errors import HostError
from shared.reactor import Reactor

CONSOLE_QUEUES, RNG_QUEUES = (256, 256), (256,)
CONSOLE_PORTS = 1


class EarlyDevice(VhostUserDevice):
    """Its features are what its worker will have."""

    def __init__(
        self,
        reactor: Reactor,
        frontend: Frontend,
        device_id: str,
        kind: DeviceKind,
        queue_sizes: tuple[int, ...],
        features: int,
        config: bytes = b"",
    ) -> None:
        super().__init__(reactor, frontend, device_id, kind, queue_sizes, config)
        self.features = features

    async def activate(self, acked_features: int, queues: tuple[Virtqueue, ...]) -> None:
        if not self._restored:  # whose session has to be there for the worker that comes up
            await self.frontend.wait_connected()
            if lacking := acked_features & ~self.frontend.features:
                raise HostError(f"{self.device_id}: its worker lacks features {lacking:#x} that the guest was offered")
        await super().activate(acked_features, queues)


def disk_device(reactor: Reactor, frontend: Frontend, disk: DiskConfig, image: int) -> EarlyDevice:
    """A disk of ours. Raises HostError when the image can't be asked for its size."""
    assert disk.id is not None
    try:
        geometry = measure(image, readonly=disk.readonly, direct=disk.direct)
    except OSError as error:
        raise HostError(f"--disk path={disk.path}: {error.strerror}") from error
    features = virtio_blk.features(geometry, num_queues=disk.num_queues, sparse=disk.sparse)
    config = virtio_blk.config_space(
        geometry, num_queues=disk.num_queues, queue_size=disk.queue_size, sparse=disk.sparse
    )
    sizes = (disk.queue_size,) * disk.num_queues
    return EarlyDevice(reactor, frontend, disk.id, BLOCK_KIND, sizes, features, config.pack())


def console_device(reactor: Reactor, frontend: Frontend, device_id: str) -> EarlyDevice:
    config = CONSOLE_CONFIG.replace(bytes(CONSOLE_CONFIG.size), "max_nr_ports", CONSOLE_PORTS)
    return EarlyDevice(reactor, frontend, device_id, CONSOLE, CONSOLE_QUEUES, CONSOLE.features, config)


def rng_device(reactor: Reactor, frontend: Frontend, device_id: str) -> EarlyDevice:
    return EarlyDevice(reactor, frontend, device_id, RNG, RNG_QUEUES, VIRTIO_F_VERSION_1)
