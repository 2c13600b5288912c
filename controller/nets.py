"""Network devices on the controller's side: TAPs, virtio functions, and the worker that serves each.

    make()  TAP opened or taken over, device for the guest      backends()  what starts their workers
    quiesce() ─▶ save() ─▶ resume()                             load() ─▶ announce(), once the guest runs here
    close_taps()                                                after the workers have ended

The controller opens the TAP and keeps it; the worker gets a duplicate of each descriptor. So the interface, its
addresses and its place in a bridge outlive every worker, and a local migration hands the very same descriptors over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from controller.backends import Backend
from controller.config.model import NetConfig, VmConfig
from controller.early_device import EarlyDevice
from controller.fleet import Fleet, WorkerSpec
from controller.foreign import ForeignBackend
from controller.pci.virtio_pci import VirtioPci
from controller.vhost_frontend import Frontend
from controller.vhost_user_device import FOREIGN_NET, NET, NET_CONFIG, Layout, VhostUserDevice
from shared import log, virtio_net
from shared.errors import FlotillaError, ProtocolError
from shared.memory import GuestMemory
from shared.reactor import Reactor, describe, gather
from shared.records import Record, replace
from shared.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from controller.taps import Tap

# Name under which a worker gets its vhost-user socket; its TAPs are tap0, tap1, …
VHOST: Final = "vhost"


class NetDevice(EarlyDevice):
    """virtio-net of ours. The link's state is answered here, an announcement that is due is the worker's to know."""

    def __init__(
        self,
        reactor: Reactor,
        frontend: Frontend,
        device_id: str,
        sizes: tuple[int, ...],
        spec: Mapping[str, Any],
    ) -> None:
        config = virtio_net.config(spec, 0)
        super().__init__(reactor, frontend, device_id, NET, sizes, virtio_net.features(spec), config)
        self.negotiated: Callable[[], int] = lambda: self._acked  # the transport knows it earlier

    def _changed_in_back_end(self) -> None:
        # Before a driver can see its ACK used (virtio 1.2, 5.1.6.5.4.2): the worker says so before it uses it. What is
        # due again comes with the worker's answer.
        status = NET_CONFIG.integer(self._config, "status") & ~virtio_net.S_ANNOUNCE
        self._config = NET_CONFIG.replace(self._config, "status", status)
        super()._changed_in_back_end()

    def read_config(self, offset: int, size: int) -> int:
        status = self._announcing | (virtio_net.S_LINK_UP if self.negotiated() & virtio_net.F_STATUS else 0)
        config = NET_CONFIG.replace(self._config, "status", status)
        return int.from_bytes(config[offset : offset + size], "little")

    @property
    def _announcing(self) -> int:
        return NET_CONFIG.integer(self._config, "status") & virtio_net.S_ANNOUNCE

    async def _fetch(self, layout: Layout) -> bytes:
        """Only the status is the worker's: a guest that arrived keeps the MAC and MTU that it was born with."""
        theirs = await self.frontend.get_config(layout.size)
        return layout.replace(self._config, "status", layout.integer(theirs, "status"))

    async def _refresh(self) -> None:
        """Tell the driver, also of an announcement that is due again: it may have seen to the last one."""
        before = self._config
        await self._reload()
        if self._config != before or self._announcing:
            self.on_config_changed()


class Nic(Record, frozen=False):
    """One network device; without `tap` its back end is somebody else's, at a vhost-user socket."""

    config: NetConfig
    spec: dict[str, Any]
    device: VhostUserDevice
    tap: Tap | None = None
    backend: Backend | None = None
    foreign: ForeignBackend | None = None

    @property
    def id(self) -> str:
        return self.device.device_id


