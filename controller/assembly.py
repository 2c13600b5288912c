"""What a VM consists of, made and unmade: machine, vCPUs, virtio functions, their workers, host ends of its consoles.

    Assembly(context, config)     host ends, KVM VM, RAM, platform, vCPUs (no process yet)
      make_functions()            one PCI function per device; images opened and locked, foreign back ends dialled
      load_payload()              at boot: kernel, tables, the state at the first instruction
      set_cpuid()                 of a VM that arrives
      start_workers(), bring_up() the workers, side by side: beside a guest that runs, or before it may run
    close(), abandon()            everything of it is let go, whichever of the above were done

Living (pause, save, load, leave) is vm.py's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from controller import disks
from controller.backends import Backend, BackendState
from controller.config.cli import Seccomp
from controller.config.identity import CONSOLE_ID, RNG_ID
from controller.config.model import ConsoleMode, DiskConfig, NetConfig, VmConfig
from controller.devices.acpi import GedEvent
from controller.devices.events import GuestEvent
from controller.early_device import console_device, disk_device, rng_device
from controller.events import EventMonitor
from controller.fleet import Fleet, WorkerSpec
from controller.foreign import ForeignBackend
from controller.leavings import Leavings
from controller.machine.acpi.description import Description
from controller.machine.acpi.tables import write_tables
from controller.machine.boot.loader import load
from controller.machine.cpuid import CpuidEntry, vcpu_cpuid
from controller.machine.regs import configure, tsc_khz, write_descriptor_tables
from controller.nets import Nets
from controller.pci.host import Plan, build
from controller.pci.virtio_pci import VirtioPci
from controller.platform import Platform
from controller.vcpus import Vcpus
from controller.vhost_frontend import Frontend
from controller.vhost_user_device import FOREIGN_BLOCK, VhostUserDevice
from shared.chardev import HostEnd, open_host_end
from shared.errors import WorkerError
from shared.memory import GuestMemory
from shared.reactor import Reactor, gather
from shared.records import Record
from shared.typed import TYPE_CHECKING, Any
from shared.undo import Undo
from vcpu_worker.state import set_cpuid

if TYPE_CHECKING:
    from controller.kvm_stats import KvmStats

WORKER_SECONDS = 30.0
CONSOLE_WORKER = "console"


class VmContext(Record, frozen=False):
    """What a VM needs of its VMM."""

    reactor: Reactor
    fleet: Fleet
    events: EventMonitor
    on_guest_event: Callable[[GuestEvent], None]
    seccomp: Seccomp
    leavings: Leavings
    statistics: bool = False  # KVM's are to be read while the VM runs


class Disk(Record, frozen=False):
    config: DiskConfig
    image: int | None  # holds the lock; None for a vhost-user socket
    frontend: Frontend
    backend: Backend | None = None
    foreign: ForeignBackend | None = None


class Assembly:
    """See the module."""

    def __init__(
        self,
        context: VmContext,
        config: VmConfig,
        *,
        memory: GuestMemory | None = None,
        cpuid: list[CpuidEntry] | None = None,
        images: dict[str, int] | None = None,
        taps: dict[str, list[int]] | None = None,
    ) -> None:
        """Of a VM that arrives: its RAM, the CPUID it was born with, and by device id the open descriptions of its
        images and TAPs. All of it belongs to the assembly from the call on. Raises FlotillaError; nothing is left then.
        """
        self.config = config
        self._context = context
        self._reactor = context.reactor
        self._closed = False
        self._backends: list[Backend] = []
        self._ends: list[HostEnd] = []
        self._disks: dict[str, Disk] = {}
        self._images = images or {}  # those that have not become a disk yet
        self.functions: dict[str, VirtioPci] = {}
        self.nets = Nets(self._reactor, context.fleet, taps or {})
        with Undo() as undo:
            undo.add(self._close_images)
            undo.add(self.nets.close_taps)
            undo.add(self._close_ends)  # a user's terminal is raw by now, and nobody else knows how it was
            if memory is not None:
                undo.add(memory.close)
            serial_end = self._open_end(config.serial)
            self._console_end = self._open_end(config.console)
            self.platform = Platform(self._reactor, config, self._guest_event, serial_end, memory, cpuid)
            undo.add(self.platform.close)
            platform = self.platform
            self.vcpus = Vcpus(
                self._reactor, platform.kvm_vm, platform.pages, platform.apic_ids, platform, context.seccomp,
                context.fleet.supervision,
            )  # fmt: skip
            undo.add(self.vcpus.close)
            self.vcpus.on_spawn = context.fleet.cgroups.enter
            self.kvm_stats = self._kvm_stats() if context.statistics else None
            context.fleet.patients.append(self.vcpus.patients)

    def _kvm_stats(self) -> KvmStats:
        from controller.kvm_stats import KvmStats

        vcpus = [(vcpu.name, vcpu.fd) for vcpu in self.vcpus.all]
        return KvmStats(self.platform.kvm, [("", self.platform.kvm_vm.fd), *vcpus])

    def _open_end(self, device: Any) -> HostEnd | None:
        if device.mode is ConsoleMode.OFF:
            return None
        end = open_host_end(device.mode.value, device.file or "", device.socket or "")
        self._ends.append(end)
        if end.termios is not None:
            self._context.leavings.raw_terminal(end.terminal, end.termios)
        if end.unlink:
            self._context.leavings.path(os.path.abspath(end.path), True)
        return end

    # Functions ---------------------------------------------------------------------------------------------------

    async def make_functions(self, tree: dict[str, Any] | None = None) -> None:
        """Make the PCI functions and what starts their workers. `tree`: the places of a VM that arrives.

        Raises FlotillaError, OSError; close() takes what has been made.
        """
        config, memory = self.config, self.platform.memory
        plans = []
        if self._console_end is not None:
            frontend = Frontend(self._reactor, memory, CONSOLE_ID)
            console = console_device(self._reactor, frontend, config.console.id or CONSOLE_ID)
            plans.append(self._plan("console", console, config.console.pci_device_id))
        for number, disk in enumerate(config.disks):
            device = await self._disk(disk, number == 0)
            plans.append(self._plan("disk", device, disk.pci_device_id))
        for net in config.net:
            device = await self.nets.make(net, memory)
            plans.append(self._plan("net", device, net.pci_device_id))
            self.nets.plugged(self.functions[device.device_id])
        frontend = Frontend(self._reactor, memory, RNG_ID)
        rng = rng_device(self._reactor, frontend, config.rng.id or RNG_ID)
        plans.append(self._plan("rng", rng, config.rng.pci_device_id))
        build([self.platform.segment], plans, tree)
        self._make_backends()

    def _plan(self, kind: str, device: VhostUserDevice, slot: int | None) -> Plan:
        platform = self.platform
        function = VirtioPci(device, platform.kvm_vm, platform.routing, platform.memory)
        device.on_config_changed = function.config_changed
        self.functions[device.device_id] = function
        return Plan(kind, function, slot=slot)

    async def _disk(self, disk: DiskConfig, first: bool) -> VhostUserDevice:
        assert disk.id is not None
        frontend = Frontend(self._reactor, self.platform.memory, disk.id, own=not disk.vhost_user)
        if disk.vhost_user:
            assert disk.vhost_socket is not None
            foreign = ForeignBackend(
                self._reactor, frontend, disk.id, disk.vhost_socket, self._context.fleet.supervision
            )
            self._disks[disk.id] = Disk(disk, None, frontend, foreign=foreign)
            device_id, sizes = disk.id, (disk.queue_size,) * disk.num_queues
            return await foreign.connect(
                lambda: VhostUserDevice.attach(self._reactor, frontend, device_id, FOREIGN_BLOCK, sizes)
            )
        image = self._images.pop(disk.id) if disk.id in self._images else disks.open_image(disk, first)
        self._disks[disk.id] = Disk(disk, image, frontend)
        device = disk_device(self._reactor, frontend, disk, image)
        device.extra["disk_path"] = disk.path or ""
        return device

    # Payload and vCPUs -------------------------------------------------------------------------------------------

    def load_payload(self) -> None:
        config, platform = self.config, self.platform
        payload = config.payload
        entry = load(
            platform.memory, platform.layout, payload.kernel or "", payload.initramfs, payload.cmdline or ""
        )
        write_tables(
            platform.memory,
            platform.layout,
            Description(
                config.cpus.boot_vcpus,
                config.cpus.max_vcpus,
                config.cpus.topology,
                config.serial.mode is not ConsoleMode.OFF,
            ),
        )
        write_descriptor_tables(platform.memory)
        for vcpu in self.vcpus.all:
            nested = config.cpus.nested
            configure(vcpu.fd, vcpu.index, platform.cpuid, platform.topology, entry, nested=nested)

    def set_cpuid(self) -> None:
        """Of a VM that arrives; configure() does it at boot."""
        platform, nested = self.platform, self.config.cpus.nested
        for vcpu in self.vcpus.all:
            khz = tsc_khz(vcpu.fd)
            entries = vcpu_cpuid(platform.cpuid, vcpu.index, platform.topology, tsc_khz=khz, nested=nested)
            set_cpuid(vcpu.fd, entries)

    # Workers -----------------------------------------------------------------------------------------------------

    def _make_backends(self) -> None:
        """One for each disk of ours, and one for console and rng, which share a process."""
        for disk in self._disks.values():
            if disk.image is not None:
                disk.backend = disks.backend(
                    self._reactor, self._context.fleet, disk.config, disk.frontend, disk.image
                )
                self._backends.append(disk.backend)
        frontends: dict[str, Frontend] = {"rng": self.frontend(self.config.rng.id or RNG_ID)}
        fds: dict[str, int] = {}
        spec: dict[str, Any] = {"rng": {"src": self.config.rng.src}}
        end = self._console_end
        if end is not None:
            frontends["console"] = self.frontend(self.config.console.id or CONSOLE_ID)
            spec["console"] = {"mode": end.mode.value, "path": end.path}
            fds = {f"console.{role}": fd for role, fd in end.fds.items()}
        worker = WorkerSpec("console", CONSOLE_WORKER, "console_worker.__main__", "worker", spec)
        self._backends.append(Backend(self._reactor, self._context.fleet, worker, frontends, fds))
        self._backends += self.nets.backends()

    def start_workers(self) -> None:
        """Beside a guest that runs already: a device whose worker can't start waits until it can."""
        for backend in self._backends:
            self._reactor.spawn(backend.start_for_good(), f"start {backend.name}")

    async def bring_up(self) -> None:
        """All workers, before anything runs. Raises FlotillaError when one can't start."""
        await gather(self._reactor, *(backend.start() for backend in self._backends))

    async def wait_serving(self) -> None:
        """Until every device has its worker. Raises WorkerError that names device and reason, within WORKER_SECONDS;
        at once for a back end of somebody else's that is away: nobody knows for how long."""
        if (absence := self.foreign_absence()) is not None:
            raise absence
        await gather(self._reactor, *(backend.wait_serving(WORKER_SECONDS) for backend in self._backends))

    def absence(self) -> WorkerError | None:
        """The error that names a worker which does not serve now."""
        ours = (b.absence() for b in self._backends if b.state is not BackendState.SERVING)
        return next(ours, None) or self.foreign_absence()

    def foreign_absence(self) -> WorkerError | None:
        """The same of other people's back ends only, whom nobody here can start."""
        return next((absence for foreign in self._foreign() if (absence := foreign.absence())), None)

    def describe_workers(self) -> list[dict[str, Any]]:
        """Rows of `vmm.fleet` for workers that do not serve as they should, and for other people's back ends."""
        ours = [row for backend in self._backends if (row := backend.row()) is not None]
        return ours + [foreign.row() for foreign in self._foreign()]

    def _foreign(self) -> list[ForeignBackend]:
        return [disk.foreign for disk in self._disks.values() if disk.foreign is not None] + self.nets.foreign()

    def frontend(self, device_id: str) -> Frontend:
        device = self.functions[device_id].device
        assert isinstance(device, VhostUserDevice)
        return device.frontend

    async def plug_net(self, config: NetConfig) -> str:
        """Add a device to a VM that runs; its PCI address. The worker is up before the guest hears of the device.

        Raises FlotillaError; nothing is added then.
        """
        await self.wait_serving()
        device = await self.nets.make(config, self.platform.memory)
        function = self._plan("net", device, config.pci_device_id).function
        platform = self.platform
        try:
            backends = self.nets.backends()
            await gather(self._reactor, *(backend.start() for backend in backends))
            bdf = platform.segment.add(function, config.pci_device_id)
        except BaseException:
            self.functions.pop(device.device_id).close()
            await self.nets.remove(device.device_id)
            raise
        self._backends += backends
        self.nets.plugged(self.functions[device.device_id])
        platform.pci_hotplug.mark_up(bdf.segment, bdf.slot)
        platform.ged.notify(GedEvent.PCI)
        return str(bdf)

    def _guest_event(self, event: GuestEvent) -> None:
        if not self._closed:
            self._context.on_guest_event(event)

    # Asking ------------------------------------------------------------------------------------------------------

    @property
    def console(self) -> Backend | None:
        """The worker that keeps the console's state; None for a VM without one."""
        return self._worker(CONSOLE_WORKER) if self._console_end is not None else None

    def _worker(self, name: str) -> Backend | None:
        return next((backend for backend in self._backends if backend.name == name), None)

    def terminal_resized(self) -> None:
        """SIGWINCH: the console worker's terminal has another size."""
        worker = self._worker(CONSOLE_WORKER)
        if worker is not None:
            worker.signal(signal.SIGWINCH)

    @property
    def workers(self) -> list[Backend]:
        return list(self._backends)

    @property
    def disks(self) -> list[Disk]:
        """In the order of the configuration."""
        return list(self._disks.values())

    def disk_fds(self) -> dict[str, int]:
        """By disk id: the descriptions that hold the locks."""
        return {name: disk.image for name, disk in self._disks.items() if disk.image is not None}

    async def counters(self) -> dict[str, Any]:
        """Counters of every disk and network device of ours, by device id."""
        answers = await self.nets.counters()
        for name, disk in self._disks.items():
            if disk.backend is not None:
                answers[name] = await disk.backend.stats()
        return answers

    # End ---------------------------------------------------------------------------------------------------------

    def keep_names(self) -> None:
        """The guest runs elsewhere, and its destination has bound the consoles' paths anew."""
        for end in self._ends:
            end.unlink = False

    async def close(self) -> None:
        """End vCPUs, then workers. Idempotent."""
        if self._stop():
            await gather(self._reactor, *(backend.close() for backend in self._backends))
            self._let_go()

    def abandon(self) -> None:
        """The same without waiting: the process is about to end, or nothing but vCPUs has been started."""
        if self._stop():
            for backend in self._backends:
                backend.abandon()
            self._let_go()

    def _stop(self) -> bool:
        """False when that has been done before."""
        if self._closed:
            return False
        self._closed = True
        self._context.fleet.patients.remove(self.vcpus.patients)
        if self.kvm_stats is not None:
            self.kvm_stats.close()
        self.vcpus.close()
        for name in self.functions:
            self.frontend(name).close()
        for disk in self._disks.values():  # a foreign back end may be connected and not a function yet
            if disk.foreign is not None:
                disk.foreign.close()
            disk.frontend.close()
        self.nets.hang_up()
        return True

    def _let_go(self) -> None:
        for function in self.functions.values():
            function.close()
        for disk in self._disks.values():
            if disk.image is not None:
                os.close(disk.image)
        self._close_images()
        self.nets.close_taps()
        self.platform.close()
        self._close_ends()

    def _close_images(self) -> None:
        for image in self._images.values():
            os.close(image)
        self._images = {}

    def _close_ends(self) -> None:
        for end in self._ends:
            if end.termios is not None:
                self._context.leavings.raw_terminal(end.terminal, None)
            if end.unlink:
                self._context.leavings.path(os.path.abspath(end.path), False)
            end.close()
