"""What no round makes shorter of a VM's downtime: pause, save, load and start, as this VM was last seen to take them.

Every pause, save, load and start of a VM tells its record, whatever it is for (vm.pause, an arrival, an attempt to
leave that failed); a step that has not been seen counts as guessed. Load and start happen on the other host: what is
known of them is how long they took here when the VM arrived, or there when an attempt came as far as PREPARED.
"""

from __future__ import annotations

import time

from shared.typed import Any, Final

# Milliseconds on a development machine.
GUESSES: Final = {"pause": 12.0, "save": 8.0, "load": 12.0, "start": 8.0}
FIRST_GUESS_MS: Final = sum(GUESSES.values())


class FixedCost:
    """Of one VM, in milliseconds."""

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}

    def took(self, step: str, milliseconds: float) -> None:
        assert step in GUESSES
        self._measured[step] = milliseconds

    def took_since(self, step: str, began: float) -> None:
        """`began`: a reading of time.monotonic()."""
        self.took(step, (time.monotonic() - began) * 1e3)

    def heard(self, step: str, milliseconds: object) -> None:
        """From a peer: what is no duration is passed over."""
        if type(milliseconds) in (int, float) and 0 <= milliseconds < float("inf"):  # type: ignore[operator]
            self.took(step, float(milliseconds))  # type: ignore[arg-type]

    @property
    def total_ms(self) -> float:
        return sum((GUESSES | self._measured).values())

    def report(self) -> dict[str, Any]:
        """For vm.migration-estimate: `guessed` names the steps that have not been seen yet."""
        return {
            "total_ms": round(self.total_ms, 3),
            "measured_ms": {step: round(took, 3) for step, took in self._measured.items()},
            "guessed": [step for step in GUESSES if step not in self._measured],
        }