class Nets:
    """The network devices of one VM."""

    def __init__(self, reactor: Reactor, fleet: Fleet, arrived: Mapping[str, Sequence[int]]) -> None:
        """`arrived`: TAP descriptors that came with a VM, by device id, for make(). They belong to this object."""
        self._reactor = reactor
        self._fleet = fleet
        self._nics: dict[str, Nic] = {}
        self._arrived = dict(arrived)

    # Making ------------------------------------------------------------------------------------------------------

    async def make(self, config: NetConfig, memory: GuestMemory) -> VhostUserDevice:
        """Raises HostError; what it opened is then closed. Waits only for a back end that somebody else runs."""
        assert config.id is not None
        frontend = Frontend(self._reactor, memory, config.id, own=not config.vhost_user)
        if config.vhost_user:
            nic = await self._foreign(config, frontend)
        else:
            nic = self._own(config, frontend, self._arrived.pop(config.id, None))
        self._nics[config.id] = nic
        return nic.device

    def _own(self, config: NetConfig, frontend: Frontend, fds: Sequence[int] | None) -> Nic:
        from controller.taps import DEFAULT_MTU, adopt, open_tap

        assert config.id is not None
        tap = open_tap(config) if fds is None else adopt(fds)
        if len(tap.fds) != config.queue_pairs:
            tap.close()
            raise ProtocolError(f"{config.id}: {len(tap.fds)} TAP descriptors came for {config.num_queues} queues")
        # A TAP of another namespace does not tell its MTU; what an arriving guest knows is in its state anyway.
        spec = _spec(config, config.mtu or tap.mtu or (DEFAULT_MTU if fds is not None else None))
        sizes = (config.queue_size,) * (config.num_queues + 1)
        device = NetDevice(self._reactor, frontend, config.id, sizes, spec)
        return Nic(config, spec, device, tap)

    async def _foreign(self, config: NetConfig, frontend: Frontend) -> Nic:
        """Back ends of this kind have no configuration space and no control queue; the VMM answers for the former."""
        assert config.vhost_socket is not None and config.id is not None
        foreign = ForeignBackend(
            self._reactor, frontend, config.id, config.vhost_socket, self._fleet.supervision
        )
        device_id, sizes = config.id, (config.queue_size,) * config.num_queues
        spec = _spec(config, config.mtu)
        space = virtio_net.config(spec, 0)
        device = await foreign.connect(
            lambda: VhostUserDevice.attach(self._reactor, frontend, device_id, FOREIGN_NET, sizes, space)
        )
        if config.mtu is None:
            device.features &= ~virtio_net.F_MTU
        return Nic(config, spec, device, foreign=foreign)

    def plugged(self, function: VirtioPci) -> None:
        """The transport that one of the devices is behind."""
        device = function.device
        if isinstance(device, NetDevice):
            device.negotiated = lambda: function.common.acked_features

    def backends(self) -> list[Backend]:
        """One per worker that there is none of yet, to be started. Raises HostError."""
        made = []
        for nic in self._nics.values():
            if nic.tap is not None and nic.backend is None:
                fds = {f"tap{pair}": fd for pair, fd in enumerate(nic.tap.fds)}
                worker = WorkerSpec("net", nic.id, "net_worker.__main__", "worker", nic.spec)
                nic.backend = Backend(self._reactor, self._fleet, worker, {VHOST: nic.device.frontend}, fds)
                made.append(nic.backend)
        return made

    def foreign(self) -> list[ForeignBackend]:
        """The back ends that somebody else runs."""
        return [nic.foreign for nic in self._nics.values() if nic.foreign is not None]

    # Moving ------------------------------------------------------------------------------------------------------

    def tap_fds(self) -> dict[str, list[int]]:
        """By device id: one descriptor per queue pair."""
        return {name: list(nic.tap.fds) for name, nic in self._nics.items() if nic.tap is not None}

    def kept(self, config: VmConfig) -> VmConfig:
        """The configuration with which a reboot here finds descriptors that were given to another VMM: `fds` are
        duplicates of ours then, and stay open."""

        def found(net: NetConfig) -> NetConfig:
            tap = self._nics[net.id or ""].tap
            return replace(net, fds=tuple(os.dup(fd) for fd in tap.fds)) if net.fds and tap is not None else net

        return replace(config, net=tuple(found(net) for net in config.net))

    async def quiesce(self) -> None:
        """The rings are stopped already; this also stops what the worker does on its own."""
        await gather(self._reactor, *(backend.call("quiesce") for backend in self._workers().values()))

    async def resume(self, device_id: str) -> None:
        """Nothing for a device that is not of this kind. Raises as Backend.resume() does."""
        if (backend := self._workers().get(device_id)) is not None:
            await backend.resume()

    async def save(self) -> dict[str, Any]:
        """By device id, what the workers know that is in no ring: active queue pairs, offloads."""
        return {name: await backend.call("save") for name, backend in self._workers().items()}

    async def load(self, states: Mapping[str, Any]) -> None:
        """What save() gave. A worker that dies before its rings run has a successor that knows it too."""
        for name, backend in self._workers().items():
            if name in states:
                backend.preload = states[name]
                await backend.call("load", **states[name])

    def announce(self) -> None:
        """The guest runs here now: let it and the network know. Nothing depends on it, so nobody waits."""
        for name, backend in self._workers().items():
            frontend = self._nics[name].device.frontend
            self._reactor.spawn(self._announce(name, frontend, backend), f"announce {name}")

    async def _announce(self, name: str, frontend: Frontend, backend: Backend) -> None:
        try:
            await frontend.wait_connected()
            backend.preload = None  # its rings run: from here on it is in the inflight region, and changes there
            await backend.call("announce")
        except FlotillaError as error:
            log.warn(f"{name}: the network was not told where the guest is now: {describe(error)}")

    def _workers(self) -> dict[str, Backend]:
        return {name: nic.backend for name, nic in self._nics.items() if nic.backend is not None}

    async def counters(self) -> dict[str, Any]:
        """By device id."""
        return {name: await backend.stats() for name, backend in self._workers().items()}

    # End ---------------------------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """The VM ends: no back end of somebody else's is dialled again."""
        for nic in self._nics.values():
            if nic.foreign is not None:
                nic.foreign.close()
            nic.device.frontend.close()

    async def remove(self, device_id: str) -> None:
        """Take back what make() and start() did for one device that is not to be after all."""
        nic = self._nics.pop(device_id)
        nic.device.frontend.close()
        if nic.foreign is not None:
            nic.foreign.close()
        if nic.backend is not None:
            await nic.backend.close()
        if nic.tap is not None:
            nic.tap.close()

    def close_taps(self) -> None:
        """The workers have ended. A TAP of our making goes with its last descriptor."""
        for nic in self._nics.values():
            if nic.tap is not None:
                nic.tap.close()
        for fds in self._arrived.values():
            for fd in fds:
                os.close(fd)
        self._nics, self._arrived = {}, {}


def _spec(config: NetConfig, mtu: int | None) -> dict[str, Any]:
    return {
        "mac": config.mac,
        "mtu": mtu,
        "queue_pairs": config.queue_pairs,
        "queue_size": config.queue_size,
        "offload_tso": config.offload_tso,
        "offload_ufo": config.offload_ufo,
        "offload_csum": config.offload_csum,
    }
