"""`vm.worker-upgrade`: what is asked for, whether it can be done. How: controller/handover.py.

    {"id": "_disk0", "exec": "/opt/next/bin/flotilla", "timeout_ms": 10000}

Without `exec` the new process is forked like any worker, with it that program follows in it (docs/worker-upgrade.md).
On the boot path: what is only needed for an upgrade comes with the first one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable

from shared.errors import ConfigError, NotFoundError, StateError
from shared.records import Record
from shared.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from controller.backends import Backend
    from controller.vm import Vm
    from controller.vmm import Vmm

REQUEST: Final = "vm.worker-upgrade"
FIELDS: Final = ("id", "exec", "timeout_ms")
# Without timeout_ms. A process on a busy host takes its time to start, during which nobody waits.
READY_SECONDS, DONE_SECONDS = 30.0, 10.0
LEAST_MS, MOST_MS = 10, 600_000
# By kind of process, why it can't be replaced while it serves.
REASONS: Final = {
    "vcpu": "a vCPU process is a thread of execution in the controller's address space and runs no program of its own",
    "controller": "the controller is the VM; a local migration moves the guest to another one",
    "api": "the API process has no state: end it, and another one answers",
    "metrics": "the metrics exporter has no state: end it, and another one answers",
    "zygote": "the zygote serves no device: end it, and the next worker is forked from a new one",
    "janitor": "the janitor serves no device and is replaced when it ends",
    "migration_agent": "a migration agent lives for one migration",
}


class Wanted(Record):
    """`program`: a path, "" for this release's worker. `ready`: seconds until the new process has to be; `done`: for
    which the guest may wait."""

    id: str
    program: str
    ready: float = READY_SECONDS
    done: float = DONE_SECONDS


def parse(body: Any) -> Wanted:
    """Raises ConfigError that names the field."""
    if not isinstance(body, dict):
        raise ConfigError(f"{REQUEST}: the body is not an object")
    for field in body:
        if field not in FIELDS:
            raise ConfigError(f"{REQUEST}: unknown field {field}", f"known: {', '.join(FIELDS)}")
    name, path, ms = body.get("id"), body.get("exec"), body.get("timeout_ms")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{REQUEST}: id is missing", "a device's, as vm.info and vmm.fleet have it")
    if ms is None:
        return Wanted(name, _program(path))
    if type(ms) is not int or not LEAST_MS <= ms <= MOST_MS:
        raise ConfigError(f"{REQUEST}: timeout_ms: {ms!r} is no whole number from {LEAST_MS} to {MOST_MS}")
    return Wanted(name, _program(path), ms / 1000, ms / 1000)


def _program(path: Any) -> str:
    if path is None:
        return ""
    what = f"{REQUEST}: exec: {path}"
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise ConfigError(f"{REQUEST}: exec: {path!r} is no absolute path")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}") from error
    except ValueError as error:  # half of a surrogate pair
        raise ConfigError(f"{REQUEST}: exec: {path!r} is no file name") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{what} is no file")
    if not os.access(path, os.X_OK, effective_ids=True):
        raise ConfigError(f"{what} is not executable", "chmod +x, and look at the mount's options")
    return path


async def find(vmm: Vmm, vm: Vm, name: str) -> Backend:
    """The worker that `name` means. Raises NotFoundError, StateError for what is no worker of ours."""
    backend = vm.worker(name)
    if backend is not None:
        return backend
    if vm.has_device(name):
        raise StateError(
            f"{name}: its vhost-user back end is somebody else's", "replace it there; it is dialled again"
        )
    kinds = {row["device"]: row["kind"] for row in await vmm.describe_fleet(None, pss=False)}
    if name in kinds:
        raise StateError(f"{name} can't be upgraded: {REASONS.get(kinds[name], 'it serves no device')}")
    there = ", ".join(sorted(worker.name for worker in vm.workers))
    raise NotFoundError(f"{REQUEST}: id: there is no {name}", f"workers: {there}")


def worker_upgrade(vmm: Vmm) -> Callable[[Any], Awaitable[Any]]:
    """The handler of the request. Raises FlotillaError; the guest has its device all the same."""
    under_way: set[str] = set()

    async def handler(body: Any) -> dict[str, Any]:
        wanted = parse(body)
        vm = vmm.need_vm()
        backend = await find(vmm, vm, wanted.id)
        if backend.name in under_way:
            raise StateError(f"{wanted.id} is being upgraded already", "wait for that one's end")
        under_way.add(backend.name)
        try:
            async with vmm.change():
                _check_running(vmm, vm, wanted.id)
                await backend.wait_serving(wanted.ready)
                if backend.process is None:  # dead again before we had a turn
                    raise backend.absence()
                from controller.handover import Handover
                from controller.supervision import plain

                handover = Handover(vmm.reactor, vmm.fleet, backend, wanted.program, wanted.ready, wanted.done)
                return plain(await handover.run())
        finally:
            under_way.discard(backend.name)

    return handler


def _check_running(vmm: Vmm, vm: Vm, name: str) -> None:
    """What may have become of the VM while it was waited for its lock."""
    vmm.change()  # raises while a migration is in doubt
    if vmm.vm is not vm:
        raise StateError(f"{name}: its VM has ended")
    if vmm.state != "Running":
        raise StateError(f"{name} can't be upgraded: its VM's state is {vmm.state}", "resume it first")
