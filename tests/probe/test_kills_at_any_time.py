"""Processes of a VM are killed at random while it boots, pauses, gets a card, reboots: the guest comes through each.

The killer takes any descendant of the controller, at random intervals by a seed; what a user asks for meanwhile may be
refused with a reason, and is asked again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pytest

from tests.leaks import descendants
from tests.netns import ip, network_namespace
from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe

PATIENCE = 120.0
INTERVALS = (0.05, 0.6)  # seconds between two kills
AT_ONCE = (0.01, 0.05)  # a boot takes little longer
KILLS = 5  # at least


class Killer:
    """Kills in a thread of its own until the block ends, the first `at_once` in quick succession. `kills`: how many."""

    def __init__(self, pid: int, seed: int, at_once: int = 0) -> None:
        self.kills = 0
        self._pid, self._at_once = pid, at_once
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def rounds(self, least: int) -> Iterator[None]:
        """`least` turns of whatever is done meanwhile, and more until KILLS kills have fallen."""
        end = time.monotonic() + PATIENCE
        while least > 0 or self.kills < KILLS:
            assert least > 0 or time.monotonic() < end, f"{self.kills} kills within {PATIENCE} s"
            least -= 1
            yield

    def _pause(self) -> float:
        return self._random.uniform(*(AT_ONCE if self.kills < self._at_once else INTERVALS))

    def _run(self) -> None:
        while not self._over.wait(self._pause()):
            try:
                os.kill(self._random.choice(sorted(descendants(self._pid))), signal.SIGKILL)
            except (ProcessLookupError, IndexError, FileNotFoundError):
                continue
            self.kills += 1


def insist(vmm: Vmm, *words: str) -> None:
    """Ask until it is done: by us, or by a request whose answer was lost with the process that carried it."""
    done = {"pause": "Paused", "resume": "Running"}

    def state() -> str:
        answer = vmm.remote("info")
        return str(json.loads(answer.stdout)["state"]) if answer.returncode == 0 else ""

    def asked() -> bool:
        """With all the time that a pause may take while its workers are being killed."""
        return vmm.remote(*words, timeout=PATIENCE).returncode == 0

    poll(lambda: asked() or state() == done.get(words[0], "no state says it"), PATIENCE)


@contextmanager
def guest(folder: Path, booted: bool = True) -> Iterator[Vmm]:
    """A guest that verifies its disk all the time. At the end it still does, and nothing was ever wrong."""
    disk = folder / "disk.raw"
    disk.write_bytes(bytes(16 << 20))
    with Vmm.guest(folder, "mode=blkload depth=8 lost_irq_ticks=100", "--disk", f"path={disk}") as vmm:
        if booted:
            vmm.expect("blk ok ")
            vmm.wait_api()
        yield vmm
        vmm.more("blk ok ", PATIENCE)
        assert b"BAD" not in vmm.output and vmm.process.poll() is None


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_while_it_boots(tmp_path: Path, seed: int) -> None:
    struck = False
    while not struck:  # a boot that nobody was killed in shows nothing
        with guest(tmp_path, booted=False) as vmm, Killer(vmm.process.pid, seed, at_once=KILLS) as killer:
            vmm.expect("blk ok ", PATIENCE)
            struck = killer.kills > 0
            poll(lambda killer=killer: killer.kills >= KILLS, PATIENCE)


@pytest.mark.timeout(400)
def test_killed_while_it_pauses_and_resumes(tmp_path: Path) -> None:
    with guest(tmp_path) as vmm, Killer(vmm.process.pid, 4) as killer:
        for _ in killer.rounds(5):
            insist(vmm, "pause")
            insist(vmm, "resume")


@pytest.mark.timeout(400)
def test_killed_while_it_reboots(tmp_path: Path) -> None:
    with guest(tmp_path) as vmm, Killer(vmm.process.pid, 5) as killer:
        for _ in killer.rounds(3):
            insist(vmm, "reboot")
            vmm.more("blk ok ", PATIENCE)


@pytest.mark.timeout(400)
def test_killed_while_a_card_is_added(tmp_path: Path) -> None:
    """The answer may be lost, and the card be there: it is what counts."""
    with network_namespace(), guest(tmp_path) as vmm:
        with Killer(vmm.process.pid, 6) as killer:
            for number in range(3):
                name = f"card{number}"
                poll(lambda name=name: vmm.remote("add-net", f"id={name}").returncode == 0
                     or name in vmm.remote("info").stdout, PATIENCE)  # fmt: skip
            poll(lambda: killer.kills >= KILLS, PATIENCE)
        poll(lambda: vmm.remote("ping").returncode == 0, PATIENCE)
        poll(lambda: [vmm.fleet().get(f"card{n}", {}).get("state") for n in range(3)] == ["running"] * 3, PATIENCE)
        assert ip("-brief", "link").count("vmtap") == 3
