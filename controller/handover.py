"""A running device goes from one process to another, under load. Who owns its rings is one value, `Handover.owner`.

    owner  step
    OLD    start ──▶ check ──▶ connect ──▶ quiesce ─▶ save ─▶ load ─▶ prepare ─▶ verify ─┐
             └─────────┴──────────┴───────────┴────────┴───────┴────────┴──────────┴──▶ back: the old one resumes
    ─────────────────────────────────────────────── the point of no return ──────────────┼──────────────────────
    NEW                                                                                resume ──▶ end ──▶ done
             rings untouched, new one gone: owner OLD, the old one resumes ◀─────────────┤
    NOBODY   rings touched, new one gone: the old one ends too, and is restarted as after any death

While OLD owns them the new process has been quiesced since its first moment: it is told everything and starts nothing.
The old one stays, quiesced, until the new one has answered `resume`. From `quiesce` to there the guest waits, and the
front ends' locks are held, so no wish of the driver comes in between. Whatever fails, the new process is killed and
waited for before anybody else goes on: two never serve.

`resume` is where nobody can know how far a dead process came, but the rings tell: a request that was begun shows in a
used index or in the inflight region. If neither has changed, nothing was begun. Otherwise what the old process knows of
its rings is out of date, and a fresh one recovers them from the region, as after a kill.

The old one dying: before the point of no return the upgrade is over, and supervision starts a successor of the old
program; after it, the new one is the successor.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from enum import StrEnum

from controller.backends import Backend
from controller.devices.state import Fields
from controller.fleet import Fleet, Process, ProcessState
from controller.sandbox_report import look
from controller.statistics import checked
from controller.supervision import Cause, Change, process_state, thread_states
from controller.vhost_standby import Mark, Standby
from controller.vm_state import worker_state
from shared.errors import FlotillaError, ProtocolError, Timeout, WorkerError, WorkerLost
from shared.reactor import Reactor, describe, within
from shared.typed import Any, Final
from shared.worker import CONTRACT

# Without a sign of life from the old one, whose `resume` may stand behind a `quiesce` that waits for the disk.
RESUME_SECONDS: Final = 60.0
# Kinds whose configuration space is state; a console's is the terminal's size, which may change at any moment.
SAME_CONFIG: Final = ("blk", "net")
# What less_confined() reads of a process, and a zombie has no more.
COMPARED: Final = {
    "seccomp", "no_new_privs", "capabilities", "bounding", "uid", "gid", "groups", "namespaces", "root", "open_files",
    "core",
}  # fmt: skip
Row = Mapping[str, Any]


class Owner(StrEnum):
    OLD = "old"
    NEW = "new"
    NOBODY = "nobody"


class Step(StrEnum):
    START = "start"
    CHECK = "check"
    CONNECT = "connect"
    QUIESCE = "quiesce"
    SAVE = "save"
    LOAD = "load"
    PREPARE = "prepare"
    VERIFY = "verify"
    RESUME = "resume"
    END = "end"


class Handover:
    """One upgrade of `backend`, which serves. `program`: what the new process execs, "" for nothing. `ready`, `done`:
    seconds for the two halves, in the second of which the guest waits."""

    def __init__(
        self, reactor: Reactor, fleet: Fleet, backend: Backend, program: str, ready: float, done: float
    ) -> None:
        assert backend.process is not None
        self._reactor, self._fleet, self._backend = reactor, fleet, backend
        self._program, self._ready, self._done = program, ready, done
        self._old: Process = backend.process
        self._new: Process | None = None
        self._standbys = {name: Standby(front) for name, front in backend.frontends.items()}
        self._marks: dict[str, Mark] = {}
        self._confinement: Row = {}
        self._stalled: float | None = None  # since when the guest waits
        self.owner = Owner.OLD
        self.step = Step.START
        self.change = Change(backend.kind, backend.name, self._old.pid, program=program)

    async def run(self) -> Change:
        """Raises WorkerError that names step and reason, with the device served as before or by a fresh process."""
        backend, supervision = self._backend, self._fleet.supervision
        backend.disturb()
        try:
            sockets = await self._fork()
            await within(self._reactor, self._ready, self._bring_up(sockets), f"{self._new_name} to be ready")
            async with AsyncExitStack() as locked:
                await within(self._reactor, self._done, self._lock(locked), "the device to do what it is told")
                await self._hand_over()
        except (FlotillaError, OSError) as error:
            await self._discard()
            raise self._failed(error) from None  # it has the reason in it
        except BaseException:
            await self._discard()
            raise
        finally:
            backend.settle()
        supervision.upgraded(self.change)
        await self._fleet.stop(self._old)
        return self.change

    @property
    def _new_name(self) -> str:
        return self._program or f"another {self._backend.name} process"

    async def _lock(self, locked: AsyncExitStack) -> None:
        for front in self._backend.frontends.values():
            await locked.enter_async_context(front.conversation)

    # While the old one serves ------------------------------------------------------------------------------------

    async def _fork(self) -> dict[str, socket.socket]:
        """Not within a time limit of ours: the zygote must be heard out."""
        self._confinement = look(self._old.pid)
        if missing := COMPARED - self._confinement.keys():
            raise WorkerLost(f"{self._old.name} is ending: its {min(missing)} can't be read")
        self._new, sockets = await self._backend.fork_standby(self._program)
        self.change.new_pid = self._new.pid
        return sockets

    async def _bring_up(self, sockets: Mapping[str, socket.socket]) -> None:
        process = self._new
        assert process is not None
        try:
            await self._fleet.greet(process)
            self.step = Step.CHECK
            self._vet(process)
            self.step = Step.CONNECT
            for name, standby in self._standbys.items():
                ours = sockets[name].dup()
                ours.setblocking(False)
                await standby.negotiate(ours)
        finally:
            for sock in sockets.values():
                sock.close()

    def _vet(self, process: Process) -> None:
        """Raises WorkerError for a process that may not have the guest."""
        vet(process, self._old.identity, self._confinement)

    # While the guest waits ---------------------------------------------------------------------------------------

    async def _hand_over(self) -> None:
        self._stalled = time.monotonic()
        try:
            await within(self._reactor, self._done, self._move(), "handing over")
        except BaseException:
            await self._fall_back()
            raise
        finally:
            self.change.stall_ms = round((time.monotonic() - self._stalled) * 1000, 3)

    async def _move(self) -> None:
        old, new = self._old, self._new
        assert new is not None
        self.step = Step.QUIESCE
        bases = bases_of(await old.call("quiesce", None), self._standbys)
        self.step = Step.SAVE
        saved = worker_state(Fields(old.name, await old.call("save", None)))
        old.stats = checked(await old.call("stats", None))
        self.step = Step.LOAD
        await new.call("load", None, **saved)
        self.step = Step.PREPARE
        for name, standby in self._standbys.items():
            await standby.prepare(bases[name])
        self.step = Step.VERIFY
        await self._verify(new, saved, bases)
        self._marks = {name: standby.mark() for name, standby in self._standbys.items()}
        for process in (old, new):
            if process.state is not ProcessState.RUNNING:
                raise WorkerLost(process.obituary)
        self.step, self.owner = Step.RESUME, Owner.NEW
        await new.call("resume", None)
        if self._backend.closing or not all(standby.ready for standby in self._standbys.values()):
            raise WorkerLost(f"{self._backend.devices}: the connection was lost")
        self.step = Step.END
        for standby in self._standbys.values():
            standby.adopt()
        self._backend.hand_over(new, old, self._program, self._vet if self._program else lambda _process: None)

    async def _verify(self, new: Process, saved: Row, bases: Mapping[str, Mapping[int, int]]) -> None:
        """What the new process says that it has loaded. A newer version's state has another shape: only what does
        not depend on it is compared."""
        again = await new.call("save", None)
        if again.get("version") == saved.get("version") and (field := differing(saved["state"], again.get("state"))):
            raise ProtocolError(f"{self._new_name} lies about its state: {field} is not what it was given")
        told = bases_of(await new.call("quiesce", None), self._standbys)
        for name, standby in self._standbys.items():
            for ring in standby.wanted:
                if told[name][ring] != bases[name][ring]:
                    raise ProtocolError(
                        f"{self._new_name} lies about its state: ring {ring} of {standby.name} goes on at "
                        f"{told[name][ring]}, it was told {bases[name][ring]}"
                    )
            at = await standby.differing_config() if self._backend.kind in SAME_CONFIG else None
            if at is not None:
                raise ProtocolError(
                    f"{self._new_name} lies about its state: byte {at} of {standby.name}'s configuration space differs"
                )

    # Back --------------------------------------------------------------------------------------------------------

    async def _fall_back(self) -> None:
        """The new one is gone when this returns, and the device is the old one's, or to be started again."""
        await self._discard()
        old = self._old
        if self.owner is Owner.NEW:
            clean = all(standby.untouched(self._marks[name]) for name, standby in self._standbys.items())
            self.owner = Owner.OLD if clean else Owner.NOBODY
        if old.state is ProcessState.ENDED or self._backend.closing:
            return
        if self.owner is Owner.NOBODY:
            reason = f"{self._new_name} had begun to serve, and failed"
            self._fleet.condemn(old, Cause.ENDED, reason, since=self._stalled)
            await old.ended.wait()
            return
        try:
            await self._resume_old()
        except WorkerLost:
            pass  # supervision sees to it
        except FlotillaError as error:
            # Without `since`: its requests are not to blame for a disk that is slow, or for what it makes of `quiesce`.
            self._fleet.condemn(old, Cause.HUNG if isinstance(error, Timeout) else Cause.REFUSED, describe(error))
            await old.ended.wait()

    async def _resume_old(self) -> None:
        """However long the disk takes: as long as requests are finished, or the kernel holds one, it is no hang. A
        process that is stopped meanwhile is the watchdog's to find. Raises FlotillaError."""
        old, seen = self._old, None
        answer = self._reactor.spawn(old.call("resume", None), f"resume {old.name}")
        while True:
            try:
                await within(self._reactor, RESUME_SECONDS, answer, f"{old.name} to resume")
                return
            except Timeout:
                before, seen = seen, [standby.mark() for standby in self._standbys.values()]
                if answer.done() or (seen == before and "D" not in thread_states(old.pid)):
                    raise

    async def _discard(self) -> None:
        if self.step is Step.END:
            return
        if self._new is not None:
            self._fleet.kill(self._new)
            await self._new.ended.wait()
        for standby in self._standbys.values():
            standby.close()

    def _failed(self, error: FlotillaError | OSError) -> WorkerError:
        new = self._new
        why = new.verdict.reason if new is not None and new.verdict is not None else describe(error)
        self.change.reason = f"{self.step}: {why}"
        self._fleet.supervision.not_upgraded(self.change)
        now = self._backend.process
        by = f"pid {now.pid} goes on serving it" if now is self._old else "its worker is started again"
        return WorkerError(f"{self._backend.devices}: not upgraded, {by}: {self.change.reason}")


