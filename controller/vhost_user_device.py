"""Virtio devices whose back end speaks vhost-user: what the virtio-pci transport sees of them.

One class for all; the kinds differ by a row of a table (type, features, configuration space). Feature bits, layouts and
state keys are Cloud Hypervisor's, as the reference's cloud-hypervisor-machine page lists them in sections 3 and 7.7.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from struct import Struct

from controller.devices.misuse import Misuse
from controller.devices.state import PRIVATE, Fields, State
from controller.pci.virtio import VIRTIO_F_VERSION_1, Virtqueue
from controller.vhost_frontend import Frontend
from shared import log
from shared.errors import FlotillaError, HostError, ProtocolError
from shared.reactor import Reactor
from shared.records import Record
from shared.typed import Any, Final
from shared.vhost_user import VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES

RING_INDIRECT_DESC, RING_EVENT_IDX, IN_ORDER = 1 << 28, 1 << 29, 1 << 35
CONSOLE_F_SIZE = 1 << 0
IN_BUFFER_LIMIT = 1 << 20


class Layout(Record):
    """A configuration space, packed little-endian: (name, struct code, count). A dot nests a name in the state."""

    fields: tuple[tuple[str, str, int], ...]

    @property
    def _struct(self) -> Struct:
        return Struct("<" + "".join(f"{count}{code}" for _, code, count in self.fields))

    @property
    def size(self) -> int:
        return self._struct.size

    def offset(self, name: str) -> int:
        before = self.fields[: [field[0] for field in self.fields].index(name)]
        return Struct("<" + "".join(f"{count}{code}" for _, code, count in before)).size

    def decode(self, data: bytes) -> State:
        """The space as Cloud Hypervisor's JSON has it."""
        values = list(self._struct.unpack(data))
        state: State = {}
        for name, _, count in self.fields:
            taken, values = values[:count], values[count:]
            group, dot, leaf = name.rpartition(".")
            target = state.setdefault(group, {}) if dot else state
            assert isinstance(target, dict)
            target[leaf] = taken[0] if count == 1 else taken
        return state

    def encode(self, fields: Fields) -> bytes:
        """The space from its JSON. Raises ProtocolError."""
        values: list[int] = []
        for name, code, count in self.fields:
            group, dot, leaf = name.rpartition(".")
            section = fields.section(group) if dot else fields
            bits = 8 * Struct("<" + code).size
            values += [section.integer(leaf, bits)] if count == 1 else section.integers(leaf, bits, count)
        return self._struct.pack(*values)

    def integer(self, data: bytes, name: str) -> int:
        code = next(code for field, code, _ in self.fields if field == name)
        return int(Struct("<" + code).unpack_from(data, self.offset(name))[0])

    def replace(self, data: bytes, name: str, value: int) -> bytes:
        code = next(code for field, code, _ in self.fields if field == name)
        changed = bytearray(data)
        Struct("<" + code).pack_into(changed, self.offset(name), value)
        return bytes(changed)


BLOCK_CONFIG: Final = Layout((
    ("capacity", "Q", 1), ("size_max", "I", 1), ("seg_max", "I", 1), ("geometry.cylinders", "H", 1),
    ("geometry.heads", "B", 1), ("geometry.sectors", "B", 1), ("blk_size", "I", 1), ("physical_block_exp", "B", 1),
    ("alignment_offset", "B", 1), ("min_io_size", "H", 1), ("opt_io_size", "I", 1), ("writeback", "B", 1),
    ("unused", "B", 1), ("num_queues", "H", 1), ("max_discard_sectors", "I", 1), ("max_discard_seg", "I", 1),
    ("discard_sector_alignment", "I", 1), ("max_write_zeroes_sectors", "I", 1), ("max_write_zeroes_seg", "I", 1),
    ("write_zeroes_may_unmap", "B", 1), ("unused1", "B", 3),
))  # fmt: skip
NET_CONFIG: Final = Layout((
    ("mac", "B", 6), ("status", "H", 1), ("max_virtqueue_pairs", "H", 1), ("mtu", "H", 1), ("speed", "I", 1),
    ("duplex", "B", 1),
))  # fmt: skip
CONSOLE_CONFIG: Final = Layout((("cols", "H", 1), ("rows", "H", 1), ("max_nr_ports", "I", 1), ("emerg_wr", "I", 1)))
FS_CONFIG: Final = Layout((("tag", "B", 36), ("num_request_queues", "I", 1)))

# What Cloud Hypervisor lets any foreign back end offer; vhost's own two bits show through to the guest there too.
_FOREIGN = (
    RING_INDIRECT_DESC | RING_EVENT_IDX | VIRTIO_F_VERSION_1 | IN_ORDER
    | VHOST_F_LOG_ALL | VHOST_USER_F_PROTOCOL_FEATURES
)  # fmt: skip


