"""What went wrong with which process and what became of it: for the log, events, counters and `vmm.fleet`.

    lost(cause) ─▶ worker-lost         ended, disconnected, hung or refused; the successor is on its way
    restored()  ─▶ worker-restarted    with the stall: from the loss until somebody serves again
    quarantined() ─▶ worker-quarantined   no successor comes up; tried again for as long as the VM lives
    failed_request() ─▶ worker-request-failed   a request that killed worker after worker was failed alone
    upgraded() ─▶ worker-upgraded      another process took a running device over (controller/upgrade.py)
    not_upgraded() ─▶ worker-upgrade-failed   … could not, and the one before it serves

Who detects what is docs/fault-isolation.md's table. Here nothing is decided.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from shared import log
from shared.errors import ProtocolError, Timeout
from shared.records import Record, field
from shared.typed import Any

# So many losses within so many seconds, and a worker that serves is `degraded`.
OFTEN, RECENT_SECONDS = 3, 60.0
PF_EXITING = 0x4  # linux/sched.h; the ninth field of /proc/PID/stat


class Cause(StrEnum):
    """Why a process had to be replaced; each is a detection of its own."""

    ENDED = "ended"  # its pidfd says so: killed, or crashed
    DISCONNECTED = "disconnected"  # it lives, and has hung up on its device
    HUNG = "hung"  # it lives, and does nothing or does not answer
    REFUSED = "refused"  # it broke vhost-user's protocol or the control plane's


def cause_of(error: Exception | None) -> Cause:
    """Of a vhost-user connection that is gone."""
    if isinstance(error, ProtocolError):
        return Cause.REFUSED
    return Cause.HUNG if isinstance(error, Timeout) else Cause.DISCONNECTED


class Incident(Record, frozen=False):
    """One loss. `stall_ms`: until somebody served again, None as long as nobody does."""

    when: float  # CLOCK_MONOTONIC, seconds
    kind: str
    name: str
    pid: int
    cause: Cause
    reason: str
    stall_ms: float | None = None


class Change(Record, frozen=False):
    """An upgrade: from which process to which (0: it never started), and for how long the guest waited for it."""

    kind: str
    name: str
    old_pid: int
    new_pid: int = 0
    program: str = ""
    stall_ms: float = 0.0
    reason: str = ""  # why it failed


class Account(Record, frozen=False):
    """What one process and those before it have come to."""

    recent: deque[Incident] = field(default_factory=lambda: deque(maxlen=OFTEN * 8))
    since: float | None = None  # the loss that nobody has made good yet
    quarantine: str = ""  # why there is no worker
    program: str = ""  # what the worker is exec'd from; "": this release's own
    upgrades: int = 0
    failed_upgrades: int = 0
    losses: dict[Cause, int] = field(default_factory=lambda: dict.fromkeys(Cause, 0))
    quarantines: int = 0


Emit = Callable[[str, str, "dict[str, Any] | None"], None]


class Supervision:
    """`emit` is the event monitor's."""

    def __init__(self, emit: Emit = lambda _source, _event, _properties: None) -> None:
        self._emit = emit
        self.accounts: dict[tuple[str, str], Account] = {}

    def account(self, kind: str, name: str) -> Account:
        return self.accounts.setdefault((kind, name), Account())

    def lost(self, kind: str, name: str, pid: int, cause: Cause, reason: str, *, since: float | None = None) -> None:
        """A process that served is gone or is being ended. `since`: when it was last known to do its work."""
        incident = Incident(time.monotonic(), kind, name, pid, cause, reason)
        account = self.account(kind, name)
        account.recent.append(incident)
        account.losses[cause] += 1
        if account.since is None:
            account.since = incident.when if since is None else since
        log.warn(f"{kind} {name} (pid {pid}) is lost, {cause}: {reason}")
        self._emit("vmm", "worker-lost", self._properties(incident))

    def restored(self, kind: str, name: str, pid: int) -> None:
        """Somebody serves; says so only after a loss or a quarantine."""
        account = self.account(kind, name)
        if account.since is None and not account.quarantine:
            return
        now = time.monotonic()
        stall = round((now - (now if account.since is None else account.since)) * 1000, 3)
        unserved = Incident(now, kind, name, pid, Cause.REFUSED, account.quarantine)
        last = account.recent[-1] if account.recent else unserved
        last.stall_ms = stall
        account.since, account.quarantine = None, ""
        log.info(f"{kind} {name} is served again by pid {pid} after {stall:.1f} ms")
        self._emit("vmm", "worker-restarted", self._properties(last) | {"pid": pid})

    def quarantined(self, kind: str, name: str, reason: str) -> None:
        """No worker comes up. Told once, however often it is tried again for the same reason."""
        account = self.account(kind, name)
        if account.quarantine == reason:
            return
        account.quarantine = reason
        account.quarantines += 1
        cause = account.recent[-1].cause if account.recent else Cause.REFUSED
        log.error(f"{kind} {name} is quarantined: {reason}")
        incident = Incident(time.monotonic(), kind, name, 0, cause, reason)
        self._emit("vmm", "worker-quarantined", self._properties(incident))

    def failed_request(self, kind: str, name: str, count: int, what: str) -> None:
        """Requests that were failed to the guest because each had killed its worker time and again."""
        log.error(f"{kind} {name}: {count} requests killed their worker again and again and were failed: {what}")
        properties = {"name": name, "kind": kind, "requests": count, "reason": what}
        self._emit("vmm", "worker-request-failed", properties)

    def runs(self, kind: str, name: str, program: str) -> None:
        """What a worker is, from now on."""
        if program or (kind, name) in self.accounts:
            self.account(kind, name).program = program

    def upgraded(self, change: Change) -> None:
        account = self.account(change.kind, change.name)
        account.upgrades += 1
        by = change.program or "this release's worker"
        log.info(f"{change.kind} {change.name}: pid {change.new_pid}, {by}, has taken over from pid {change.old_pid} "
                 f"within {change.stall_ms:.1f} ms")  # fmt: skip
        self._emit("vmm", "worker-upgraded", plain(change))

    def not_upgraded(self, change: Change) -> None:
        self.account(change.kind, change.name).failed_upgrades += 1
        log.error(f"{change.kind} {change.name} was not upgraded, the guest waited {change.stall_ms:.1f} ms: "
                  f"{change.reason}")  # fmt: skip
        self._emit("vmm", "worker-upgrade-failed", plain(change))

    def often(self, kind: str, name: str, cause: Cause | None = None) -> int:
        """Losses within the last RECENT_SECONDS, of one cause or all."""
        account = self.accounts.get((kind, name))
        if account is None:
            return 0
        then = time.monotonic() - RECENT_SECONDS
        return sum(i.when > then and (cause is None or i.cause is cause) for i in account.recent)

    def columns(self, kind: str, name: str) -> dict[str, Any]:
        """Of a row of `vmm.fleet`."""
        account = self.accounts.get((kind, name))
        last = account.recent[-1] if account is not None and account.recent else None
        quarantine = account.quarantine if account is not None else ""
        return {
            "last_cause": str(last.cause) if last is not None else None,
            "last_reason": quarantine or (last.reason if last is not None else None),
            "last_stall_ms": last.stall_ms if last is not None else None,
            "upgrades": account.upgrades if account is not None else 0,
            "failed_upgrades": account.failed_upgrades if account is not None else 0,
            "program": account.program or None if account is not None else None,
        }

    def counts(self, kind: str, name: str) -> tuple[dict[str, int], int]:
        """Losses by cause, every cause told, and quarantines; since the VMM's start."""
        account = self.accounts.get((kind, name)) or Account()
        return {str(cause): count for cause, count in account.losses.items()}, account.quarantines

    @staticmethod
    def _properties(incident: Incident) -> dict[str, Any]:
        return {
            "name": incident.name,
            "kind": incident.kind,
            "pid": incident.pid,
            "cause": str(incident.cause),
            "reason": incident.reason,
            "stall_ms": incident.stall_ms,
        }


