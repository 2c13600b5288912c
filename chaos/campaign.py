"""One campaign: strike, wait until the victim serves again, look at the guest's data, and so on.

    ┌──▶ due ──vmm.fault-inject──▶ struck ──(replaced, or over)──▶ recovered ──every n-th──▶ verified ──┐
    └───────────────────────────────────────────────────────────────────────────────────────────────────┘
         not within RECOVERY_SECONDS: unrecovered      data lost: the end      no VMM: the end      else: failed

The guest that is verified must write, or there is nothing to verify: before the first strike, and before each look.

The stall is what somebody sees who asks: from the answer of the injection to the first fleet in which the victim is
another process that serves (or, of what ends by itself, to that end). It includes the asking, some milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from chaos.client import Api, Gone, Refused
from chaos.schedule import Injection
from chaos.verify import BegunAnew, Image, Lost, run_command
from shared.errors import FlotillaError
from shared.faults import DEVICES, Kind, Process

# A starved host needs long to start an interpreter; somebody who watches a campaign sees earlier that it hangs.
RECOVERY_SECONDS: Final = 180.0
GONE_SECONDS: Final = 120.0
# Until the guest has written something more. It ends with the first write, so only a guest that is stuck takes it all.
WRITE_SECONDS: Final = 180.0
PAUSE_ATTEMPTS: Final = 20
POLL_SECONDS: Final = 0.01
WRITE_POLL_SECONDS: Final = 0.1  # it reads the whole image
ZYGOTE_PATIENCE: Final = 0.5
# The victim's end, and a successor, are what it takes; of the others supervision may or may not make it one.
DEADLY: Final = frozenset({Kind.KILL, Kind.CORRUPT, Kind.OUT_OF_MEMORY})
STANDING: Final = frozenset({Kind.STOP, Kind.HANG})
SERVING: Final = frozenset({"running", "degraded", "guest", "parked", "exit", "idle"})


class Outcome(StrEnum):
    OK = "ok"
    LOST = "data lost"
    UNRECOVERED = "not recovered"
    ENDED = "the VMM has ended"
    FAILED = "the campaign failed"
    INTERRUPTED = "interrupted"


class Ended(FlotillaError):
    """No VMM any more."""


class Unrecovered(FlotillaError):
    """A process that was struck did not come back, or the guest does nothing any more."""


@dataclass(slots=True)
class Struck:
    """One injection and what became of it. `stall_ms`: None where nothing stood still."""

    number: int
    process: str
    kind: Process
    fault: Kind
    at_s: float
    pid: int
    recovered: bool = False
    stall_ms: float | None = None


@dataclass(slots=True)
class Result:
    struck: list[Struck] = field(default_factory=list)
    outcome: Outcome = Outcome.OK
    why: str = ""
    verifications: int = 0
    lost: Process | None = None  # the kind that was struck last before data was found lost

    def rows(self) -> list[dict[str, Any]]:
        """Per process kind: injected, recovered, stalls in ms (None: there were none), lost."""
        rows = []
        for kind in Process:
            hits = [each for each in self.struck if each.kind is kind]
            stalls = [each.stall_ms for each in hits if each.stall_ms is not None]
            if hits:
                rows.append({
                    "process": str(kind), "injected": len(hits), "recovered": sum(each.recovered for each in hits),
                    "median_stall_ms": round(statistics.median(stalls), 1) if stalls else None,
                    "worst_stall_ms": round(max(stalls), 1) if stalls else None, "lost": int(self.lost is kind),
                })  # fmt: skip
        return rows


@dataclass(frozen=True, slots=True)
class Checks:
    """How the guest's data is verified, after each `every` injections and at the end."""

    images: tuple[Image, ...] = ()
    commands: tuple[str, ...] = ()
    every: int = 10


