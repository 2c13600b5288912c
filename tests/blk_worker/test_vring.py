"""shared/vring.h on its own, under sanitizers: see vring_torture.c for what each mode proves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests/blk_worker/vring_torture.c"
CFLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread", f"-I{ROOT / 'shared'}")
# gcc has no model of atomic_thread_fence under TSan; nothing here relies on a fence to order plain accesses.
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread", "-Wno-tsan"),
}


@pytest.fixture(scope="module", params=SANITIZERS)
def torture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    program = tmp_path_factory.mktemp("vring") / f"torture-{request.param}"
    subprocess.run(["gcc", *CFLAGS, *SANITIZERS[request.param], "-o", program, SOURCE], check=True)
    # TSan can't place its shadow when the kernel randomises mappings with many bits.
    return ["setarch", "-R", str(program)] if request.param == "thread" else [str(program)]


def run(command: list[str], *arguments: object) -> None:
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("indirect", [0, 1], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [0, 1], ids=["flags", "event_idx"])
def test_two_threads_lose_no_request_and_no_notification(torture: list[str], event_idx: int, indirect: int) -> None:
    for seed in (1, 2):
        run(torture, "ring", seed, 40_000, event_idx, indirect)


def test_random_tables_never_lead_outside_guest_memory(torture: list[str]) -> None:
    run(torture, "fuzz", 1, 30_000)


@pytest.mark.parametrize("torture", ["address"], indirect=True)  # one thread at a time: TSan would see nothing
def test_inflight_region_after_a_kill_at_every_step(torture: list[str]) -> None:
    """Every request is returned exactly once and done at least once, resubmission in the order of taking."""
    run(torture, "kill", 1)
