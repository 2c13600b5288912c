"""A controller with a toy VM: real reactor, fleet, zygote, agents and migration; only the guest is small.

The test forks it and talks to it in JSON over a SOCK_SEQPACKET pair. Commands: {"boot"}, {"send", "url", …faults},
{"receive", "url", …faults}, {"cancel"}, {"resolve"}, {"age"}, {"time_up"}, {"resume"}, {"quit"}. With `disk` a boot
makes a guest whose RAM a send copies (ToyRemote) as to another host. It reports every event of the monitor and, at the
end of a command, {"done": command, "error": [chain] | null, …}.

Faults of one command, each at a phase: kill_at, stop_at (this controller), cancel_at, kill_runner_at, kill_agent_at;
`agent` (for the agent, see migration_agent/agent.py); `fail`: the VM's step that raises; `settings`: deadlines;
`hold_flush`: the disk takes until {"flushed"}; `fresh_s`: for FRESH_SECONDS. `late` is what cancel() has answered last.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from controller import zygote
from controller.events import EventMonitor
from controller.fleet import Fleet, Process, WorkerSpec
from controller.locks import try_lock, unlock
from controller.migration import departure as departures
from controller.migration import link as links
from controller.migration import outcome as outcomes
from controller.migration.arguments import Bounds
from controller.migration.departure import Departure
from controller.migration.fixed_cost import FixedCost
from controller.migration.incoming import Incoming
from controller.migration.link import Settings
from controller.migration.outgoing import Fate, Outgoing
from controller.spawn import Zygote
from shared import control
from shared.errors import FlotillaError, HostError, StateError, WorkerLost, chain
from shared.linux import die_with_parent, memfd
from shared.pages import Bitmap
from shared.reactor import Event, Lock, Reactor
from tests.controller.migration.toy_runner import GUEST_SIZE, PAGE, GuestRam, Ram

Faults = dict[str, Any]
FAR_SECONDS = 1800.0  # no deadline of the program's is as far away
LAST_SECONDS = 60.0  # for the end of a question: a test answers it, however slow its machine is
GOODBYE_SECONDS = 10.0  # likewise for an agent that is to pass on a reason
HANGS_SECONDS = 1.0  # for one that will not


class ToyVm:
    """Keeps the Migratable contract, replacing its runner whenever that dies."""

    def __init__(self, fleet: Fleet, ram_fd: int, pulse_fd: int, faults: Faults) -> None:
        self._fleet = fleet
        self._fds = {"ram": ram_fd, "pulse": pulse_fd}
        self._ram = Ram(ram_fd)
        self._lock = Lock()
        self._saved: dict[str, Any] | None = None
        self._closed = False
        self._process: Process | None = None
        self.active = False
        self.faults = faults
        self.reactor: Reactor

    def _fail(self, step: str) -> None:
        if self.faults.get("fail") == step:
            raise StateError(f"the toy can't {step}", "that was the plan")

    async def runner(self) -> Process:
        async with self._lock:
            if self._process is None or self._process.channel is None:
                spec = WorkerSpec("toy_runner", "runner", "tests.controller.migration.toy_runner", "worker")
                self._process = await self._fleet.start(spec, self._fds, self._ended)
            return self._process

    def _ended(self, _: Process) -> None:
        if self.active and not self._closed:
            self.reactor.spawn(self._revive(), "runner")

    async def _go(self) -> None:
        self.active = True
        await self._revive()

    async def _revive(self) -> None:
        """Start the runner, unless it has been quiesced meanwhile; one that dies over it is replaced."""
        for _ in range(5):
            if not self.active:
                return
            try:
                await (await self.runner()).call("resume")
                return
            except WorkerLost:
                continue
        raise WorkerLost("the runner dies again and again")

    def kill_runner(self) -> None:
        if self._process is not None and self._process.channel is not None:
            os.kill(self._process.pid, signal.SIGKILL)

    # Migratable

    def config_json(self) -> dict[str, Any]:
        return {"payload": {"kernel": "toy"}}

    def memory_parts(self) -> tuple[list[tuple[int, int, int, int]], list[int]]:
        return [(0, PAGE, 0, 0)], [self._fds["ram"]]

    def disk_fds(self) -> dict[str, int]:
        return {"_pulse0": self._fds["pulse"]}

    def tap_fds(self) -> dict[str, list[int]]:
        """No TAPs: any descriptors do, and these can be told from others."""
        return {"_net1": [self._fds["pulse"]] * 2}

    def build_info(self) -> dict[str, Any]:
        return {"cpuid": [[1, 2, 3]], "blob": b"\0\xff"}

    async def pause(self) -> Mapping[str, float]:
        self._fail("pause")
        began = time.monotonic()
        self.active = False
        try:
            await (await self.runner()).call("quiesce")
        except WorkerLost:
            pass  # dead is quiet
        return {"runner": (time.monotonic() - began) * 1000}

    async def resume(self) -> None:
        self._fail("resume")
        await self._go()

    async def save(self) -> dict[str, Any]:
        self._fail("save")
        return {"count": self._ram.count, "blob": b"\x80" * 70000}

    async def load(self, state: dict[str, Any]) -> Mapping[str, float]:
        self._fail("load")
        self._saved = state
        await self.runner()
        return {"runner": 0.0}

    async def start_loaded(self) -> None:
        self._fail("start")
        assert self._saved is not None
        if self._saved["count"] != self._ram.count:
            self._ram.violate()  # somebody let the guest run on after its state was saved
        await self._go()

    async def destroy(self) -> None:
        if not self._closed:
            self._closed = True
            self.active = False
            if self._process is not None:
                await self._fleet.stop(self._process)
            for fd in self._fds.values():
                os.close(fd)


class ToyDirty:
    """The toy's runner keeps no log: every page may have been written at any time."""

    def __init__(self, vm: ToyRemote) -> None:
        self._vm = vm

    async def start(self) -> None:
        self._vm._fail("log")

    def mark_all(self, into: Bitmap) -> None:
        into.set(0, GUEST_SIZE)

    def harvest(self, into: Bitmap) -> None:
        into.set(0, GUEST_SIZE)

    async def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class ToyRemote(ToyVm):
    """Has RAM of its own beside the page that tells two runners apart, and a disk with a lock."""

    def __init__(self, fleet: Fleet, witness: int, pulse_fd: int, guest: int, disk: int, faults: Faults) -> None:
        super().__init__(fleet, witness, pulse_fd, faults)
        self._fds |= {"guest": guest, "disk": disk}
        self._guest = GuestRam(guest)
        self.fixed_cost = FixedCost()
        self.flushing: Callable[[], object] = lambda: None
        self.flushed = Event()

    ended_itself = False

    def memory_parts(self) -> tuple[list[tuple[int, int, int, int]], list[int]]:
        return [(0, GUEST_SIZE, 0, 0)], [self._fds["guest"]]

    def machine_info(self) -> dict[str, Any]:
        return self.build_info()

    def dirty_pages(self) -> ToyDirty:
        return ToyDirty(self)

    async def flush_disks(self, seconds: float | None) -> None:
        self._fail("flush")
        if seconds is None and self.faults.get("hold_flush"):
            self.flushing()
            await self.flushed.wait()

    def unlock_disks(self) -> None:
        unlock(self._fds["disk"])

    def lock_disks(self) -> None:
        self._fail("lock")
        if not try_lock(self._fds["disk"], exclusive=True):
            raise HostError("the toy's disk is locked by somebody else")

    def drop_caches(self) -> None:
        pass

    async def save(self) -> dict[str, Any]:
        return await super().save() | {"guest": self._guest.count}

    async def start_loaded(self) -> None:
        assert self._saved is not None
        if self._guest.count != self._saved["guest"] or not self._guest.whole:
            self._ram.violate()  # RAM is not what it was when the state was saved
        await super().start_loaded()