def bases_of(answer: Row, devices: Mapping[str, Standby]) -> dict[str, dict[int, int]]:
    """Next avail indices by device and ring, from an answer to `quiesce`: keyed by the ring, or "device.ring" in a
    process of several. Raises ProtocolError unless each active ring has one."""
    told = answer.get("bases")
    found: dict[str, dict[int, int]] = {name: {} for name in devices}
    for key, base in told.items() if isinstance(told, dict) else ():
        name, _, ring = key.rpartition(".") if isinstance(key, str) else (next(iter(devices)), "", str(key))
        if name in found and ring.isdecimal() and len(ring) < 6 and type(base) is int and 0 <= base <= 0xFFFF:
            found[name][int(ring)] = base
    for name, standby in devices.items():
        if missing := standby.wanted - found[name].keys():
            raise ProtocolError(f"quiesce: no base for ring {min(missing)} of {standby.name}")
    return found


def differing(given: Any, told: Any, where: str = "") -> str:
    """The name of the first field that is not the same, "" when there is none."""
    if isinstance(given, dict) and isinstance(told, dict):
        for name in sorted({*given, *told}, key=str):
            if found := differing(given.get(name), told.get(name), f"{where}.{name}" if where else str(name)):
                return found
        return ""
    return "" if given == told and type(given) is type(told) else where or "state"


