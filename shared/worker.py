"""What every worker process has in common: how it is told its task, its contract, and its main loop.

    zygote forks ──▶ main(start) of the worker's package ──▶ serve(start, worker, reactor) until `shutdown`

The contract (one parametrised suite in tests/test_worker_contract.py holds every worker to it):

    hello      -> {"kind", "pid", "version", "contract"}: whose states it saves and of which version; CONTRACT
    quiesce    -> {"bases": {ring: next avail index}}: after the answer no write to guest memory, no use of a
    host resource,
                  no notification, until resume
    save       -> {"kind", "version", "state"}; only while quiesced
    load       takes what save gave, of this version or an older one that can be upgraded
               (shared/state_versions.py); refuses another kind and any other version
    resume     go on (or begin) from the present state
    stats      -> counters, name -> int
    heartbeat  -> {"epoch": n, "stats": as above}: the epoch rises from one to the next while every native thread takes
                  its turns or is held by the kernel; where there is no native loop it is the main loop's pulse

A worker that is started on standby is quiesced from its first moment, beside one that serves (docs/worker-upgrade.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from shared import log
from shared.errors import ProtocolError
from shared.messages import Verb
from shared.reactor import Reactor
from shared.rehearsal import NOTHING, Rehearsal
from shared.sandbox import NONE, Sandbox
from shared.state_versions import StateKind

if TYPE_CHECKING:
    from shared.control import Handler

# Of this contract: what docs/worker-upgrade.md says, and what `hello` answers.
CONTRACT: Final = 1


@dataclass(frozen=True, slots=True)
class Start:
    """A worker's task, as the zygote hands it over."""

    kind: str  # import name of the package, for example "blk_worker"
    name: str  # device id, for example "_disk0"; the process's comm
    spec: Mapping[str, Any]  # settings, per kind
    fds: Mapping[str, int]  # named descriptors that came with the request; now this process's own
    endpoint: str  # zmq endpoint to bind for the control plane
    sandbox: Sandbox = NONE
    pid: int = field(default_factory=os.getpid)  # as the controller knows it
    standby: bool = False  # do nothing until `resume`: another process serves the device


class Worker(Protocol):
    states: StateKind

    def quiesce(self) -> dict[str, Any]: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def resume(self) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def epoch(self) -> int: ...
    def fault(self, what: str, value: int, options: Mapping[str, Any] = NOTHING) -> None: ...


def check_state(worker: Worker, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state inside a `load` request, as the worker's load() takes it. Raises ProtocolError for another kind and
    for a version that can't be read."""
    if saved["kind"] != worker.states.name:
        raise ProtocolError(f"state of kind {saved['kind']!r} given to a {worker.states.name}")
    return worker.states.upgrade(saved["version"], saved["state"])


def serve(start: Start, worker: Worker, reactor: Reactor, more: Mapping[str, Handler] | None = None) -> int:
    """Bind the control endpoint and run until `shutdown`. Returns the exit code. `more`: verbs of this kind alone.

    Nothing may be imported or opened any more, and once the hello has been answered no forbidden call be made.
    """
    from shared.control import Channel  # zmq only after the fork

    with start.sandbox.leave_files(start.endpoint) as endpoint:
        channel = Channel(reactor, endpoint, bind=True)
    identity = {"kind": worker.states.name, "version": worker.states.version}
    if start.standby:
        worker.quiesce()

    def saved() -> dict[str, Any]:
        return {**identity, "state": worker.save()}

    def hello(_: dict[str, Any]) -> dict[str, Any]:
        # zmq has accepted the only connection that it ever will.
        start.sandbox.seal()
        return {**identity, "pid": start.pid, "contract": CONTRACT}

    def do(action: Callable[[dict[str, Any]], None]) -> Handler:
        def handler(arguments: dict[str, Any]) -> dict[str, Any]:
            action(arguments)
            return {}

        return handler

    channel.handlers = {
        Verb.HELLO: hello,
        Verb.HEARTBEAT: lambda _: {"epoch": worker.epoch(), "stats": dict(worker.stats())},
        Verb.QUIESCE: lambda _: worker.quiesce(),
        Verb.SAVE: lambda _: saved(),
        Verb.LOAD: do(lambda args: worker.load(check_state(worker, args))),
        Verb.RESUME: do(lambda _: worker.resume()),
        Verb.STATS: lambda _: dict(worker.stats()),
        Verb.FAULT: Rehearsal(reactor, channel, worker.fault),
        Verb.LOG_LEVEL: do(lambda args: log.set_level(args["level"])),
        Verb.SHUTDOWN: do(lambda _: reactor.call_soon(reactor.stop)),
        **(more or {}),
    }
    try:
        return reactor.run()
    finally:
        channel.close()