class ForkedZygote(Zygote):
    """The real zygote, forked instead of exec'd: the test has paid for its imports already."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__()
        self._line = line

    def start(self) -> None:
        controller = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            self._line.close()
            try:
                zygote.main(theirs.detach(), controller)
            finally:
                os._exit(0)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours


class Controller:
    def __init__(self, line: socket.socket, runtime: str) -> None:
        self._line = line
        self._zygote = ForkedZygote(line)
        self._zygote.start()  # before this process has a zmq context
        self.reactor = Reactor()
        self.events = EventMonitor(time.monotonic())
        self.events.subscribers.append(self._event)
        self.fleet = Fleet(self.reactor, self._zygote, runtime)
        self.vm: ToyVm | None = None
        self._new: ToyVm | None = None  # at a destination, while it is built
        self._migration: Outgoing | Departure | Incoming | None = None
        self._arrived: Incoming | None = None
        self._faults: Faults = {}
        self._late: str | None = None
        self._paths: set[str] = set()
        outcomes.LAST_SECONDS = LAST_SECONDS
        self.reactor.add_reader(line.fileno(), self._command)

    def say(self, **report: Any) -> None:
        self._line.send(json.dumps(report).encode())

    def _event(self, _source: str, event: str, properties: dict[str, Any] | None) -> None:
        phase = (properties or {}).get("phase")
        self.say(event=event, phase=phase)
        if phase is None:
            return
        if self._faults.get("kill_at") == phase:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._faults.get("stop_at") == phase:
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._faults.get("kill_agent_at") == phase:
            for process in self.fleet.processes:
                if process.kind == "migration_agent":
                    os.kill(process.pid, signal.SIGKILL)
        if self._faults.get("kill_runner_at") == phase and (vm := self.vm or self._new):
            vm.kill_runner()
        if self._faults.get("cancel_at") == phase and self._migration is not None:
            self._late = self._migration.cancel()

    def _command(self) -> None:
        data = self._line.recv(65536)
        if not data:
            self.reactor.stop(1)
            return
        command = json.loads(data)
        self.reactor.spawn(self._do(command.pop("do"), command), "command")

    async def _do(self, what: str, arguments: dict[str, Any]) -> None:
        report: dict[str, Any] = {}
        error: FlotillaError | None = None
        try:
            report = await getattr(self, what)(arguments) or {}
        except FlotillaError as problem:
            error = problem
        migration = self._migration
        self.say(
            done=what,
            error=None if error is None else chain(error),
            kind=type(error).__name__,
            progress=migration.progress() if migration is not None else None,
            running=migration.running if migration is not None else None,
            has_vm=self.vm is not None,
            processes=sorted(process.kind for process in self.fleet.processes),
            paths=sorted(self._paths),
            late=self._late,
            **report,
        )

    async def boot(self, arguments: dict[str, Any]) -> None:
        witness, pulse = os.dup(arguments["ram"]), os.dup(arguments["pulse"])
        if disk := arguments.get("disk"):
            vm = ToyRemote(self.fleet, witness, pulse, memfd("guest", GUEST_SIZE), os.open(disk, os.O_RDWR), {})
            vm.lock_disks()
            self.vm = vm
        else:
            self.vm = ToyVm(self.fleet, witness, pulse, {})
        self.vm.reactor = self.reactor
        await self.vm._go()

    def _settings(self, faults: Faults) -> Settings:
        agent = faults.get("agent", "")
        links.GOODBYE_SECONDS = HANGS_SECONDS if agent.startswith("hang") else GOODBYE_SECONDS
        return Settings(fault=agent, **faults.get("settings", {}))

    async def send(self, faults: Faults) -> dict[str, Any]:
        vm = self.vm
        assert vm is not None
        self._faults = vm.faults = faults
        settings = self._settings(faults)
        paused = bool(faults.get("paused"))
        if paused:
            await vm.pause()
        if isinstance(vm, ToyRemote):
            return await self._depart(vm, faults, settings, paused)
        outgoing = Outgoing(self.reactor, self.fleet, self.events, vm, was_running=not paused, settings=settings)
        self._migration = outgoing
        await outgoing.run(faults["url"])
        self.vm = None
        await vm.destroy()
        return {"fate": str(outgoing.fate)}

    async def _depart(self, vm: ToyRemote, faults: Faults, settings: Settings, paused: bool) -> dict[str, Any]:
        departure = Departure(self.reactor, self.fleet, self.events, vm, was_running=not paused, settings=settings)
        self._migration = departure
        departure.on_resolved = lambda: self.say(event="resolved", fate=str(departure.fate))
        bounds = Bounds(**faults.get("bounds", {}))
        departures.FRESH_SECONDS = faults.get("fresh_s", departures.FRESH_SECONDS)
        vm.flushing = lambda: self.say(event="flushing")
        try:
            await departure.run(faults["url"], bounds)
        finally:
            if departure.fate is not Fate.HERE:
                self.vm = None
                await vm.destroy()
        return {"fate": str(departure.fate)}

    async def resolve(self, arguments: Faults) -> None:
        assert isinstance(self._migration, Departure)
        await self._migration.resolve(arguments["here"])
        if self._migration.fate is not Fate.HERE and self.vm is not None:
            vm, self.vm = self.vm, None
            await vm.destroy()

    async def receive(self, faults: Faults) -> None:
        self._faults = faults
        settings = self._settings(faults)
        if self._arrived is not None:
            await self._arrived.forget()
        incoming = Incoming(
            self.reactor, self.fleet, self.events, self._build, self._accept, self._path, settings=settings
        )
        self._migration = self._arrived = incoming
        try:
            await incoming.run(faults["url"])
        finally:
            self.vm, self._new = self._new if incoming.vm is not None else None, None

    def _path(self, path: str, exists: bool) -> None:
        (self._paths.add if exists else self._paths.remove)(path)
        self.say(path=path, exists=exists)

    async def _build(
        self,
        config: dict[str, Any],
        parts: Any,
        ram: list[int],
        disks: dict[str, int],
        taps: dict[str, list[int]],
        info: dict[str, Any],
    ) -> ToyVm:
        if "disk" in disks:
            return await self._build_remote(ram[0], disks["disk"])
        assert config == {"payload": {"kernel": "toy"}} and info == {"cpuid": [[1, 2, 3]], "blob": b"\0\xff"}
        assert parts == [(0, PAGE, 0, 0)] and list(disks) == ["_pulse0"] and list(taps) == ["_net1"]
        for fd in taps["_net1"]:
            assert os.path.sameopenfile(fd, disks["_pulse0"])
            os.close(fd)
        assert len(taps["_net1"]) == 2
        if self._faults.get("fail") == "build":
            for fd in (*ram, *disks.values()):
                os.close(fd)
            raise StateError("the toy can't build", "that was the plan") from FlotillaError("for a reason below")
        self._new = vm = ToyVm(self.fleet, ram[0], disks["_pulse0"], self._faults)
        vm.reactor = self.reactor
        await vm.runner()
        return vm

    def _accept(self, config: Any, parts: Any, info: Any) -> tuple[list[int], dict[str, int]]:
        assert config == {"payload": {"kernel": "toy"}} and info == {"cpuid": [[1, 2, 3]], "blob": b"\0\xff"}
        assert parts == [(0, GUEST_SIZE, 0, 0)]
        if self._faults.get("fail") == "accept":
            raise StateError("the toy can't accept", "that was the plan")
        return [memfd("guest", GUEST_SIZE)], {"disk": os.open(self._faults["disk"], os.O_RDWR)}

    async def _build_remote(self, guest: int, disk: int) -> ToyRemote:
        if self._faults.get("fail") == "build":
            os.close(guest)
            os.close(disk)
            raise StateError("the toy can't build", "that was the plan")
        witness, pulse = os.dup(self._faults["ram"]), os.dup(self._faults["pulse"])
        self._new = vm = ToyRemote(self.fleet, witness, pulse, guest, disk, self._faults)
        vm.reactor = self.reactor
        await vm.runner()
        return vm

    async def cancel(self, _: dict[str, Any]) -> None:
        assert self._migration is not None
        self._late = self._migration.cancel()

    async def age(self, _: dict[str, Any]) -> None:
        """The time in which the destination may still take a guest in doubt is over."""
        assert isinstance(self._migration, Departure) and self._migration._committed_at is not None
        self._migration._committed_at -= self._migration._settings.prepared

    async def time_up(self, _: dict[str, Any]) -> None:
        """The timeout_s of a send, which has to be an hour, is over."""
        (timer,) = (timer for timer in self.reactor._timers if timer.when > time.monotonic() + FAR_SECONDS)
        assert timer.callback is not None
        timer.callback()

    async def flushed(self, _: dict[str, Any]) -> None:
        assert isinstance(self.vm, ToyRemote)
        self.vm.flushed.set()

    async def resume(self, _: dict[str, Any]) -> None:
        assert self.vm is not None
        self.vm.faults = {}
        await self.vm.resume()

    async def fds(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"fds": len(os.listdir("/proc/self/fd"))}

    async def quit(self, _: dict[str, Any]) -> None:
        if self.vm is not None:
            await self.vm.destroy()
        self.reactor.call_soon(self.reactor.stop)

    def run(self) -> int:
        try:
            return self.reactor.run()
        finally:
            for process in list(self.fleet.processes):
                self.fleet.kill(process)
            self._zygote.stop()


def fork_controller(line: socket.socket, runtime: str) -> int:
    """The pid of a new controller that serves `line`."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        die_with_parent(parent)
        control._context = None  # the parent's has threads, and they did not come along
        code = Controller(line, runtime).run()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
