"""The smallest worker: counts, and keeps the contract. What tests fork through the real zygote."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from shared.errors import HostError
from shared.reactor import Reactor
from shared.rehearsal import NOTHING, stand_still
from shared.state_versions import State, StateKind
from shared.worker import Start, serve


def number_from_text(state: State) -> State:
    return {"number": int(state["number"])}


def number_to_count(state: State) -> State:
    return {"count": state["number"]}


class Toy:
    """Of its states version 1 is forgotten, 2 was {"number": "5"}, 3 was {"number": 5}, 4 is {"count": 5}."""

    states = StateKind("toy", (number_from_text, number_to_count), oldest=2)

    def __init__(self, count: int) -> None:
        self.count = count
        self.pulse, self.moves, self.honest, self.willing = 0, True, True, True

    def quiesce(self) -> dict[str, Any]:
        return {"bases": {}}

    def save(self) -> dict[str, Any]:
        return {"count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def resume(self) -> None:
        if not self.willing:
            raise HostError("not any more")
        self.count += 1

    def stats(self) -> dict[str, int]:
        return {"count": self.count if self.honest else "many"}  # type: ignore[dict-item]

    def epoch(self) -> int:
        self.pulse += self.moves
        return self.pulse

    def fault(self, what: str, value: int, options: Mapping[str, Any] = NOTHING) -> None:
        """`bug`; `sleep`: the main thread never answers again; `stall`: it answers and its epoch stands still;
        `nonsense`: a heartbeat that is none; `garbage`: an answer that is no message; `ask`: requests instead of
        answers; `lie`: counters that are none; `refuse`: it does not resume; else a new count."""
        if what == "bug":
            raise ZeroDivisionError("a bug in a handler")
        if what == "sleep":
            time.sleep(1e6)
        if what == "nonsense":
            self.pulse, self.moves = 1.5, False  # type: ignore[assignment]
        if what == "garbage":
            from shared import messages

            messages.encode = lambda message: b"\xc1"
        if what == "ask":
            from shared import messages

            request = messages.encode({"id": 1, "verb": "hello", "args": {}})
            messages.encode = lambda message: request
        self.moves, self.honest, self.willing = what != "stall", what != "lie", what != "refuse"
        self.count = value


def main(start: Start) -> int:
    if start.spec.get("refuse"):
        return 3
    if start.spec.get("lacks"):
        raise HostError(f"this host has no {start.spec['lacks']}")
    if start.spec.get("hang"):
        stand_still(0)
    return serve(start, Toy(start.spec.get("count", 0)), Reactor())
