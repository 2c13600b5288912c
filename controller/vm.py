"""One VM from its first to its last instruction here: boot or arrive, pause, save, load, leave, end.

    Vm.boot            ──▶ running; workers come up while the guest boots
    Vm.build_incoming  ──▶ built: everything exists, vCPU processes are parked, workers are connected
         load(state)   ──▶ loaded ──start_loaded()──▶ running
    running ──pause()──▶ paused ──save()──▶ a state        paused ──resume()──▶ running
    destroy(): the guest ends.   release(): the guest runs elsewhere; let go without touching it.

What it is made of is assembly.py's business.

Order (DESIGN section 5): pause takes the vCPUs out first (exits completed), then the clock, then the workers with their
fence. Restore sets routes and vCPUs, then the IOAPIC, then the clock, then signals every kick and call eventfd,
and lets the vCPUs go last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable

from controller.assembly import Assembly, VmContext
from controller.config.hostfiles import check_files, detect_image_types
from controller.config.identity import CONSOLE_ID, assign_ids
from controller.config.model import VmConfig
from controller.disks import drop_cache, take_lock
from controller.locks import unlock
from controller.machine.cpuid import CpuidEntry
from controller.migration.fixed_cost import FixedCost
from controller.vm_state import checked
from shared import log
from shared.errors import FlotillaError, ProtocolError, WorkerError
from shared.memory import GuestMemory
from shared.reactor import describe, gather, within
from shared.records import Record
from shared.state_versions import KINDS, VM, refusals
from shared.typed import TYPE_CHECKING, Any
from vcpu_worker.process import Vcpu
from vcpu_worker.state import VcpuCodec, share_tsc_offset, tell_paused

if TYPE_CHECKING:
    from controller.assembly import Disk
    from controller.backends import Backend
    from controller.dirty import DirtyLog
    from shared.state_versions import StateKind

RESUME_SECONDS = 10.0


class Standstill(Record, frozen=False):
    """Of a VM whose vCPUs are out: what is to be put back before they go on."""

    clock: bytes  # kvm_clock_data at the moment in which the last vCPU had left
    loaded: bool = False  # it stands still since load(): its rings have never run here
    quiet: bool = False  # loaded, and its workers have been quiesced all the same: it may be leaving again


class Vm:
    """See the module."""

    def __init__(self, context: VmContext, assembly: Assembly) -> None:
        self._reactor = context.reactor
        self._made = assembly
        self._platform = assembly.platform
        self._vcpus = assembly.vcpus
        self._functions = assembly.functions
        self._codec = VcpuCodec(assembly.platform.kvm_vm)
        self._standstill: Standstill | None = None  # None while the guest runs
        self.fixed_cost = FixedCost()

    @property
    def config(self) -> VmConfig:
        return self._made.config

    # Making ------------------------------------------------------------------------------------------------------

    @classmethod
    async def boot(cls, context: VmContext, config: VmConfig) -> Vm:
        """Everything up to the first KVM_RUN; waits only for vhost-user back ends that somebody else runs.

        Raises FlotillaError; nothing is left behind then.
        """
        check_files(config)
        config = detect_image_types(assign_ids(config))
        made = Assembly(context, config)
        try:
            await made.make_functions()
            made.load_payload()
            vm = cls(context, made)
            made.vcpus.start()
        except BaseException:
            made.abandon()
            raise
        context.reactor.call_soon(made.start_workers)
        return vm

    @classmethod
    async def build_incoming(
        cls,
        context: VmContext,
        config: dict[str, Any],
        parts: list[tuple[int, int, int, int]],
        ram_fds: list[int],
        images: dict[str, int],
        taps: dict[str, list[int]],
        info: dict[str, Any],
    ) -> Vm:
        """A VM that arrives: RAM from the peer's memfds, workers up and connected, vCPU processes parked.

        The descriptors belong to this call, also if it raises (FlotillaError): nothing is left behind then.
        """
        from controller.config.codec import from_json
        from controller.config.validate import validate
        from controller.machine.cpuid import check_compatible

        try:
            vm_config = from_json(config, strict=False)
            validate(vm_config)
            cpuid, tree = _build_info(info)
            memory = GuestMemory.attach(
                (gpa, size, fd, offset, slot) for (gpa, size, offset, slot), fd in zip(parts, ram_fds, strict=True)
            )
        except BaseException:
            for fd in (*ram_fds, *images.values(), *(fd for fds in taps.values() for fd in fds)):
                os.close(fd)
            raise
        made = Assembly(context, vm_config, memory=memory, cpuid=cpuid, images=images, taps=taps)
        try:
            await made.make_functions(tree)
            made.config = made.nets.kept(made.config)
            check_compatible(cpuid, made.platform.host_cpuid())
            made.set_cpuid()
            vm = cls(context, made)
            made.vcpus.start(paused=True)
            await made.bring_up()
        except BaseException:
            await made.close()
            raise
        return vm

    # Pause and resume --------------------------------------------------------------------------------------------

    async def wait_serving(self) -> None:
        """Until every device has its worker. Raises WorkerError that names device and reason, within a bounded time."""
        await self._made.wait_serving()

    def foreign_absence(self) -> WorkerError | None:
        """What to tell about a back end of somebody else's that is away; None: all are there."""
        return self._made.foreign_absence()

    async def pause(self) -> dict[str, float]:
        """Stop the guest; milliseconds per step. Raises FlotillaError with the guest running again."""
        timings: dict[str, float] = {}
        await self.wait_serving()
        began = time.monotonic()
        await self._vcpus.pause()
        timings["vcpus"] = _since(began)
        self._standstill = Standstill(self._platform.kvm_vm.get_clock())
        began = time.monotonic()
        self._platform.hold_serial()
        try:
            await gather(self._reactor, *(self._made.frontend(name).stop() for name in self._functions))
            await self._quiesce_workers()
        except FlotillaError as error:
            absent = self._made.absence()
            await self.resume()
            if absent is not None:
                raise absent from error
            raise
        timings["workers"] = _since(began)
        self.fixed_cost.took("pause", sum(timings.values()))
        return timings

    async def _quiesce_workers(self) -> None:
        """Those that rings are not all of: the console's reads the terminal."""
        if console := self._made.console:
            await console.call("quiesce")
        await self._made.nets.quiesce()

    async def resume(self) -> None:
        """Go on after pause(), or after a load() that was left paused, with or without a device whose back end does
        not. The clock first: a vCPU that sees it jump afterwards gets confused."""
        if self._still.loaded:
            await self.start_loaded()
            return
        self._platform.kvm_vm.set_clock(self._still.clock)
        rings = {name: self._made.frontend(name).resume() for name in self._functions}
        await gather(self._reactor, *(self._resume_device(*each) for each in rings.items()))
        for function in self._functions.values():
            function.signal_all()
        self._platform.release_serial()
        for vcpu in self._vcpus.all:
            tell_paused(vcpu.fd)
        self._standstill = None
        self._vcpus.resume()

    async def _resume_device(self, name: str, rings: Awaitable[None], *, quiet: bool = True) -> None:
        """A back end that has died, hangs or refuses must not keep the guest: it has been given up then, and whenever
        its successor comes up, the rings run. `quiet`: its worker has been quiesced, too."""
        await self._unless_it_fails(name, within(self._reactor, RESUME_SECONDS, rings, "its rings"))
        if quiet:
            await self._unless_it_fails(name, self._resume_worker(name))

    async def _unless_it_fails(self, name: str, step: Awaitable[None]) -> None:
        try:
            await step
        except (FlotillaError, OSError) as error:
            log.warn(f"{name}: {describe(error)}; the guest goes on and waits for its device")

    async def _resume_worker(self, name: str) -> None:
        if (console := self._made.console) and name == (self.config.console.id or CONSOLE_ID):
            await console.resume()
        await self._made.nets.resume(name)

    @property
    def _still(self) -> Standstill:
        assert self._standstill is not None, "the VM runs"
        return self._standstill

    async def add_net(self, more: VmConfig) -> dict[str, str]:
        """Plug in the last network device of `more`, which is our configuration otherwise. Raises FlotillaError."""
        added = more.net[-1]
        bdf = await self._made.plug_net(added)
        self._made.config = more
        return {"id": added.id or "", "bdf": bdf}

    def power_button(self) -> None:
        self._platform.ged.press_power_button()

    def terminal_resized(self) -> None:
        self._made.terminal_resized()

    # State -------------------------------------------------------------------------------------------------------

    def config_json(self) -> dict[str, Any]:
        from controller.config.codec import to_json

        return to_json(self.config)

    def memory_parts(self) -> tuple[list[tuple[int, int, int, int]], list[int]]:
        regions = self._platform.memory.regions
        return [(r.gpa, r.size, r.offset, r.slot) for r in regions], [r.fd for r in regions]

    def disk_fds(self) -> dict[str, int]:
        return self._made.disk_fds()

    def tap_fds(self) -> dict[str, list[int]]:
        return self._made.nets.tap_fds()

    def build_info(self) -> dict[str, Any]:
        """What the destination needs before the pause, beside the configuration."""
        fields = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
        cpuid = [[getattr(entry, name) for name in fields] for entry in self._platform.cpuid]
        versions = {kind.name: kind.version for kind in self._state_kinds()}
        return {"state_versions": versions, "cpuid": cpuid, "device_tree": self.device_tree()}

    def _state_kinds(self) -> list[StateKind]:
        """Those that save() gives something of."""
        names = ["console_worker"] if self._made.console else []
        names += ["net_worker"] if self._made.nets.tap_fds() else []
        return [VM, *(KINDS[name] for name in names)]

    # Moving to another host (controller/migration/migratable.py)

    @property
    def ended_itself(self) -> bool:
        return self._platform.stopped

    def machine_info(self) -> dict[str, Any]:
        from controller.migration.acceptance import machine_info

        return self.build_info() | machine_info(self._platform.kvm, self.disk_fds())

    def dirty_pages(self) -> DirtyLog:
        from controller.dirty import DirtyLog

        frontends = {name: self._made.frontend(name) for name in self._functions}
        return DirtyLog(self._platform.kvm_vm, self._platform.memory, frontends, self.wait_serving)

    async def flush_disks(self, seconds: float | None) -> None:
        """Raises WorkerError that names the disk."""
        await gather(self._reactor, *(self._flush(disk, seconds) for disk in self._made.disks))

    async def _flush(self, disk: Disk, seconds: float | None) -> None:
        if disk.backend is None:
            return
        try:
            await disk.backend.call("flush", timeout=seconds)
        except FlotillaError as error:
            raise WorkerError(f"{disk.config.id}: what the guest has written could not be flushed") from error

    def unlock_disks(self) -> None:
        for image in self.disk_fds().values():
            unlock(image)

    def lock_disks(self) -> None:
        for number, disk in enumerate(self._made.disks):
            if disk.image is not None:
                take_lock(disk.config, number == 0, disk.image)

    def drop_caches(self) -> None:
        for disk in self._made.disks:
            if disk.image is not None:
                drop_cache(disk.config, disk.image)

    async def save(self) -> dict[str, Any]:
        """The state of the paused VM. Changes nothing: a VM whose migration fails goes on."""
        if self._still.loaded and not self._still.quiet:
            await self._quiesce_workers()
            self._still.quiet = True
        began = time.monotonic()
        functions = {}
        for name, function in self._functions.items():
            functions[name] = {"transport": function.save(), "device": function.save_device()}
        console = self._made.console
        state = {
            "version": VM.version,
            "console_worker": await console.call("save") if console else None,
            "net_workers": await self._made.nets.save(),
            "vcpus": [self._codec.save(vcpu.fd) for vcpu in self._vcpus.all],
            "platform": self._platform.save(),
            "functions": functions,
            "clock": self._still.clock,
        }
        self.fixed_cost.took_since("save", began)
        return state

    async def load(self, state: dict[str, Any]) -> None:
        """Put a state into the VM that build_incoming() made. Raises ProtocolError."""
        began = time.monotonic()
        state = checked(VM.upgrade(state.get("version"), state))
        if len(state["vcpus"]) != len(self._vcpus.all):
            raise ProtocolError(f"VM state has {len(state['vcpus'])} vCPUs, its configuration {len(self._vcpus.all)}")
        platform = self._platform
        platform.load(state["platform"])
        for name, function in self._functions.items():
            if name not in state["functions"]:
                raise ProtocolError(f"VM state: device {name} is missing")
            parts = state["functions"][name]
            function.load(parts["transport"], parts["device"])
        # The processes are parked, so the vCPU ioctls are ours; the routes go before the LAPICs can raise anything.
        platform.routing.commit()
        for vcpu, saved in zip(self._vcpus.all, state["vcpus"], strict=True):
            self._load_vcpu(vcpu, saved)
        # All TSCs were read one after the other; one offset for all keeps the guest's in step.
        share_tsc_offset([vcpu.fd for vcpu in self._vcpus.all])
        platform.load_ioapic(state["platform"])
        if (console := self._made.console) and state["console_worker"]:
            await console.call("load", **state["console_worker"])
        await self._made.nets.load(state["net_workers"])
        self._standstill = Standstill(state["clock"], loaded=True)
        self.fixed_cost.took_since("load", began)

    def _load_vcpu(self, vcpu: Vcpu, saved: dict[str, Any]) -> None:
        refused = self._codec.load(vcpu.fd, saved)
        if refused:
            log.warn(f"{vcpu.name}: this host refuses MSRs {', '.join(f'{index:#x}' for index in refused)}")

    async def start_loaded(self) -> None:
        """Let the loaded guest run: it is ours from here on. Before, no ring may start: the source may take it back.

        There is no way back, so a back end that does not start its rings keeps nobody. Raises OSError when KVM refuses
        an interrupt: the guest is paused then, and may be resumed.
        """
        began = time.monotonic()
        for function in self._functions.values():
            function.msix.attach()
        rings = {name: function.restore_activate() for name, function in self._functions.items()}
        quiet = self._still.quiet
        await gather(self._reactor, *(self._resume_device(*each, quiet=quiet) for each in rings.items()))
        self._platform.kvm_vm.set_clock(self._still.clock)
        for function in self._functions.values():
            function.signal_all()
        self._platform.release_serial()
        self._standstill = None
        self._vcpus.resume()
        self.fixed_cost.took_since("start", began)
        self._made.nets.announce()

    # Asking ------------------------------------------------------------------------------------------------------

    def device_tree(self) -> dict[str, Any]:
        return self._platform.segment.device_tree()

    def describe(self) -> list[dict[str, Any]]:
        """Rows of `vmm.fleet` that the fleet does not know: vCPUs, and workers that do not serve."""
        return self._vcpus.describe() + self._made.describe_workers()

    async def counters(self) -> dict[str, Any]:
        """Counters of every disk and network device of ours, by device id; histograms are for the metrics alone."""
        from shared.latency import is_histogram

        answers = await self._made.counters()
        return {
            device: {name: value for name, value in counters.items() if not is_histogram(name)}
            for device, counters in answers.items()
        }

    @property
    def workers(self) -> list[Backend]:
        return self._made.workers

    def worker(self, name: str) -> Backend | None:
        """By its own name or by a device's; None for what has no worker of ours."""
        frontend = self._made.frontend(name) if name in self._functions else None
        return next((b for b in self.workers if b.name == name or frontend in b.frontends.values()), None)

    def has_device(self, name: str) -> bool:
        return name in self._functions

    def exits(self) -> dict[str, dict[str, list[int]]]:
        """Counts by vCPU, by who finished the exit, and by the number of KVM's reason."""
        return {vcpu.name: vcpu.exits() for vcpu in self._vcpus.all}

    def kvm_stats(self) -> list[tuple[str, bytes]]:
        """KVM's statistics tables by owner, "" being the VM; empty where there are none. Raises OSError."""
        return self._made.kvm_stats.read() if self._made.kvm_stats is not None else []

    # End ---------------------------------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """End the guest, then its workers. Idempotent."""
        await self._made.close()

    async def release(self) -> None:
        """The guest runs elsewhere. Its RAM is mapped there too; what ends here is only our share."""
        self._made.keep_names()
        await self.destroy()

    def abandon(self) -> None:
        """destroy() without waiting: the process is about to end."""
        self._made.abandon()


def _build_info(info: dict[str, Any]) -> tuple[list[CpuidEntry], dict[str, Any]]:
    """What a peer's build_info() says. Raises ProtocolError."""
    for refusal in refusals(info.get("state_versions", {})):  # a peer that leaves it out is told when its state comes
        raise refusal
    cpuid, tree = info.get("cpuid"), info.get("device_tree")
    width = len(CpuidEntry._fields)
    if not isinstance(tree, dict) or not isinstance(cpuid, list):
        raise ProtocolError("build info: cpuid and device_tree are needed")
    for entry in cpuid:
        if not isinstance(entry, list) or len(entry) != width or not all(type(word) is int for word in entry):
            raise ProtocolError(f"build info: cpuid: an entry is {width} numbers")
    return [CpuidEntry(*entry) for entry in cpuid], tree


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)
