"""virtio-pci, modern only: the function that carries one virtio device.

BAR 0, 512 KiB:  0x0000 common configuration   0x2000 ISR (always 0: MSI-X only)   0x4000 device configuration
                 0x6000 notify, 4 bytes per queue, an ioeventfd each   0x8000 MSI-X table   0x48000 pending bits

Life of a device: the driver programs queues and vectors, then writes device_status 0x0F: the ready queues go to
device.activate(), and the writing vCPU waits for it. Writing 0 resets: device.reset() returns when the back end
has let go of guest memory, and only then does the status read 0.

Sources: virtio 1.2, section 4.1; the reference's cloud-hypervisor-machine page, sections 2.3 to 2.5 and 7.7.
"""

from __future__ import annotations

import os

from controller.bus import Effect
from controller.devices.misuse import Misuse
from controller.devices.state import PRIVATE, Fields, State
from controller.irq import IrqRouting, KvmVm
from controller.machine.layout import VIRTIO_BAR32_ALIGNMENT, VIRTIO_BAR64_ALIGNMENT, VIRTIO_BAR_SIZE
from controller.pci.common_config import SIZE as COMMON_SIZE
from controller.pci.common_config import STATUS, CommonConfig, Queue
from controller.pci.config_space import CAP_MSIX, CAP_VENDOR, Header
from controller.pci.function import BarSpec, PciFunction
from controller.pci.msix import ENABLE, Msix
from controller.pci.virtio import RUNNING, RingMemory, Status, VirtioDevice, Virtqueue
from shared import log
from shared.errors import BadGuestAddress, FlotillaError
from shared.reactor import Lock
from shared.typed import Final

ID_PREFIX: Final = "_virtio-pci-"
# Keys of the state that are nodes of their own in Cloud Hypervisor's snapshot.
STATE_CHILDREN: Final = ("msix_config", "pci_configuration", "virtio_pci_common_config")

COMMON: Final = 0x0000
ISR: Final = 0x2000
DEVICE: Final = 0x4000
NOTIFY: Final = 0x6000
TABLE: Final = 0x8000
PBA: Final = 0x4_8000
_DEVICE_SIZE: Final = 0x1000
_NOTIFY_SIZE: Final = 0x1000
_PBA_SIZE: Final = 0x800
_NOTIFY_MULTIPLIER: Final = 4

_VENDOR: Final = 0x1AF4
_DEVICE_BASE: Final = 0x1040
_CLASSES: Final = {1: 0x020000, 2: 0x018000}  # net: Ethernet; block: mass storage
_OTHER_CLASS: Final = 0xFFFF00

_CFG_COMMON, _CFG_NOTIFY, _CFG_ISR, _CFG_DEVICE, _CFG_PCI = 1, 2, 3, 4, 5
_CFG_CAP_SIZE: Final = 20


def _structure(kind: int, offset: int, length: int, extra: bytes = b"") -> tuple[int, bytes]:
    """A struct virtio_pci_cap in BAR 0, without the two bytes that every capability begins with."""
    body = (
        bytes((16 + len(extra), kind, 0, 0, 0, 0))
        + offset.to_bytes(4, "little")
        + length.to_bytes(4, "little")
    )
    return CAP_VENDOR, body + extra


def capabilities(vectors: int, has_config: bool) -> tuple[tuple[int, bytes], ...]:
    """(id, body) of every capability in its order. The device configuration's length is 0x1000 for all kinds."""
    device = (_structure(_CFG_DEVICE, DEVICE, _DEVICE_SIZE),) if has_config else ()
    control = ENABLE | vectors - 1  # Enable is set at power-on, see msix.py
    msix = control.to_bytes(2, "little") + TABLE.to_bytes(4, "little") + PBA.to_bytes(4, "little")
    return (
        _structure(_CFG_COMMON, COMMON, COMMON_SIZE),
        _structure(_CFG_ISR, ISR, 1),
        *device,
        _structure(_CFG_NOTIFY, NOTIFY, _NOTIFY_SIZE, _NOTIFY_MULTIPLIER.to_bytes(4, "little")),
        _structure(_CFG_PCI, 0, 0, bytes(4)),
        (CAP_MSIX, msix),
    )