class DeviceKind(Record):
    """One row: `features` is what this VMM is ready to offer; the guest gets its intersection with the back end's."""

    name: str
    virtio_type: int
    features: int
    layout: Layout | None = None
    writable: str = ""  # the only field that the driver may write
    own: bool = True  # served by a worker of ours
    has_own_config: bool = True  # the back end knows the configuration space
    vmm_features: int = 0  # answered here; the back end neither has them nor hears of them


BLOCK: Final = DeviceKind("block", 2, 0x1_3000_7E64, BLOCK_CONFIG, "writeback")
NET: Final = DeviceKind("net", 1, 0x1_2063_7FAF, NET_CONFIG)
CONSOLE: Final = DeviceKind("console", 3, VIRTIO_F_VERSION_1 | CONSOLE_F_SIZE, CONSOLE_CONFIG)
RNG: Final = DeviceKind("rng", 4, VIRTIO_F_VERSION_1)
FOREIGN_BLOCK: Final = DeviceKind("vhost-user block", 2, _FOREIGN | 0x7E76, BLOCK_CONFIG, "writeback", own=False)
# Without the control queue, and all that needs one: such a back end does not serve it. MTU and MAC are the VMM's.
FOREIGN_NET: Final = DeviceKind(
    "vhost-user net", 1, _FOREIGN | 0xFFAB, NET_CONFIG, own=False, has_own_config=False, vmm_features=0x28
)
FOREIGN_FS: Final = DeviceKind("vhost-user fs", 26, _FOREIGN, FS_CONFIG, own=False, has_own_config=False)


def fs_config(tag: str, num_request_queues: int) -> bytes:
    """The configuration space of `--fs tag=…`, which the back end does not know."""
    return tag.encode()[:36].ljust(36, b"\0") + num_request_queues.to_bytes(4, "little")