def plain(change: Change) -> dict[str, Any]:
    """Of an event, and of the answer to whoever asked for it."""
    return {name: getattr(change, name) for name in Change._fields}


def stat_fields(path: str) -> list[bytes]:
    """The fields of proc_pid_stat(5) from the third on, which is the first behind the name; none when it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        text = os.read(fd, 1024)
    except OSError:  # ESRCH
        return []
    finally:
        os.close(fd)
    return text[text.rindex(b")") + 2 :].split()


def process_state(pid: int, thread: int = 0) -> tuple[str, bool]:
    """The letter of proc_pid_stat(5) (R S D T t Z X) and whether it is ending; ("X", True) when it is gone."""
    fields = stat_fields(f"/proc/{pid}/task/{thread}/stat" if thread else f"/proc/{pid}/stat")
    return (fields[0].decode(), bool(int(fields[6]) & PF_EXITING)) if fields else ("X", True)


def thread_states(pid: int, but: int = 0) -> str:
    """The letters of all threads, but for one."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return ""
    return "".join(process_state(pid, int(thread))[0] for thread in threads if int(thread) != but)


def thread_places(pid: int) -> str:
    """For a log line: thread id, letter and the kernel's function that it waits in, thread by thread."""
    places: list[str] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/wchan") as file:
                places.append(f"{thread} {process_state(pid, int(thread))[0]} {file.read()}")
    except OSError:
        pass  # it is ending: what is known is enough
    return ", ".join(places)
