"""`vm.migration-estimate`: how a remote migration would go, from how fast the guest writes now.

The dirty logs are on for a second. What a guest has written after t seconds grows fast at first and then slowly, as
pages are written again; two looks give that curve, and the rounds of a migration are played on it for each speed of a
network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from controller.dirty import bitmap_for
from controller.migration.arguments import UNASKED, Bounds
from controller.migration.fixed_cost import FIRST_GUESS_MS
from controller.migration.migratable import DirtyPages, RemoteMigratable
from controller.migration.rounds import Next, Rounds
from shared.pages import PAGE_SIZE, Bitmap
from shared.reactor import Reactor, sleep

LOOKS: Final = (0.1, 1.0)  # seconds after the logs were switched on
GBITS: Final = (1, 10, 25)
TURN_S: Final = 0.001
MAX_ROUNDS: Final = 100


@dataclass(frozen=True, slots=True)
class Dirtying:
    """Bytes of different pages that were written in each look's time, and what RAM holds at all."""

    early: float
    late: float
    held: float

    def after(self, seconds: float) -> float:
        """Bytes of different pages written in so many seconds."""
        short, long = LOOKS
        if seconds <= short:
            return min(self.held, self.early * seconds / short)
        slope = max(0.0, self.late - self.early) / (long - short)
        return min(self.held, self.early + slope * (seconds - short))


async def sample(reactor: Reactor, vm: RemoteMigratable) -> Dirtying:
    """Look at a running guest for a second. Raises HostError when a device keeps no log."""
    parts, _ = vm.memory_parts()
    bitmap = bitmap_for((gpa + size for gpa, size, _, _ in parts), "estimate")
    log = vm.dirty_pages()
    try:
        return await _sample(reactor, log, bitmap)
    finally:
        try:
            await log.stop()  # also when whoever asked has gone: a guest with a log is slower
        finally:
            log.close()
            bitmap.close()


async def _sample(reactor: Reactor, log: DirtyPages, bitmap: Bitmap) -> Dirtying:
    log.mark_all(bitmap)
    held = bitmap.count() * PAGE_SIZE
    bitmap.clear()
    await log.start()
    log.harvest(bitmap)  # what happened before
    bitmap.clear()
    found = []
    waited = 0.0
    for look in LOOKS:
        await sleep(reactor, look - waited)
        waited = look
        log.harvest(bitmap)
        found.append(bitmap.count() * PAGE_SIZE)
    return Dirtying(found[0], found[1], held)


def forecast(
    dirtying: Dirtying, gbit: float, bounds: Bounds, fixed_ms: float = FIRST_GUESS_MS
) -> dict[str, Any]:
    """One network. `total_s` and `downtime_ms` are None when it would not come to an end, and `why` says why not."""
    speed = gbit * 1e9 / 8
    rounds = Rounds(bounds, fixed_ms)
    left, clock, step = dirtying.held, 0.0, Next.ROUND
    for _ in range(MAX_ROUNDS):
        seconds = left / speed + TURN_S
        clock += seconds
        left = dirtying.after(seconds)
        rounds.sent(round(speed), 1.0, TURN_S)
        rounds.found(round(left / PAGE_SIZE), seconds)
        step = rounds.next(clock, built=True)
        if step is not Next.ROUND:
            break
    fits = step is Next.PAUSE
    return {
        "gbit_per_s": gbit,
        "converges": fits,
        "rounds": rounds.number + 1,
        "total_s": round(clock + rounds.downtime_ms / 1e3, 3) if fits else None,
        "downtime_ms": round(rounds.downtime_ms, 1) if fits else None,
        "why": "" if fits else _why_not(rounds, speed, step),
    }


def _why_not(rounds: Rounds, speed: float, step: Next) -> str:
    bounds = rounds.bounds
    if step is Next.GIVE_UP and rounds.downtime_ms <= bounds.downtime_ms:
        return f"{speed / 1e6:.0f} MB/s carried: copying would take longer than {bounds.timeout_s} s"
    return (
        f"{rounds.dirty_rate / 1e6:.0f} MB/s are dirtied, {speed / 1e6:.0f} MB/s carried: the pause would not fall "
        f"below {rounds.downtime_ms:.0f} ms, {rounds.overhead_ms:.0f} of them whatever is copied"
    )


async def estimate(reactor: Reactor, vm: RemoteMigratable) -> dict[str, Any]:
    """The answer of vm.migration-estimate."""
    bounds = UNASKED
    found = await sample(reactor, vm)
    cost = vm.fixed_cost
    return {
        "ram_bytes_to_copy": round(found.held),
        "dirty_bytes_per_s": round(found.late / LOOKS[-1]),
        "dirty_bytes_in_100_ms": round(found.early),
        "bounds_downtime_ms": bounds.downtime_ms,
        "fixed_cost": cost.report(),
        "forecasts": [forecast(found, gbit, bounds, cost.total_ms) for gbit in GBITS],
    }