class VhostUserDevice:
    """A `VirtioDevice` on top of a Frontend.

    `on_config_changed` is the transport's config_changed(). `extra` is merged into the saved state: what only the
    device's owner knows (`disk_path`) or its worker saved (`in_buffer`); load() fills it in.
    """

    def __init__(
        self, reactor: Reactor, frontend: Frontend, device_id: str, kind: DeviceKind, queue_sizes: tuple[int, ...],
        config: bytes = b"",
    ) -> None:  # fmt: skip
        self._reactor = reactor
        self.frontend = frontend
        self.device_id = device_id
        self.kind = kind
        self.virtio_type = kind.virtio_type
        self.queue_sizes = queue_sizes
        self.features = kind.features & (frontend.features | kind.vmm_features)
        self._config = config
        self._acked = 0
        self._restored = False
        self._bases: dict[int, int] = {}
        self._misuse = Misuse(device_id)
        self._stale = False  # the back end has changed the configuration since it was last asked
        self._refreshing = False
        self.extra: State = {}
        self.on_config_changed: Callable[[], None] = lambda: None
        frontend.on_config_change = self._changed_in_back_end

    @classmethod
    async def attach(
        cls, reactor: Reactor, frontend: Frontend, device_id: str, kind: DeviceKind, queue_sizes: tuple[int, ...],
        config: bytes = b"",
    ) -> VhostUserDevice:  # fmt: skip
        """A device on a connected front end. `config`: its configuration space where the back end has none.

        Raises HostError when the back end can't be that device, WorkerLost.
        """
        if len(queue_sizes) > frontend.max_queues:
            raise HostError(
                f"{device_id}: its back end has {frontend.max_queues} queues, {len(queue_sizes)} are wanted",
                "lower num_queues= or start the back end with more",
            )
        if not frontend.features & VIRTIO_F_VERSION_1:
            raise HostError(f"{device_id}: its back end does not speak virtio 1.0")
        device = cls(reactor, frontend, device_id, kind, queue_sizes, config)
        if kind.layout is not None and not config:
            device._config = await device._fetch(kind.layout)
        return device

    async def _fetch(self, layout: Layout) -> bytes:
        config = await self.frontend.get_config(layout.size)
        if self.kind is FOREIGN_BLOCK:
            config = layout.replace(config, "num_queues", len(self.queue_sizes))
        return config

    # Configuration space ----------------------------------------------------------------------------------------

    @property
    def has_config(self) -> bool:
        return self.kind.layout is not None

    @property
    def config(self) -> bytes:
        return self._config

    def read_config(self, offset: int, size: int) -> int:
        return int.from_bytes(self._config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> Coroutine[Any, Any, None] | None:
        layout, name = self.kind.layout, self.kind.writable
        if layout is None or not name or offset != layout.offset(name) or size != 1:
            self._misuse.report(f"write of {size} bytes at {offset:#x} of the configuration, which is read-only")
            return None
        self._config = layout.replace(self._config, name, value & 0xFF)
        return self._tell_config(offset, bytes([value & 0xFF]))

    async def _tell_config(self, offset: int, data: bytes) -> None:
        try:
            await self.frontend.set_config(offset, data)
        except FlotillaError as error:
            log.error(f"{self.device_id}: the back end refused a new configuration: {error}")

    def _changed_in_back_end(self) -> None:
        """However often a back end says so, one task of ours asks it, once more at the most than it has answered."""
        self._stale = True
        if not self._refreshing:
            self._refreshing = True
            self._reactor.spawn(self._keep_up(), f"{self.device_id} configuration")

    async def _keep_up(self) -> None:
        try:
            while self._stale:
                self._stale = False
                await self._refresh()
        finally:
            self._refreshing = False

    async def _refresh(self) -> None:
        """Read the configuration again and, if it differs, interrupt the driver."""
        before = self._config
        await self._reload()
        if self._config != before:
            self.on_config_changed()

    async def _reload(self) -> None:
        if self.kind.layout is None or not self.kind.has_own_config:
            return
        try:
            config = await self._fetch(self.kind.layout)
        except FlotillaError as error:
            log.warn(f"{self.device_id}: its configuration can't be read: {error}")
            return
        if self.kind.writable:
            config = self.kind.layout.replace(config, self.kind.writable, self.writable_value)
        self._config = config

    @property
    def writable_value(self) -> int:
        """What the driver has set the one writable field to; 0 for a device without any."""
        layout = self.kind.layout
        return layout.integer(self._config, self.kind.writable) if layout and self.kind.writable else 0

    # Life -------------------------------------------------------------------------------------------------------

    async def activate(self, acked_features: int, queues: tuple[Virtqueue, ...]) -> None:
        self._acked = acked_features
        restored, self._restored = self._restored, False
        bases, self._bases = self._bases, {}
        theirs = acked_features & ~self.kind.vmm_features
        await self.frontend.activate(theirs, queues, bases, restored=restored)
        if self.kind is CONSOLE and acked_features & CONSOLE_F_SIZE:
            await self._reload()
            self.on_config_changed()

    async def reset(self) -> None:
        self._acked = 0
        await self.frontend.reset()

    # State ------------------------------------------------------------------------------------------------------

    def save(self) -> State:
        """The device's node. The rings are quiet."""
        state: State = {"avail_features": self.features, "acked_features": self._acked}
        layout = self.kind.layout
        if layout is not None:
            state["config"] = layout.decode(self._config)
        if self.kind is BLOCK:
            state["disk_nsectors"] = BLOCK_CONFIG.integer(self._config, "capacity")
        elif self.kind is NET:
            state["queue_size"] = list(self.queue_sizes)
        elif self.kind is CONSOLE:
            state["in_buffer"] = []
        elif not self.kind.own:
            state |= {
                "acked_protocol_features": int(self.frontend.protocol_features),
                "vu_num_queues": len(self.queue_sizes),
                "backend_req_support": False,
            }
        bases = self.frontend.bases or self._bases  # the latter: loaded and not activated yet
        if bases:
            state[PRIVATE] = {"bases": [list(pair) for pair in sorted(bases.items())]}
        return state | self.extra

    def load(self, state: Mapping[str, object]) -> None:
        """Take a saved node over; the next activation restores. Raises ProtocolError for a bad state, HostError
        when the back end lacks what the guest uses."""
        fields = Fields(self.device_id, state)
        offered, acked = fields.integer("avail_features", 64), fields.integer("acked_features", 64)
        # A worker of ours may still be coming up; what it has is then checked at the activation.
        available = (self.frontend.features or offered) | self.kind.vmm_features
        lacking = acked & ~available
        if lacking:
            raise HostError(
                f"{self.device_id}: its back end lacks features {lacking:#x} that the guest uses",
                "start it with the options of the source's",
            )
        layout = self.kind.layout
        config = layout.encode(fields.section("config")) if layout is not None else b""
        bases = _bases(fields)
        # The guest keeps the features it was offered, as far as this back end has them.
        self.features = offered & available
        self._acked, self._config, self._bases, self._restored = acked, config, bases, True
        if layout is not None and self.kind.writable:
            self.frontend.keep_config(layout.offset(self.kind.writable), bytes([self.writable_value]))
        if self.kind is CONSOLE:
            self.extra["in_buffer"] = fields.integers("in_buffer", 8, limit=IN_BUFFER_LIMIT)


def _bases(fields: Fields) -> dict[int, int]:
    """Next avail indices as we saved them; without, the used rings tell."""
    private = fields.private()
    if "bases" not in private:
        return {}
    bases: dict[int, int] = {}
    for pair in private.items("bases", limit=1024):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(n) is int for n in pair):
            raise ProtocolError(f"state of {fields.where}: bases: expected pairs of queue and index")
        queue, base = pair
        if not 0 <= base <= 0xFFFF:
            raise ProtocolError(f"state of {fields.where}: bases: {base} is no index of a split ring")
        bases[queue] = base
    return bases
