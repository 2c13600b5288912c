"""One VM from its first to its last instruction here: boot or arrive, pause, save, load, leave, end.

    Vm.boot            ──▶ running; workers come up while the guest boots
    Vm.build_incoming  ──▶ built: everything exists, vCPU processes are parked, workers are connected
         load(state)   ──▶ loaded ──start_loaded()──▶ running
    running ──pause()──▶ paused ──save()──▶ a state        paused ──resume()──▶ running
    destroy(): the guest ends.   release(): the guest runs elsewhere; let go without touching it.

Order (DESIGN section 5): pause takes the vCPUs out first (exits completed), then the clock, then the workers with their
fence. Restore sets routes and vCPUs, then the IOAPIC, then the clock, then signals every kick and call eventfd,
and lets the vCPUs go last.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from controller import disks
from controller.backends import Backend
from controller.config.cli import Seccomp
from controller.config.hostfiles import check_files, detect_image_types
from controller.config.identity import CONSOLE_ID, RNG_ID, assign_ids
from controller.config.model import ConsoleMode, DiskConfig, VmConfig
from controller.devices.events import GuestEvent
from controller.early_device import console_device, disk_device, rng_device
from controller.events import EventMonitor
from controller.fleet import Fleet, WorkerSpec
from controller.locks import unlock
from controller.machine.acpi.description import Description
from controller.machine.acpi.tables import write_tables
from controller.machine.boot.loader import load
from controller.machine.cpuid import CpuidEntry, vcpu_cpuid
from controller.machine.regs import configure, tsc_khz, write_descriptor_tables
from controller.pci.host import Plan, build
from controller.pci.virtio_pci import VirtioPci
from controller.platform import Platform
from controller.vcpus import Vcpus
from controller.vhost_frontend import Frontend, dial
from controller.vhost_user_device import FOREIGN_BLOCK, VhostUserDevice
from shared import log
from shared.chardev import HostEnd, open_host_end
from shared.errors import FlotillaError, ProtocolError
from shared.memory import GuestMemory
from shared.reactor import Event, Reactor, describe, gather
from vcpu_worker.process import Vcpu
from vcpu_worker.state import VcpuCodec, set_cpuid, share_tsc_offset, tell_paused

if TYPE_CHECKING:
    from controller.dirty import DirtyLog

STATE_VERSION = 1
REDIAL_SECONDS = 5.0
CONSOLE_WORKER = "console"


@dataclass(slots=True)
class VmContext:
    """What a VM needs of its VMM. The callbacks are the janitor's business: paths and terminals to tidy up."""

    reactor: Reactor
    fleet: Fleet
    events: EventMonitor
    on_guest_event: Callable[[GuestEvent], None]
    seccomp: Seccomp
    on_path: Callable[[str, bool], None] = lambda _path, _exists: None
    on_terminal: Callable[[int, list[Any] | None], None] = lambda _fd, _termios: None


@dataclass(slots=True)
class Disk:
    config: DiskConfig
    image: int | None  # holds the lock; None for a vhost-user socket
    frontend: Frontend
    backend: Backend | None = None


