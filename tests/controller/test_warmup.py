"""What the boot path imports, and what is imported once the guest runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from controller.warmup import PIECES

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), *(path for path in sys.path if path and not Path(path).is_relative_to(ROOT))]
# Each takes 3 to 60 ms to import, which is 3 to 60 ms until the guest's first instruction.
LATER = (
    "argparse", "asyncio", "contextlib", "dataclasses", "inspect", "json", "logging", "msgpack", "re", "shutil",
    "socket", "subprocess", "tempfile", "threading", "typing", "zmq",
)  # fmt: skip
SLICES = """
from controller import warmup
from shared.reactor import Reactor, gather

reactor = Reactor()
seen = []

def look():
    loaded = sum(name in sys.modules for name in warmup.PIECES)
    if not seen or loaded != seen[-1]:
        seen.append(loaded)
    if loaded < len(warmup.PIECES):
        reactor.call_soon(look)

look()
reactor.run_until(gather(reactor, warmup.warm_up(reactor), warmup.warm_up(reactor)), 60)
look()
print(seen)
"""


def run(code: str) -> str:
    """What it prints in an interpreter that starts as the launcher's does."""
    command = [sys.executable, "-IS", "-c", f"import sys; sys.path[:0] = {PATHS!r}\n{code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return set(run("import controller.main, controller.vmm; print(*sys.modules)").split())


@pytest.mark.parametrize("module", LATER)
def test_the_boot_path_does_not_import(loaded: set[str], module: str):
    assert "controller.vm" in loaded
    assert module not in loaded


def test_the_reactor_runs_between_the_pieces_of_the_warm_up():
    seen = [int(number) for number in run(SLICES).strip("[]").split(",")]
    assert (seen[0], seen[-1]) == (0, len(PIECES))
    # Two run side by side, and a piece may bring in others that come after it in the list.
    assert len(seen) > len(PIECES) // 2


def test_a_second_warm_up_waits_for_nothing():
    code = "from controller.warmup import warm_up\nfrom shared.reactor import Reactor\nr = Reactor()\n"
    code += "r.run_until(warm_up(r), 60)\nstep = warm_up(r)\n"
    code += "try:\n    step.send(None)\nexcept StopIteration:\n    print('at once')\n"
    assert run(code) == "at once"
