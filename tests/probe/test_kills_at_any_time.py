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
from pathlib import Path
from types import TracebackType

import pytest

from tests.netns import ip, network_namespace
from tests.vmm import Vmm, poll

pytestmark = pytest.mark.probe

PATIENCE = 120.0
INTERVALS = (0.05, 0.6)  # seconds between two kills


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:  # it has ended
            continue
        for child in map(int, children):
            found += [child, *(descendants(child) if Path(f"/proc/{child}").exists() else [])]
    return found


class Killer:
    """Kills in a thread of its own until the block ends. `kills`: how many."""

    def __init__(self, pid: int, seed: int) -> None:
        self.kills = 0
        self._pid = pid
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._random.uniform(*INTERVALS)):
            try:
                os.kill(self._random.choice(descendants(self._pid)), signal.SIGKILL)
            except (ProcessLookupError, IndexError, FileNotFoundError):
                continue
            self.kills += 1


def insist(vmm: Vmm, *words: str) -> None:
    """Ask until it is done: by us, or by a request whose answer was lost with the process that carried it."""
    done = {"pause": "Paused", "resume": "Running"}

    def state() -> str:
        answer = vmm.remote("info")
        return str(json.loads(answer.stdout)["state"]) if answer.returncode == 0 else ""

    poll(lambda: vmm.remote(*words).returncode == 0 or state() == done.get(words[0], "no state says it"), PATIENCE)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(16 << 20))
    return path


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_while_it_boots(tmp_path: Path, disk: Path, seed: int) -> None:
    with Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}") as vmm:
        with Killer(vmm.process.pid, seed) as killer:
            vmm.expect("blk ok ", PATIENCE)
            poll(lambda: killer.kills >= 5, PATIENCE)
        vmm.more("blk ok ", PATIENCE)
        assert b"BAD" not in vmm.output and vmm.process.poll() is None


@pytest.mark.timeout(400)
def test_killed_while_it_pauses_and_resumes(tmp_path: Path, disk: Path) -> None:
    with Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        with Killer(vmm.process.pid, 4) as killer:
            for _ in range(5):
                insist(vmm, "pause")
                insist(vmm, "resume")
            poll(lambda: killer.kills >= 5, PATIENCE)
        vmm.more("blk ok ", PATIENCE)
        assert b"BAD" not in vmm.output and vmm.process.poll() is None


@pytest.mark.timeout(400)
def test_killed_while_it_reboots(tmp_path: Path, disk: Path) -> None:
    with Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        with Killer(vmm.process.pid, 5) as killer:
            for _ in range(3):
                insist(vmm, "reboot")
                vmm.more("blk ok ", PATIENCE)
            poll(lambda: killer.kills >= 5, PATIENCE)
        vmm.more("blk ok ", PATIENCE)
        assert b"BAD" not in vmm.output and vmm.process.poll() is None


@pytest.mark.timeout(400)
def test_killed_while_a_card_is_added(tmp_path: Path, disk: Path) -> None:
    """The answer may be lost, and the card be there: it is what counts."""
    with network_namespace(), Vmm.guest(tmp_path, "mode=blkload depth=8", "--disk", f"path={disk}") as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        with Killer(vmm.process.pid, 6) as killer:
            for number in range(3):
                name = f"card{number}"
                poll(lambda name=name: vmm.remote("add-net", f"id={name}").returncode == 0
                     or name in vmm.remote("info").stdout, PATIENCE)  # fmt: skip
            poll(lambda: killer.kills >= 5, PATIENCE)
        poll(lambda: vmm.remote("ping").returncode == 0, PATIENCE)
        poll(lambda: [vmm.fleet().get(f"card{n}", {}).get("state") for n in range(3)] == ["running"] * 3, PATIENCE)
        vmm.more("blk ok ", PATIENCE)
        assert ip("-brief", "link").count("vmtap") == 3
        assert b"BAD" not in vmm.output and vmm.process.poll() is None