class Vm:
    """See the module."""

    def __init__(
        self,
        context: VmContext,
        config: VmConfig,
        *,
        memory: GuestMemory | None = None,
        cpuid: list[CpuidEntry] | None = None,
    ) -> None:
        """`memory` and `cpuid` belong to a VM that arrives; it keeps what it was born with. _assemble() follows."""
        self.config = config
        self._context = context
        self._reactor = context.reactor
        self._running = False
        self._closed = False
        self._ready = Event()
        self._backends: list[Backend] = []
        self._ends: list[HostEnd] = []
        self._disks: dict[str, Disk] = {}
        self.functions: dict[str, VirtioPci] = {}
        try:
            serial_end = self._open_end(config.serial)
            self._console_end = self._open_end(config.console)
            self.platform = Platform(self._reactor, config, self._guest_event, serial_end, memory, cpuid)
            platform = self.platform
            self.vcpus = Vcpus(self._reactor, platform.kvm_vm, platform.pages, platform.apic_ids, platform)
            self.codec = VcpuCodec(platform.kvm_vm)
        except BaseException:
            self._close_ends()  # a user's terminal is raw by now, and nobody else knows how it was
            raise

    # Making ------------------------------------------------------------------------------------------------------

    @classmethod
    async def boot(cls, context: VmContext, config: VmConfig) -> Vm:
        """Everything up to the first KVM_RUN; waits only for vhost-user back ends that somebody else runs.

        Raises FlotillaError; nothing is left behind then.
        """
        check_files(config)
        config = detect_image_types(assign_ids(config))
        vm = cls(context, config)
        try:
            await vm._assemble({}, None)
            vm._load_payload()
            vm.vcpus.start()
            vm._running = True
        except BaseException:
            vm.abandon()
            raise
        context.reactor.call_soon(vm._start_backends)
        return vm

    @classmethod
    async def build_incoming(
        cls,
        context: VmContext,
        config: dict[str, Any],
        parts: list[tuple[int, int, int, int]],
        ram_fds: list[int],
        images: dict[str, int],
        info: dict[str, Any],
    ) -> Vm:
        """A VM that arrives: RAM from the peer's memfds, workers up and connected, vCPU processes parked."""
        from controller.config.codec import from_json
        from controller.config.validate import validate
        from controller.machine.cpuid import check_compatible

        try:
            vm_config = from_json(config, strict=False)
            validate(vm_config)
            memory = GuestMemory.attach(
                (gpa, size, fd, offset, slot) for (gpa, size, offset, slot), fd in zip(parts, ram_fds, strict=True)
            )
        except BaseException:
            for fd in (*ram_fds, *images.values()):
                os.close(fd)
            raise
        cpuid = [CpuidEntry(*entry) for entry in info["cpuid"]]
        vm = cls(context, vm_config, memory=memory, cpuid=cpuid)
        try:
            await vm._assemble(images, info["device_tree"])
            check_compatible(cpuid, vm.platform.host_cpuid())
            vm._set_cpuid()
            vm.vcpus.start(paused=True)
            await vm._bring_up()
        except BaseException:
            await vm.destroy()
            raise
        return vm

    def _open_end(self, device: Any) -> HostEnd | None:
        if device.mode is ConsoleMode.OFF:
            return None
        end = open_host_end(device.mode.value, device.file or "", device.socket or "")
        self._ends.append(end)
        if end.termios is not None:
            self._context.on_terminal(end.terminal, end.termios)
        if end.unlink:
            self._context.on_path(os.path.abspath(end.path), True)
        return end

    def _set_cpuid(self) -> None:
        """Of a VM that arrives; configure() does it at boot."""
        platform, nested = self.platform, self.config.cpus.nested
        for vcpu in self.vcpus.all:
            khz = tsc_khz(vcpu.fd)
            entries = vcpu_cpuid(platform.cpuid, vcpu.index, platform.topology, tsc_khz=khz, nested=nested)
            set_cpuid(vcpu.fd, entries)

    async def _assemble(self, images: dict[str, int], tree: dict[str, Any] | None) -> None:
        """Make the PCI functions. `images` are open descriptions of disks that came with a VM, `tree` its places."""
        config, memory = self.config, self.platform.memory
        plans = []
        if self._console_end is not None:
            frontend = Frontend(self._reactor, memory, CONSOLE_ID)
            console = console_device(self._reactor, frontend, config.console.id or CONSOLE_ID, self._ready)
            plans.append(self._plan("console", console, config.console.pci_device_id))
        for number, disk in enumerate(config.disks):
            device = await self._disk(disk, number == 0, images)
            plans.append(self._plan("disk", device, disk.pci_device_id))
        frontend = Frontend(self._reactor, memory, RNG_ID)
        rng = rng_device(self._reactor, frontend, config.rng.id or RNG_ID, self._ready)
        plans.append(self._plan("rng", rng, config.rng.pci_device_id))
        build([self.platform.segment], plans, tree)

    def _plan(self, kind: str, device: VhostUserDevice, slot: int | None) -> Plan:
        platform = self.platform
        function = VirtioPci(device, platform.kvm_vm, platform.routing, platform.memory)
        device.on_config_changed = function.config_changed
        self.functions[device.device_id] = function
        return Plan(kind, function, slot=slot)

    async def _disk(self, disk: DiskConfig, first: bool, images: dict[str, int]) -> VhostUserDevice:
        assert disk.id is not None
        frontend = Frontend(self._reactor, self.platform.memory, disk.id, own=not disk.vhost_user)
        if disk.vhost_user:
            assert disk.vhost_socket is not None
            self._disks[disk.id] = Disk(disk, None, frontend)
            frontend.on_lost = lambda error: self._foreign_lost(disk, frontend, error)
            await frontend.connect(await dial(self._reactor, disk.vhost_socket))
            sizes = (disk.queue_size,) * disk.num_queues
            return await VhostUserDevice.attach(self._reactor, frontend, disk.id, FOREIGN_BLOCK, sizes)
        image = images[disk.id] if disk.id in images else disks.open_image(disk, first)
        self._disks[disk.id] = Disk(disk, image, frontend)
        device = disk_device(self._reactor, frontend, disk, image, self._ready)
        device.extra["disk_path"] = disk.path or ""
        return device

    def _foreign_lost(self, disk: DiskConfig, frontend: Frontend, error: Exception | None) -> None:
        """Somebody else's back end went away. It may come back at the same socket, whenever; the guest waits."""
        why = describe(error) if error else "closed"
        log.error(f"{disk.id}: vhost-user back end at {disk.vhost_socket} lost: {why}")
        self._reactor.spawn(self._redial(disk, frontend), f"reconnect {disk.id}")

    async def _redial(self, disk: DiskConfig, frontend: Frontend) -> None:
        assert disk.vhost_socket is not None
        while not self._closed:
            try:
                await frontend.replay(await dial(self._reactor, disk.vhost_socket, REDIAL_SECONDS))
                log.info(f"{disk.id}: vhost-user back end at {disk.vhost_socket} is back")
                return
            except FlotillaError as error:
                log.debug(f"{disk.id}: {describe(error)}")

    def _load_payload(self) -> None:
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

    # Workers -----------------------------------------------------------------------------------------------------

    def _start_backends(self) -> None:
        self._reactor.spawn(self._bring_up(), "workers")

    async def _bring_up(self) -> None:
        """Start every worker side by side. Devices that the driver activates earlier wait for `_ready`."""
        starts = [self._start_console()]
        starts += [self._start_disk(disk) for disk in self._disks.values()]
        await gather(self._reactor, *starts)
        self._ready.set()

    async def _start_disk(self, disk: Disk) -> None:
        if disk.image is not None:
            disk.backend = disks.backend(
                self._reactor, self._context.fleet, disk.config, disk.frontend, disk.image
            )
            self._backends.append(disk.backend)
            await disk.backend.start()

    async def _start_console(self) -> None:
        """virtio-console and virtio-rng share one process."""
        frontends: dict[str, Frontend] = {"rng": self._frontend(self.config.rng.id or RNG_ID)}
        fds: dict[str, int] = {}
        spec: dict[str, Any] = {"rng": {"src": self.config.rng.src}}
        end = self._console_end
        if end is not None:
            frontends["console"] = self._frontend(self.config.console.id or CONSOLE_ID)
            spec["console"] = {"mode": end.mode.value, "path": end.path}
            fds = {f"console.{role}": os.dup(fd) for role, fd in end.fds.items()}
        worker = WorkerSpec("console", CONSOLE_WORKER, "console_worker.__main__", "worker", spec)
        backend = Backend(self._reactor, self._context.fleet, worker, frontends, fds)
        self._backends.append(backend)
        await backend.start()

    def _frontend(self, device_id: str) -> Frontend:
        device = self.functions[device_id].device
        assert isinstance(device, VhostUserDevice)
        return device.frontend

    def _guest_event(self, event: GuestEvent) -> None:
        if not self._closed:
            self._context.on_guest_event(event)

    # Pause and resume --------------------------------------------------------------------------------------------

    async def pause(self) -> dict[str, float]:
        """Stop the guest; milliseconds per step. Raises FlotillaError with the guest running again."""
        timings: dict[str, float] = {}
        await self._ready.wait()
        began = time.monotonic()
        await self.vcpus.pause()
        self._running = False
        timings["vcpus"] = _since(began)
        self._clock = self.platform.kvm_vm.get_clock()
        began = time.monotonic()
        self.platform.hold_serial()
        try:
            await gather(self._reactor, *(self._frontend(name).stop() for name in self.functions))
            if self._console_end is not None:
                await self._console.call("quiesce")  # rings are not all it has: it reads the terminal
        except FlotillaError:
            await self.resume()
            raise
        timings["workers"] = _since(began)
        return timings

    async def resume(self) -> None:
        """Go on after pause(). The clock first: a vCPU that sees it jump afterwards gets confused."""
        self.platform.kvm_vm.set_clock(self._clock)
        await gather(self._reactor, *(self._frontend(name).resume() for name in self.functions))
        if self._console_end is not None:
            await self._console.call("resume")
        self.platform.release_serial()
        for function in self.functions.values():
            function.signal_all()
        for vcpu in self.vcpus.all:
            tell_paused(vcpu.fd)
        self._running = True
        self.vcpus.resume()

    @property
    def _console(self) -> Backend:
        return next(backend for backend in self._backends if backend.name == CONSOLE_WORKER)

    def power_button(self) -> None:
        self.platform.ged.press_power_button()

    def terminal_resized(self) -> None:
        """SIGWINCH: the console worker's terminal has another size."""
        for backend in self._backends:
            if backend.name == CONSOLE_WORKER:
                backend.signal(signal.SIGWINCH)

    # State -------------------------------------------------------------------------------------------------------

    def config_json(self) -> dict[str, Any]:
        from controller.config.codec import to_json

        return to_json(self.config)

    def memory_parts(self) -> tuple[list[tuple[int, int, int, int]], list[int]]:
        regions = self.platform.memory.regions
        return [(r.gpa, r.size, r.offset, r.slot) for r in regions], [r.fd for r in regions]

    def disk_fds(self) -> dict[str, int]:
        return {name: disk.image for name, disk in self._disks.items() if disk.image is not None}

    def build_info(self) -> dict[str, Any]:
        """What the destination needs before the pause, beside the configuration."""
        fields = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
        cpuid = [[getattr(entry, name) for name in fields] for entry in self.platform.cpuid]
        return {"version": STATE_VERSION, "cpuid": cpuid, "device_tree": self.device_tree()}

    # Moving to another host (controller/migration/migratable.py)

    @property
    def ended_itself(self) -> bool:
        return self.platform.stopped

    def machine_info(self) -> dict[str, Any]:
        from controller.migration.acceptance import machine_info

        return self.build_info() | machine_info(self.platform.kvm, self.disk_fds())

    def dirty_pages(self) -> DirtyLog:
        from controller.dirty import DirtyLog

        frontends = {name: self._frontend(name) for name in self.functions}
        return DirtyLog(self.platform.kvm_vm, self.platform.memory, frontends, self._ready)

    async def flush_disks(self) -> None:
        backends = [disk.backend for disk in self._disks.values() if disk.backend is not None]
        await gather(self._reactor, *(backend.call("flush") for backend in backends))

    def unlock_disks(self) -> None:
        for image in self.disk_fds().values():
            unlock(image)

    def lock_disks(self) -> None:
        for number, disk in enumerate(self._disks.values()):
            if disk.image is not None:
                disks.take_lock(disk.config, number == 0, disk.image)

    def drop_caches(self) -> None:
        for disk in self._disks.values():
            if disk.image is not None:
                disks.drop_cache(disk.config, disk.image)

    async def save(self) -> dict[str, Any]:
        """The state of the paused VM. Changes nothing: a VM whose migration fails goes on."""
        functions = {}
        for name, function in self.functions.items():
            functions[name] = {"transport": function.save(), "device": function.save_device()}
        console = await self._console.call("save") if self._console_end is not None else None
        return {
            "version": STATE_VERSION,
            "console_worker": console,
            "vcpus": [self.codec.save(vcpu.fd) for vcpu in self.vcpus.all],
            "platform": self.platform.save(),
            "functions": functions,
            "clock": self._clock,
        }

    async def load(self, state: dict[str, Any]) -> None:
        """Put a state into the VM that build_incoming() made. Raises ProtocolError."""
        if state.get("version") != STATE_VERSION:
            raise ProtocolError(f"VM state of version {state.get('version')}, not {STATE_VERSION}")
        if len(state["vcpus"]) != len(self.vcpus.all):
            raise ProtocolError(f"VM state has {len(state['vcpus'])} vCPUs, its configuration {len(self.vcpus.all)}")
        platform = self.platform
        platform.load(state["platform"])
        for name, function in self.functions.items():
            if name not in state["functions"]:
                raise ProtocolError(f"VM state: device {name} is missing")
            parts = state["functions"][name]
            function.load(parts["transport"], parts["device"])
        # The processes are parked, so the vCPU ioctls are ours; the routes go before the LAPICs can raise anything.
        platform.routing.commit()
        for vcpu, saved in zip(self.vcpus.all, state["vcpus"], strict=True):
            self._load_vcpu(vcpu, saved)
        # All TSCs were read one after the other; one offset for all keeps the guest's in step.
        share_tsc_offset([vcpu.fd for vcpu in self.vcpus.all])
        platform.load_ioapic(state["platform"])
        if self._console_end is not None and state.get("console_worker"):
            await self._console.call("load", **state["console_worker"])
        self._clock = bytes(state["clock"])

    def _load_vcpu(self, vcpu: Vcpu, saved: dict[str, Any]) -> None:
        refused = self.codec.load(vcpu.fd, saved)
        if refused:
            log.warn(f"{vcpu.name}: this host refuses MSRs {', '.join(f'{index:#x}' for index in refused)}")

    async def start_loaded(self) -> None:
        """Let the loaded guest run: it is ours from here on. Before, no ring may start: the source may take it back."""
        await gather(self._reactor, *(function.restore_activate() for function in self.functions.values()))
        self.platform.kvm_vm.set_clock(self._clock)
        for function in self.functions.values():
            function.signal_all()
        self._running = True
        self.vcpus.resume()

    # Asking ------------------------------------------------------------------------------------------------------

    def device_tree(self) -> dict[str, Any]:
        return self.platform.segment.device_tree()

    def describe_vcpus(self) -> list[dict[str, Any]]:
        return self.vcpus.describe()

    async def counters(self) -> dict[str, Any]:
        """Counters of every disk of ours, by device id."""
        answers = {}
        for name, disk in self._disks.items():
            if disk.backend is not None and disk.backend.process is not None:
                answers[name] = await disk.backend.process.call("stats")
        return answers

    # End ---------------------------------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """End the guest, then its workers. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.vcpus.close()
        for name in self.functions:
            self._frontend(name).close()
        await gather(self._reactor, *(backend.close() for backend in self._backends))
        self._let_go()

    async def release(self) -> None:
        """The guest runs elsewhere. Its RAM is mapped there too; what ends here is only our share."""
        for end in self._ends:
            end.unlink = False  # the destination has bound the path anew
        await self.destroy()

    def abandon(self) -> None:
        """The same without waiting: the process is about to end, or nothing but vCPUs has been started."""
        if self._closed:
            return
        self._closed = True
        self.vcpus.close()
        for name in self.functions:
            self._frontend(name).close()
        self._let_go()

    def _let_go(self) -> None:
        for function in self.functions.values():
            function.close()
        for disk in self._disks.values():
            if disk.image is not None:
                os.close(disk.image)
        self.platform.close()
        self._close_ends()

    def _close_ends(self) -> None:
        for end in self._ends:
            if end.termios is not None:
                self._context.on_terminal(end.terminal, None)
            if end.unlink:
                self._context.on_path(os.path.abspath(end.path), False)
            end.close()


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)
