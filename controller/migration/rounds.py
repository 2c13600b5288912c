"""When to stop copying and pause: the arithmetic of precopy, without I/O.

A round sends what the one before has left dirty. Pausing now would cost

    downtime = what is dirty / throughput + fixed        fixed: pause, state, two turns of the network, load, start

and the guest is paused once that is within the bound, and the last round has not made it much smaller any more: another
round of a few milliseconds that halves the downtime is worth it. Rounds change nothing about the fixed part.

A bound that nobody asked for keeps no guest once rounds do not get shorter any more. Where the fixed part takes most of
it (a slow host, a network with long turns), copying may take as long again; where the guest dirties what the network
carries, a hundredth of the time so far (docs/adr/0007-default-downtime.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from controller.migration.arguments import Bounds, Strategy
from controller.migration.fixed_cost import FIRST_GUESS_MS
from shared.pages import PAGE_SIZE

TURNS = 3  # of the network within the downtime: END_OF_RAM, PREPARED and COMMIT, STARTED
SHRINKS = 0.7  # a round that leaves less than this share of what it found is worth another one
SMALL_MS = 5.0  # of copying: not worth a round
ENOUGH_BYTES = 1 << 20  # a round of less is no measure of what the network carries: most of it is the turn
GUESS = 100e6  # bytes per second, before the first round that says something
UNASKED_SHARE, UNASKED_MOST_MS = 0.01, 5000.0  # of the time so far, for copying within a downtime that nobody bounds
FRESH_SECONDS = 5.0  # a flush of the disks that is older than this is repeated before the pause


class Next(StrEnum):
    ROUND = "another round"
    PAUSE = "pause"
    GIVE_UP = "give up"


@dataclass(slots=True)
class Rounds:
    """Fed after each round, asked before the next. Bytes and seconds."""

    bounds: Bounds
    fixed_ms: float = FIRST_GUESS_MS  # of pause, save, load and start (fixed_cost.py)
    turn_s: float = 0.0  # the network's shortest turn so far
    dirty_rate: float = 0.0
    number: int = 0
    remaining: int = 0
    _before: int = 0
    _large: float = GUESS  # bytes per second of the last round that says something
    _small: float = 0.0  # and of a smaller one after it

    def sent(self, count: int, seconds: float, turn_s: float) -> None:
        """A round of `count` bytes of the stream, the last of which took a turn of the network to be confirmed."""
        self.number += 1
        self.turn_s = min(turn_s, self.turn_s) if self.turn_s else turn_s
        rate = count / max(1e-6, seconds)
        self._large, self._small = (rate, 0.0) if count >= ENOUGH_BYTES else (self._large, rate)

    def found(self, pages: int, seconds: float) -> None:
        """So many pages are dirty `seconds` after the last look."""
        self._before, self.remaining = self.remaining, pages * PAGE_SIZE
        if seconds > 0:
            self.dirty_rate = self.remaining / seconds

    @property
    def throughput(self) -> float:
        """Bytes per second for what is left. Little takes no longer than the last round that was as little: the last
        large one may have had a bad moment, and if all rounds are small now there will be no other."""
        return max(self._large, self._small) if self.remaining < ENOUGH_BYTES else self._large

    @property
    def copy_ms(self) -> float:
        return self.remaining / self.throughput * 1e3

    @property
    def overhead_ms(self) -> float:
        """Of the downtime, what no round makes shorter."""
        return self.fixed_ms + TURNS * self.turn_s * 1e3

    @property
    def downtime_ms(self) -> float:
        """If the guest were paused now."""
        return self.copy_ms + self.overhead_ms

    def copy_bound_ms(self, elapsed_s: float) -> float:
        left = self.bounds.downtime_ms - self.overhead_ms
        if self.bounds.strict or self.shrinks:
            return left
        return max(left, self.overhead_ms, min(UNASKED_SHARE * elapsed_s * 1e3, UNASKED_MOST_MS))

    @property
    def shrinks(self) -> bool:
        """Another round is likely to leave less than this one."""
        return self.number < 2 or self.remaining < SHRINKS * self._before

    @property
    def converges(self) -> bool:
        return self.dirty_rate < self.throughput

    @property
    def time_left_s(self) -> float | None:
        """Until the guest runs there; None when it does not look like that. A geometric series of rounds."""
        share = self.dirty_rate / self.throughput
        if share >= 1:
            return None
        return self.remaining / self.throughput / (1 - share) + self.downtime_ms / 1e3

    def overdue(self, elapsed_s: float) -> bool:
        """The time is up, and the guest goes whatever the pause takes."""
        return elapsed_s >= self.bounds.timeout_s and self.bounds.strategy is Strategy.IGNORE

    def next(self, elapsed_s: float, built: bool) -> Next:
        """`built`: the destination is ready. Nothing is paused before."""
        if elapsed_s >= self.bounds.timeout_s:
            if self.bounds.strategy is Strategy.CANCEL:
                return Next.GIVE_UP
            return Next.PAUSE if built else Next.ROUND
        if not built or self.copy_ms > self.copy_bound_ms(elapsed_s):
            return Next.ROUND
        return Next.ROUND if self.shrinks and self.copy_ms > SMALL_MS else Next.PAUSE


@dataclass(slots=True)
class Flushes:
    """Of the disks, while the guest runs; times are readings of one clock, in seconds.

    The pause flushes them, too, and the guest stands still for what was written since the flush before: that one has to
    be recent. But it takes its time, in which RAM is dirtied, so a round follows it. When that leaves little enough,
    the guest is paused however long the round took: the one after another flush would take as long. When it takes more
    rounds than that, the next flush may be twice as old, or disks and RAM could take turns for ever.
    """

    fresh_s: float = FRESH_SECONDS
    _at: float | None = None
    _just: bool = False  # no round has left too much since

    def made(self, now: float) -> None:
        if self._at is not None:
            self.fresh_s *= 2
        self._at, self._just = now, True

    def will_do(self, step: Next, now: float) -> bool:
        """After each round: whether the guest can be paused without another flush."""
        self._just = self._just and step is Next.PAUSE
        return step is Next.PAUSE and self._at is not None and (self._just or now - self._at < self.fresh_s)