class Campaign:
    """`tell` hears one line per event. Whatever ends it after the first strike, run() gives what there is to tell.

    Raises FlotillaError when it can't begin: faults may not be injected, say.
    """

    def __init__(self, api: Api, plan: Sequence[Injection], checks: Checks, tell: Callable[[str], None]) -> None:
        self._api = api
        self._plan = plan
        self._checks = checks
        self._tell = tell
        self.result = Result()

    def run(self) -> Result:
        result = self.result
        try:
            if silence := self._await_writes():
                raise silence
            began = time.monotonic()
            for number, injection in enumerate(self._plan):
                time.sleep(max(0.0, began + injection.at_s - time.monotonic()))
                self._one(number, injection, began)
                if (number + 1) % self._checks.every == 0 or number + 1 == len(self._plan):
                    self._verify()
            if not self._plan:
                self._verify()
        except Lost as error:
            result.outcome, result.why = Outcome.LOST, str(error)
            result.lost = result.struck[-1].kind if result.struck else None
        except (Unrecovered, BegunAnew) as error:
            result.outcome, result.why = Outcome.UNRECOVERED, str(error)
        except (Ended, Gone) as error:
            result.outcome, result.why = Outcome.ENDED, str(error)
        except FlotillaError as error:
            if not result.struck:
                raise  # it has not begun
            result.outcome, result.why = Outcome.FAILED, str(error)
        except KeyboardInterrupt:
            result.outcome = Outcome.INTERRUPTED
        return result

    # One injection --------------------------------------------------------------------------------------------------

    def _one(self, number: int, injection: Injection, began: float) -> None:
        row = self._victim(injection)
        body = {"process": row["device"], "fault": str(injection.kind), **injection.fields}
        try:
            answer = self._patiently(lambda: self._api.put("vmm.fault-inject", body))
        except Refused as error:
            if not self.result.struck:
                raise  # faults may not be injected at all
            self._tell(f"{number}: {injection.kind} of {row['device']} was refused: {error}")
            return
        now = time.monotonic()
        struck = Struck(number, row["device"], injection.process, injection.kind, round(now - began, 3), answer["pid"])
        self.result.struck.append(struck)
        self._recover(struck, now, injection.fields.get("duration_ms", 0) / 1e3)
        stall = "" if struck.stall_ms is None else f", back after {struck.stall_ms:.0f} ms"
        self._tell(f"{number}: {struck.fault} of {struck.process} (pid {struck.pid}){stall}")

    def _victim(self, injection: Injection) -> dict[str, Any]:
        """The row of who is to be struck: of those that serve, so that it is a strike at all."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            rows = [row for row in self._fleet() if row["kind"] == injection.process and _serves(row)]
            if rows:
                return rows[injection.index % len(rows)]
            if time.monotonic() > deadline:
                raise Unrecovered(f"no {injection.process} process serves for {RECOVERY_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _recover(self, struck: Struck, since: float, duration: float) -> None:
        deadline = since + RECOVERY_SECONDS
        forked = struck.kind is not Process.ZYGOTE
        while True:
            row = next((row for row in self._fleet() if row["device"] == struck.process and _serves(row)), None)
            now = time.monotonic()
            replaced = row is not None and row["pid"] != struck.pid
            over = struck.fault not in DEADLY and row is not None and now >= since + duration
            if replaced or over:
                struck.recovered = True
                if struck.fault in DEADLY or struck.fault in STANDING:
                    struck.stall_ms = (now - since) * 1e3
                return
            if not forked and struck.fault in DEADLY and now > since + ZYGOTE_PATIENCE:
                forked = self._make_fork()
            if now > deadline:
                why = f"{struck.process} (pid {struck.pid}) did not come back from {struck.fault}"
                raise Unrecovered(f"{why} within {RECOVERY_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _make_fork(self) -> bool:
        """A zygote is started again when it is needed: make it so, by the death of a worker."""
        workers = [row for row in self._fleet() if row["kind"] in DEVICES and _serves(row)]
        name = min(workers, key=lambda row: row["kind"] != Process.CONSOLE)["device"] if workers else ""
        try:
            self._patiently(lambda: self._api.put("vmm.fault-inject", {"process": name, "fault": "kill"}))
        except Refused:  # it has just gone
            return False
        return True

    # Asking ---------------------------------------------------------------------------------------------------------

    def _fleet(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._patiently(lambda: self._api.get("vmm.fleet"))
        return rows

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """An API process that was struck comes back. Raises Ended when it does not."""
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            try:
                return ask()
            except Gone as error:
                if time.monotonic() > deadline:
                    raise Ended(f"no VMM answers at {self._api.path}: {error}") from error
                time.sleep(POLL_SECONDS)

    # Verifying ------------------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        checks = self._checks
        if checks.images:
            silence = self._await_writes()
            self._pause()
            try:
                for image in checks.images:
                    image.look()
            except BaseException:
                with suppress(FlotillaError):  # what was found says more than why the guest does not go on
                    self._resume()
                raise
            self._resume()
            if silence is not None:
                raise silence
        for command in checks.commands:
            run_command(command)
        self.result.verifications += bool(checks.images or checks.commands)

    def _await_writes(self) -> Unrecovered | None:
        """One to each image, from now on; the error that says to which there are none."""
        for image in self._checks.images:
            image.note()
        deadline = time.monotonic() + WRITE_SECONDS
        for image in self._checks.images:
            while not image.wrote():
                if time.monotonic() > deadline:
                    more = " any more" if self.result.struck else ""
                    why = f"nothing new is there after {WRITE_SECONDS:.0f} s"
                    return Unrecovered(f"the guest writes nothing to {image.path}{more}: {why}")
                time.sleep(WRITE_POLL_SECONDS)
        return None

    def _resume(self) -> None:
        self._patiently(lambda: self._api.put("vm.resume"))

    def _pause(self) -> None:
        """What has just come back may refuse it for a moment."""
        for attempt in range(PAUSE_ATTEMPTS):
            try:
                self._patiently(lambda: self._api.put("vm.pause"))
                return
            except Refused as error:
                if attempt + 1 == PAUSE_ATTEMPTS:
                    raise Unrecovered(f"the VM can't be paused for a look at its data: {error}") from error
                time.sleep(POLL_SECONDS * (attempt + 1))


def _serves(row: dict[str, Any]) -> bool:
    return bool(row["pid"]) and (row["kind"] == Process.VCPU or row["state"] in SERVING)