class VirtioPci(PciFunction):
    """The transport of one device. One vector per queue and one for configuration changes."""

    bar_spec = BarSpec(VIRTIO_BAR_SIZE, VIRTIO_BAR32_ALIGNMENT, VIRTIO_BAR64_ALIGNMENT)

    def __init__(
        self,
        device: VirtioDevice,
        vm: KvmVm,
        routing: IrqRouting,
        memory: RingMemory,
        resources: tuple[State, ...] = (),
    ) -> None:
        """`resources` are the device's own in the device tree (pmem's address range)."""
        product, kind = _DEVICE_BASE + device.virtio_type, _CLASSES.get(device.virtio_type, _OTHER_CLASS)
        super().__init__(ID_PREFIX + device.device_id, Header(_VENDOR, product, kind, 1, _VENDOR, product))
        self.device = device
        self.msix = Msix(len(device.queue_sizes) + 1, routing)
        self.common = CommonConfig(device)
        self.activated = False
        self._vm = vm
        self._memory = memory
        self._resources = resources
        self._misuse = Misuse(device.device_id)
        self._failures = Misuse(device.device_id, "failure", log.error)
        self._lock = Lock()
        self._changing = False  # an activation or a reset is under way
        self._was_active = False  # it ran when the state was saved that load() took
        self._kick_fds = [-1] * len(device.queue_sizes)
        self._ioeventfds: dict[int, int] = {}  # queue -> address that KVM watches
        self._mute_fd = -1  # what a queue without a vector signals

        self._cfg_cap = 0
        for capability, body in capabilities(self.msix.vectors, device.has_config):
            offset = self.config.add_capability(capability, body)
            if capability == CAP_VENDOR and body[1] == _CFG_PCI:
                self._cfg_cap = offset
        self.dynamic_dwords = ((self._cfg_cap + 16) // 4,)

    # Configuration space ----------------------------------------------------------------------------------------

    def write_config(self, offset: int, size: int, value: int) -> Effect | None:
        if self._cfg_cap <= offset < self._cfg_cap + _CFG_CAP_SIZE:
            return self._write_window(offset - self._cfg_cap, size, value)
        super().write_config(offset, size, value)
        # The control word is the upper half of its dword; Enable and Mask are in its last byte.
        if offset >> 2 == self.config.msix_dword and (offset & 3) + size == 4:
            self.msix.set_control(self.config.registers[self.config.msix_dword] >> 16)
        return None

    def read_config(self, dword: int) -> int:
        if dword not in self.dynamic_dwords:
            return super().read_config(dword)
        offset, size = self._window(4)
        return (self.read(offset, size) or 0) & 0xFFFF_FFFF if size else 0

    def _window(self, size: int) -> tuple[int, int]:
        """(offset in BAR 0, bytes) that the capability's data register stands for; 0 bytes: nothing.

        Like Cloud Hypervisor we take any BAR number for BAR 0, which is the only one.
        """
        offset, length = (
            self.config.registers[self._cfg_cap // 4 + 2],
            self.config.registers[self._cfg_cap // 4 + 3],
        )
        size = min(size, length)
        return offset, size if size in (1, 2, 4) else 0

    def _write_window(self, at: int, size: int, value: int) -> Effect | None:
        """A write to the PCI configuration access capability, `at` bytes from its start."""
        if size not in (1, 2, 4) or at % size or at < 4:
            return None
        if at < 16:  # bar, offset, length: kept in the space itself, where everybody can read them
            dword, shift = (self._cfg_cap + at) // 4, 8 * (at & 3)
            mask = (1 << 8 * size) - 1 << shift
            self.config.registers[dword] = self.config.registers[dword] & ~mask | value << shift & mask
            return None
        offset, length = self._window(size)
        return self.write(offset, length, value & (1 << 8 * length) - 1) if length else None

    # BAR 0 ------------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int | None:
        if offset < COMMON_SIZE:
            return self.common.read(offset, size)
        if DEVICE <= offset < DEVICE + _DEVICE_SIZE:
            if not self.device.has_config:
                return None
            self.common.consume_config_change()
            return self.device.read_config(offset - DEVICE, size)
        if TABLE <= offset < PBA:
            return self.msix.read_table(offset - TABLE, size)
        if PBA <= offset < PBA + _PBA_SIZE:
            return self.msix.read_pba(offset - PBA, size)
        return 0 if offset == ISR else None

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        if offset < COMMON_SIZE:
            if offset == STATUS and size == 1:
                return self._write_status(value)
            self.common.write(offset, size, value)
        elif NOTIFY <= offset < NOTIFY + _NOTIFY_SIZE:
            queue, odd = divmod(offset - NOTIFY, _NOTIFY_MULTIPLIER)
            if not odd and queue < len(self._kick_fds):
                os.eventfd_write(self._kick_fd(queue), 1)
        elif TABLE <= offset < PBA:
            self.msix.write_table(offset - TABLE, size, value)
        elif DEVICE <= offset < DEVICE + _DEVICE_SIZE and self.device.has_config:
            return self.device.write_config(offset - DEVICE, size, value)
        return None

    def _kick_fd(self, queue: int) -> int:
        if self._kick_fds[queue] < 0:
            self._kick_fds[queue] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._kick_fds[queue]

    # Status -----------------------------------------------------------------------------------------------------

    def _write_status(self, value: int) -> Effect | None:
        if value == 0:
            if self.activated or self._changing:
                return self._reset()
            self.common.reset()
            return None
        self.common.status = value
        if value == RUNNING and not self.activated and any(queue.ready for queue in self.common.queues):
            return self._activate()
        return None

    async def _activate(self) -> None:
        async with self._lock:
            if self.activated or self.common.status != RUNNING:
                return  # another vCPU was faster, with the same write or with a reset
            self._changing = True
            try:
                await self._start()
                self.activated = True
            except FlotillaError as error:
                self.needs_reset(str(error))
            finally:
                self._changing = False

    async def _start(self) -> None:
        queues = self._usable_queues()
        if not queues:
            raise BadGuestAddress("no queue has its rings in RAM")
        self._watch_kicks()
        await self.device.activate(self.common.acked_features, queues)

    async def _reset(self) -> None:
        async with self._lock:
            self._changing = True
            try:
                if self.activated:
                    await self.device.reset()
                    self.activated = False
                self.common.reset()
            except FlotillaError as error:
                # The back end may still write to guest memory, so the driver must not see a finished reset. It
                # may try again.
                self._failures.report(f"reset failed: {error}")
                self.common.status = int(Status.FAILED | Status.NEEDS_RESET)
            finally:
                self._changing = False

    def _usable_queues(self) -> tuple[Virtqueue, ...]:
        usable = []
        for index, queue in enumerate(self.common.queues):
            if not queue.ready:
                continue
            try:
                for address, size in queue.rings():
                    self._memory.host_address(address, size)
            except BadGuestAddress as error:
                self._misuse.report(f"queue {index} is left out: {error}")
                continue
            usable.append(self._virtqueue(index, queue))
        return tuple(usable)

    def _virtqueue(self, index: int, queue: Queue) -> Virtqueue:
        vector = self.common.queue_vectors[index]
        call_fd = self.msix.eventfd(vector) if vector < self.msix.vectors else self._mute()
        return Virtqueue(
            index, queue.size, queue.desc, queue.avail, queue.used, self._kick_fd(index), call_fd
        )

    def _mute(self) -> int:
        if self._mute_fd < 0:
            self._mute_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._mute_fd

    # Kicks ------------------------------------------------------------------------------------------------------

    def _watch_kicks(self) -> None:
        """Let KVM answer the notify registers of all ready queues. Before, and for others, they are exits to
        write()."""
        for index, queue in enumerate(self.common.queues):
            if queue.ready:
                self._watch_kick(index)

    def _watch_kick(self, index: int) -> None:
        assert self.bar is not None
        if index in self._ioeventfds:
            return
        address = self.bar.base + NOTIFY + _NOTIFY_MULTIPLIER * index
        try:
            self._vm.ioeventfd(self._kick_fd(index), address)
        except (
            OSError
        ) as error:  # KVM takes 1000 of them; without one a kick is an exit to write(), which is slower
            log.warn(f"{self.device.device_id}: queue {index}: {error}")
        else:
            self._ioeventfds[index] = address

    def _unwatch_kicks(self) -> list[int]:
        queues = list(self._ioeventfds)
        for index, address in self._ioeventfds.items():
            self._vm.ioeventfd(self._kick_fds[index], address, deassign=True)
        self._ioeventfds.clear()
        return queues

    def bar_moved(self, old_base: int) -> None:
        for index in self._unwatch_kicks():
            self._watch_kick(index)

    # What the device side calls ---------------------------------------------------------------------------------

    def config_changed(self) -> None:
        """The device's configuration reads differently now: interrupt the driver."""
        self.common.config_changed = True
        self.msix.signal(self.common.config_vector)

    def needs_reset(self, reason: str) -> None:
        """The device can't go on until the driver resets it."""
        self._failures.report(f"needs a reset: {reason}")
        self.common.status |= int(Status.NEEDS_RESET)
        self.config_changed()

    # State ------------------------------------------------------------------------------------------------------

    def save(self) -> State:
        """`_virtio-pci-X` of Cloud Hypervisor, its child nodes (STATE_CHILDREN) as keys.

        vCPUs and back ends are quiet, and no activation or reset is under way.
        """
        first = self._cfg_cap // 4
        space = self.config.save()
        registers = space["registers"]
        assert isinstance(registers, list)
        window = b"".join(value.to_bytes(4, "little") for value in registers[first : first + 5])
        # Cloud Hypervisor keeps the access capability's fields beside the space.
        registers[first + 1 : first + 5] = [0] * 4
        return {
            # A VM that was loaded paused may leave again without ever having run here.
            "device_activated": self.activated or self._was_active,
            "queues": self.common.save_queues(),
            "interrupt_status": 0,
            "cap_pci_cfg_offset": self._cfg_cap + 2,
            "cap_pci_cfg": list(window[2:]),
            "virtio_pci_common_config": self.common.save(),
            "msix_config": self.msix.save(),
            "pci_configuration": space,
            PRIVATE: {
                "acked_features": self.common.acked_features,
                "config_changed": self.common.config_changed,
                "used_rings": [queue.used for queue in self.common.queues],
            },
        }

    def save_device(self) -> State:
        """The device's own node. The features that the driver acknowledged are the transport's knowledge."""
        state = dict(self.device.save())
        state["acked_features"] = self.common.acked_features
        return state

    def load(self, state: object, device_state: dict[str, object]) -> None:
        """Restore transport and device. The function is in its slot, fresh; nothing runs.

        Routes are set but not committed, irqfds not assigned: restore_activate() follows, when all functions are
        loaded. Raises ProtocolError.
        """
        fields = Fields(self.id, state)
        activated = fields.flag("device_activated")
        window = fields.integers("cap_pci_cfg", 8, _CFG_CAP_SIZE - 2)
        queues = self.common.load_queues(fields)
        acked = Fields(self.device.device_id, device_state).integer("acked_features", 64)
        changed = False
        private = fields.private()
        if "used_rings" in private:
            acked = private.integer("acked_features", 64)
            changed = private.flag("config_changed")
            for queue, used in zip(queues, private.integers("used_rings", 64, len(queues)), strict=True):
                queue.used = used
        self.config.load(fields.section("pci_configuration"))
        self.common.load(fields.section("virtio_pci_common_config"), queues)
        self.msix.load(fields.section("msix_config"))
        self.device.load(device_state)
        self.common.acked_features = acked & self.device.features
        self.common.config_changed = changed
        first = self._cfg_cap // 4 + 1
        for dword in range(3):  # bar, offset and length; the data register holds nothing
            value = bytes(window[2 + 4 * dword : 6 + 4 * dword])
            self.config.registers[first + dword] = int.from_bytes(value, "little")
        self._was_active = activated and self.common.status == RUNNING

    async def restore_activate(self) -> None:
        """Assign irqfds and start the back end of a device that ran when its state was saved. Raises FlotillaError
        and OSError: the device is active all the same then, as soon as a back end does as it is told."""
        self.msix.attach()
        if self._was_active:
            self._was_active, self.activated = False, True
            try:
                await self._start()
            except BadGuestAddress as error:
                self.activated = False
                self.needs_reset(str(error))

    def signal_all(self) -> None:
        """Kick every queue and raise its vector: what was signalled while the state was on its way is made up for.

        After a restore, when interrupts can be delivered; a spurious signal does no harm.
        """
        if not self.activated:
            return
        for index, queue in enumerate(self.common.queues):
            if queue.ready:
                os.eventfd_write(self._kick_fd(index), 1)
                self.msix.signal(self.common.queue_vectors[index])

    def close(self) -> None:
        """The back end is gone."""
        self._unwatch_kicks()
        self.msix.close()
        for fd in {*self._kick_fds, self._mute_fd} - {-1}:
            os.close(fd)
        self._kick_fds = [-1] * len(self._kick_fds)
        self._mute_fd = -1

    def device_tree(self) -> dict[str, State]:
        child = self.device.device_id
        return {
            self.id: self.node(children=(child,)),
            child: {"id": child, "resources": list(self._resources), "parent": self.id, "children": []},
        }