def vet(process: Process, like: Row, confinement: Row) -> None:
    """Whether a process may serve in the place of one that said `like` to hello and was confined so. WorkerError."""
    said = process.identity
    if said.get("contract") != CONTRACT:
        raise WorkerError(
            f"it speaks version {said.get('contract')!r} of the worker contract, this VMM speaks {CONTRACT}"
        )
    if said.get("kind") != like["kind"]:
        raise WorkerError(f"it is a {said.get('kind')!r}, not a {like['kind']}")
    if type(said.get("version")) is not int or said["version"] < like["version"]:
        raise WorkerError(
            f"its {like['kind']} state has version {said.get('version')!r}, the present one's {like['version']}",
            "an older program can't read it",
        )
    if weaker := less_confined(look(process.pid), confinement) or _unfiltered(process.pid, confinement):
        raise WorkerError(f"it is less confined than a worker of this VMM: {weaker}", "docs/worker-upgrade.md")


def less_confined(row: Row, like: Row) -> str:
    """What a process keeps that another one has given up (rows of `vmm.sandbox`); "" when there is nothing."""
    if missing := sorted(like.keys() - row.keys()):
        return f"{missing[0]} can't be read"
    for name, holds in (
        ("seccomp", like["seccomp"] in ("none", row["seccomp"])),
        ("no_new_privs", row["no_new_privs"] or not like["no_new_privs"]),
        ("capabilities", not int(row["capabilities"], 16) & ~int(like["capabilities"], 16)),
        ("bounding", not int(row["bounding"], 16) & ~int(like["bounding"], 16)),
        ("uid", row["uid"] == like["uid"]),
        ("gid", row["gid"] == like["gid"]),
        ("groups", set(row["groups"]) <= set(like["groups"])),
        ("namespaces", set(like["namespaces"]) <= set(row["namespaces"])),
        ("root", like["root"] in ("shared", row["root"])),
        ("open_files", _limit(row["open_files"]) <= _limit(like["open_files"])),
        ("core", _limit(row["core"]) <= _limit(like["core"])),
    ):
        if not holds:
            return f"{name} is {_said(row[name])}, not {_said(like[name])}"
    return ""


def _said(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _limit(value: Any) -> float:
    return value if type(value) is int else float("inf")


def _unfiltered(pid: int, like: Row) -> str:
    """Of a process whose first thread has a filter, the thread that has none."""
    if like["seccomp"] == "none":
        return ""
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/status") as file:
                status = file.read()
        except OSError:
            continue  # it has ended
        if "\nSeccomp:\t2\n" not in status and process_state(pid, int(thread))[0] not in "XZ":
            return f"thread {thread} has no seccomp filter"
    return ""
