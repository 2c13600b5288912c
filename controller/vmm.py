"""The VMM: one process-wide object that owns the reactor, the fleet, the API and at most one VM.

VM states, as the API tells them (Cloud Hypervisor's API page, section 3.7):

    (none) ──create──▶ Created ──boot──▶ Running ◀──resume── Paused
       ▲                  ▲                 │ └──pause──────▶  │
       └──────delete──────┴───shutdown──────┴──────────────────┘

While a migration is under way, requests that would change the VM are refused; asking is always allowed.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Awaitable, Callable
from enum import StrEnum

from controller.assembly import VmContext
from controller.boot_again import RETRY_SECONDS, BootAgain
from controller.config.cli import Options
from controller.config.identity import assign_ids
from controller.config.model import VmConfig
from controller.config.validate import validate
from controller.devices.events import GuestEvent
from controller.events import EventMonitor
from controller.faults.permission import fault_inject
from controller.fleet import Fleet, fill_in_pss
from controller.leavings import Leavings
from controller.runtime import RuntimeDir
from controller.signals import Signals
from controller.spawn import Zygote
from controller.supervision import Supervision
from controller.upgrade import worker_upgrade
from controller.vm import Vm
from controller.warmup import HEAD_START, warm_up
from shared import log
from shared.errors import (
    FlotillaError,
    GuestLost,
    NotFoundError,
    StateError,
)
from shared.reactor import Lock, Reactor, describe, sleep, within
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.migration.arguments import SendArguments
    from controller.migration.departure import Departure
    from controller.migration.incoming import Incoming
    from controller.migration.outgoing import Outgoing
    from controller.services import Services

END_SECONDS = 20.0
MIGRATION_SECONDS = 5.0


class VmState(StrEnum):
    CREATED = "Created"
    RUNNING = "Running"
    PAUSED = "Paused"


class Vmm:
    """See the module. `run()` returns the process's exit code."""

    def __init__(self, options: Options, began: float) -> None:
        self.options = options
        self.reactor = Reactor()
        self.reactor.on_error = self._unexpected
        self.events = EventMonitor(began)
        self.runtime = RuntimeDir()
        self.zygote = Zygote()
        supervision = Supervision(self.events.emit)
        self.fleet = Fleet(self.reactor, self.zygote, self.runtime.path, supervision, options.seccomp.value)
        self.config: VmConfig | None = None
        self.vm: Vm | None = None
        self.state = VmState.CREATED
        self.services: Services | None = None
        self.migration: Outgoing | Departure | Incoming | None = None
        self._arrived: Incoming | None = None  # the last one that was received; its source may still ask for it
        self._operations = Lock()
        self._boot_again = BootAgain(self.reactor, self.events, self._boot_now)  # of a guest that has reset itself
        self._ending = False
        self._leavings = Leavings(self.runtime.path)
        self._context = VmContext(
            self.reactor, self.fleet, self.events, self._guest_event, options.seccomp, self._leavings,
            statistics=options.metrics is not None,
        )  # fmt: skip
        self.verbs: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "vmm.ping": self.ping,
            "vmm.shutdown": self.shutdown_vmm,
            "vmm.fleet": self.describe_fleet,
            "vmm.sandbox": self.sandbox,
            "vmm.fault-inject": fault_inject(self),
            "vm.info": self.info,
            "vm.counters": self.counters,
            "vm.create": self.create,
            "vm.boot": self.boot,
            "vm.pause": self.pause,
            "vm.resume": self.resume,
            "vm.shutdown": self.shutdown,
            "vm.reboot": self.reboot,
            "vm.delete": self.delete,
            "vm.add-net": self.add_net,
            "vm.worker-upgrade": worker_upgrade(self),
            "vm.power-button": self.power_button,
            "vm.send-migration": self.send_migration,
            "vm.receive-migration": self.receive_migration,
            "vm.migration-progress": self.migration_progress,
            "vm.cancel-migration": self.cancel_migration,
            "vm.migration-estimate": self.estimate_migration,
            "vm.migration-resolve": self.resolve_migration,
        }

    # The process ------------------------------------------------------------------------------------------------

    def run(self, api_socket: Any, metrics_socket: Any = None) -> int:
        """Boot what the command line asks for, serve until the end; the exit code. Raises FlotillaError."""
        signals = Signals(
            self.reactor,
            {
                signal.SIGTERM: lambda: self.end(0),
                signal.SIGINT: lambda: self.end(0),
                signal.SIGWINCH: self._resized,
            },
        )
        try:
            self.events.emit("vmm", "starting")
            self.zygote.hold()
            if self.options.vm is not None:
                self.config = assign_ids(self.options.vm)
                # Without a wait from here to the first KVM_RUN: the workers come up while the guest boots.
                self.reactor.run_until(self._boot_now())
            self.reactor.spawn(self._start_services(api_socket, metrics_socket), "services")
            code = self.reactor.run()
        finally:
            signals.close()
            self._cleanup()
        return code

    async def _start_services(self, api_socket: Any, metrics_socket: Any) -> None:
        """The janitor first, and only then any worker: whoever is killed leaves nothing behind from there on."""
        try:
            await self._warm_up_and_start(api_socket, metrics_socket)
        finally:
            self.zygote.release()

    async def _warm_up_and_start(self, api_socket: Any, metrics_socket: Any) -> None:
        await sleep(self.reactor, HEAD_START)
        self.zygote.start()  # it warms up on another core meanwhile
        await warm_up(self.reactor)
        # Nothing was collected so far (the launcher sees to it), and what has been imported stays.
        gc.freeze()
        gc.enable()
        if self._ending:
            return
        from controller.services import Services

        self.services = Services(self.reactor, self.fleet, self.runtime.path, self._leavings, api_socket, self.verbs)
        if metrics_socket is not None:
            from controller.metrics import exporter

            self.services.exporter = exporter(self, metrics_socket, self._leavings)
        await self.services.start()

    def end(self, code: int) -> None:
        """End VM and VMM in order. Idempotent."""
        if not self._ending:
            self._ending = True
            self.reactor.spawn(self._end(code), "end")
            # Whatever hangs, a VMM that was told to end does end; _cleanup() kills what is left.
            self.reactor.call_later(END_SECONDS, lambda: self.reactor.stop(code))

    async def _end(self, code: int) -> None:
        try:
            if self.migration is not None and self.migration.progress()["state"] != "in-doubt":
                self.migration.cancel()
                await within(self.reactor, MIGRATION_SECONDS, self.migration.ended.wait(), "the migration's end")
            await self._boot_again.abandon()
            if self._arrived is not None:
                await self._arrived.forget()
            if self.vm is not None:
                await self.vm.destroy()
                self.vm = None
            self.events.emit("vmm", "shutdown")
            if self.services is not None:
                await self.services.stop()
        finally:
            self.reactor.stop(code)

    def _cleanup(self) -> None:
        """What must be gone even when the orderly end failed."""
        if self.vm is not None:
            self.vm.abandon()
        self.zygote.stop()
        for process in list(self.fleet.processes):
            self.fleet.kill(process)
        for process in list(self.fleet.processes):
            os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
        self.runtime.close()

    def _unexpected(self, error: BaseException, where: str) -> None:
        """A bug in one callback: say so loudly, keep the guest running."""
        import traceback

        log.error(f"{where}: {describe(error)}", "".join(traceback.format_exception(error)))

    def _resized(self) -> None:
        if self.vm is not None:
            self.vm.terminal_resized()

    # The guest's own wishes --------------------------------------------------------------------------------------

    def _guest_event(self, event: GuestEvent) -> None:
        """Power-off ends the VMM (or only the VM, with --no-shutdown); a reset boots again in place."""
        if self._ending:
            return
        if self.migration is not None and self.migration.progress()["state"] == "ongoing":
            self.migration.cancel()  # there is no guest to move any more
        if event is GuestEvent.RESET:
            self.reactor.spawn(self._guest_reset(), "guest reset")
        else:
            self.reactor.spawn(self._guest_power_off(), "guest power-off")

    async def _guest_reset(self) -> None:
        """Boot again. A shortage of the host's and a back end of somebody else's are waited for, however long: nobody
        asked who could ask again. vm.shutdown, vm.delete and vm.boot end the wait."""
        async with self._operations:
            if self.vm is None or self._ending:
                return
            self.events.emit("vm", "rebooting")
            absence = self.vm.foreign_absence()
            await self._stop_vm()
            if absence is not None:
                self._boot_again.waits_for(absence)
            await self._reset_attempt()
        while self._boot_again.reason:
            await sleep(self.reactor, RETRY_SECONDS)
            async with self._operations:
                if self._boot_again.reason and not self._ending:
                    await self._reset_attempt()

    async def _reset_attempt(self) -> None:
        try:
            await self._boot_again.attempt()
        except (FlotillaError, OSError) as error:
            log.error(f"the guest asked for a reset, which failed: {describe(error)}")
            self.end(1)

    async def _guest_power_off(self) -> None:
        async with self._operations:
            await self._stop_vm()
        if not self.options.no_shutdown:
            self.end(0)

    # Requests: asking --------------------------------------------------------------------------------------------

    async def ping(self, _: None) -> dict[str, Any]:
        from controller.config.version import ping

        return ping(os.getpid())

    async def describe_fleet(self, _: None, pss: bool = True) -> list[dict[str, Any]]:
        rows = self.fleet.describe()
        if self.vm is not None:
            rows += self.vm.describe()
        # The VM's rows come last: of a worker that is being started again, what is wrong counts more than its pid.
        by_name = {(row["kind"], row["device"]): row for row in rows}
        if pss:
            fill_in_pss(by_name.values())
        return [by_name[name] | self.fleet.supervision.columns(*name) for name in sorted(by_name)]

    async def sandbox(self, _: None) -> list[dict[str, Any]]:
        from controller.sandbox_report import rows

        fleet = await self.describe_fleet(None, pss=False)
        return rows((row["kind"], row["device"], row["pid"]) for row in fleet if row["pid"])

    async def info(self, _: None) -> dict[str, Any]:
        from controller.config.codec import to_json

        config = self._need_config()
        answer: dict[str, Any] = {"config": to_json(config), "state": str(self.state)}
        answer["memory_actual_size"] = config.memory.size
        if self.vm is not None:
            answer["device_tree"] = self.vm.device_tree()
        if self.migration is not None and self.migration.progress()["state"] == "in-doubt":
            answer["migration"] = "in-doubt"
        return answer

    async def counters(self, _: None) -> dict[str, Any]:
        return await self.need_vm().counters()

    async def migration_progress(self, _: None) -> dict[str, Any]:
        if self.migration is None:
            return {"state": "none"}
        progress: dict[str, Any] = self.migration.progress()
        return progress

    # Requests: changing ------------------------------------------------------------------------------------------

    def _need_config(self) -> VmConfig:
        if self.config is None:
            raise NotFoundError("VM is not created")
        return self.config

    def need_vm(self) -> Vm:
        self._need_config()
        if self.vm is None:
            reason = self._boot_again.reason
            waits = f"its guest has reset itself and can't boot: {reason}" if reason else ""
            raise StateError("VM is not running", waits or "boot it first")
        return self.vm

    def change(self) -> Lock:
        """Changes go one after the other; none waits for a migration, which may take as long as its peer likes."""
        self._not_migrating()
        return self._operations

    def _not_migrating(self) -> None:
        state = self.migration.progress()["state"] if self.migration is not None else "none"
        if state == "ongoing":
            raise StateError("VM is being migrated", "wait for the migration's end, or cancel it")
        if state == "in-doubt":
            raise StateError("VM may run at the destination of its migration", "vm.migration-resolve says whose it is")

    async def create(self, body: Any) -> None:
        from controller.config.codec import from_json
        from controller.hotplug import refuse_numbers

        async with self.change():
            if self.config is not None:
                raise StateError("VM is already created", "vm.delete removes it")
            config = from_json(body, strict=True)
            refuse_numbers(config)
            validate(config)
            self.config = assign_ids(config)
            self.state = VmState.CREATED

    async def boot(self, _: None) -> None:
        async with self.change():
            self._need_config()
            if self.vm is not None:
                raise StateError(f"VM can't be booted: its state is {self.state}")
            await self._boot_now()

    async def _boot_now(self) -> None:
        """Everything up to the first KVM_RUN; the workers follow by themselves."""
        config = self._need_config()
        self.events.emit("vm", "booting")
        self.vm = await Vm.boot(self._context, config)
        self._boot_again.over()
        self.config = self.vm.config
        self.state = VmState.RUNNING
        self.events.emit("vm", "booted")

    async def pause(self, _: None) -> None:
        async with self.change():
            vm = self.need_vm()
            if self.state is not VmState.RUNNING:
                raise StateError(f"VM can't be paused: its state is {self.state}")
            self.events.emit("vm", "pausing")
            await vm.pause()
            self.state = VmState.PAUSED
            self.events.emit("vm", "paused")

    async def resume(self, _: None) -> None:
        async with self.change():
            vm = self.need_vm()
            if self.state is not VmState.PAUSED:
                raise StateError(f"VM can't be resumed: its state is {self.state}")
            self.events.emit("vm", "resuming")
            await vm.resume()
            self.state = VmState.RUNNING
            self.events.emit("vm", "resumed")

    async def _stop_vm(self) -> None:
        self._boot_again.over()
        if self.vm is not None:
            vm, self.vm = self.vm, None
            self.state = VmState.CREATED
            await vm.destroy()
            self.events.emit("vm", "shutdown")

    async def shutdown(self, _: None) -> None:
        waited = self._boot_again.give_up()
        async with self.change():
            if not waited:
                self.need_vm()
            await self._stop_vm()

    async def reboot(self, _: None) -> None:
        async with self.change():
            absence = self.need_vm().foreign_absence()
            if absence is not None:
                raise absence  # it could not boot
            self.events.emit("vm", "rebooting")
            await self._stop_vm()
            await self._boot_now()
            self.events.emit("vm", "rebooted")

    async def delete(self, _: None) -> None:
        self._boot_again.give_up()
        async with self.change():
            await self._stop_vm()
            if self.config is not None:
                from controller.hotplug import forget

                config, self.config = self.config, None
                forget(config)
                self.events.emit("vm", "deleted")

    async def add_net(self, body: Any) -> dict[str, str] | None:
        from controller import hotplug

        async with self.change():
            self.config, answer = await hotplug.add_net(self.vm, self._need_config(), body)
            return answer

    async def power_button(self, _: None) -> None:
        self._not_migrating()
        self.need_vm().power_button()

    async def shutdown_vmm(self, _: None) -> None:
        self.end(0)

    # Migration ---------------------------------------------------------------------------------------------------

    async def send_migration(self, body: Any) -> None:
        from controller.migration.arguments import parse_send
        from controller.migration.outgoing import Fate, Outgoing

        arguments = parse_send(body)
        if not arguments.local:
            return await self._send_away(arguments)
        async with self.change():
            vm = self.need_vm()
            await vm.wait_serving()  # it can't be paused before; the destination need not build for nothing
            outgoing = Outgoing(self.reactor, self.fleet, self.events, vm, was_running=self.state is VmState.RUNNING)
            self.migration = outgoing
            code = 0
            try:
                await outgoing.run(arguments.url)
            except GuestLost:
                code = 1
                raise
            except FlotillaError:
                self.state = VmState.RUNNING if outgoing.running else VmState.PAUSED
                raise
            finally:
                if outgoing.fate is not Fate.HERE:
                    # The guest runs elsewhere: nothing of it may be touched here any more, only let go.
                    self.vm = None
                    await vm.release()
                    self.end(code)

    async def _send_away(self, arguments: SendArguments) -> None:
        """To another host."""
        from controller.migration.departure import Departure

        async with self.change():
            vm = self.need_vm()
            departure = Departure(self.reactor, self.fleet, self.events, vm, was_running=self.state is VmState.RUNNING)
            self.migration = departure
            departure.on_resolved = lambda: self.reactor.spawn(self._departed(departure), "departed")
            try:
                await departure.run(arguments.url, arguments.bounds)
            finally:
                await self._departed(departure)

    async def _departed(self, departure: Departure) -> None:
        """What has become of the VM; called again when a doubt is resolved."""
        from controller.migration.outgoing import Fate

        if departure.fate is Fate.HERE:
            self.state = VmState.RUNNING if departure.running else VmState.PAUSED
        elif self.vm is not None:
            # The guest runs elsewhere: nothing of it may be touched here any more, only let go.
            vm, self.vm = self.vm, None
            await vm.release()
            self.end(0)

    async def receive_migration(self, body: Any) -> None:
        from controller.migration.acceptance import accept
        from controller.migration.arguments import parse_receive
        from controller.migration.incoming import Incoming

        url = parse_receive(body)
        async with self.change():
            if self.config is not None:
                raise StateError("Can't receive a migration: a VM is already created", "vm.delete removes it")
            if self._arrived is not None:
                await self._arrived.forget()
            build, on_path = self._build_incoming, self._leavings.path
            incoming = Incoming(self.reactor, self.fleet, self.events, build, accept, on_path)
            self.migration = self._arrived = incoming
            try:
                await incoming.run(url)
            finally:
                if incoming.vm is not None:  # also when it could not be started: the guest is ours, paused
                    assert isinstance(incoming.vm, Vm)
                    self.vm, self.config = incoming.vm, incoming.vm.config
                    self.state = VmState.RUNNING if incoming.running else VmState.PAUSED

    async def _build_incoming(
        self,
        config: dict[str, Any],
        parts: list[Any],
        ram_fds: list[int],
        disk_fds: dict[str, int],
        tap_fds: dict[str, list[int]],
        info: Any,
    ) -> Vm:
        return await Vm.build_incoming(self._context, config, parts, ram_fds, disk_fds, tap_fds, info)

    async def estimate_migration(self, _: None) -> dict[str, Any]:
        from controller.migration.estimate import estimate

        async with self.change():
            vm = self.need_vm()
            if self.state is not VmState.RUNNING:
                raise StateError(f"No estimate for a VM whose state is {self.state}: it writes nothing")
            return await estimate(self.reactor, vm)

    async def resolve_migration(self, body: Any) -> None:
        """Somebody has looked at the destination of a migration that is in doubt."""
        from controller.migration.arguments import parse_resolve
        from controller.migration.departure import Departure

        here = parse_resolve(body)
        if not isinstance(self.migration, Departure):
            raise StateError("No migration is in doubt")
        await self.migration.resolve(here)

    async def cancel_migration(self, _: None) -> None:
        if self.migration is None or self.migration.progress()["state"] != "ongoing":
            raise StateError("No migration is under way")
        if late := self.migration.cancel():
            raise StateError(f"Too late to cancel: {late}")
