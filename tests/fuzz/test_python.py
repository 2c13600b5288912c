"""Every Python target on its corpus, on what was once found, and on a fixed number of inputs from a fixed seed.

And the runner itself: what it must take for a finding, and that a file replays it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.errors import ProtocolError
from tests.fuzz import engine
from tests.fuzz.__main__ import main
from tests.fuzz.engine import Target, files, fuzz, replay
from tests.fuzz.targets import TARGETS

SEED, INPUTS = 1, 150


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_python_target_has_no_finding(target: Target) -> None:
    assert files(target.name), "a corpus goes with every target"
    known = len(files(target.name)) + len(target.seeds())
    done = fuzz(target, seed=SEED, inputs=known + INPUTS)
    assert done.finding is None, f"input {done.finding.data.hex()}: {done.finding.why}\n{done.finding.trace}"
    assert done.inputs == known + INPUTS


def test_corpora_are_below_a_hundred_kib() -> None:
    folders = (engine.CORPUS, engine.REGRESSIONS)
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()) < 100 << 10


def toy(run: Callable[[bytes], None]) -> Target:
    def opened() -> Iterator[Callable[[bytes], None]]:
        yield run

    return Target("toy", opened, lambda: [b"seed of the toy"])


def bad(data: bytes) -> None:
    if b"\xff" in data:
        raise KeyError("a byte")


def refused(_: bytes) -> None:
    raise ProtocolError("no")


def endless(_: bytes) -> None:
    while True:
        pass


def greedy(_: bytes) -> None:
    bytearray(4 * engine.MEMORY)


def leaky(_: bytes) -> None:
    raise AssertionError("a property")


@pytest.mark.parametrize(
    ("run", "why"),
    [(bad, "KeyError: 'a byte'"), (endless, "takes longer than"), (greedy, "MemoryError"), (leaky, "a property")],
)
def test_what_is_a_finding(run: Callable[[bytes], None], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if run is endless:
        monkeypatch.setattr(engine, "SECONDS", 0.2)
    done = fuzz(toy(run), seed=1, inputs=500)
    assert done.finding is not None and why in done.finding.why


def test_an_error_of_the_tree_is_no_finding() -> None:
    assert fuzz(toy(refused), seed=1, inputs=20).finding is None


def test_the_same_seed_gives_the_same_inputs() -> None:
    seen: list[list[bytes]] = []
    for _ in range(2):
        seen.append([])
        fuzz(toy(seen[-1].append), seed=7, inputs=50)
    assert seen[0] == seen[1] and len(set(seen[0])) > 30


def test_a_finding_is_kept_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FINDINGS", tmp_path)
    finding = fuzz(toy(bad), seed=1, inputs=500).finding
    assert finding is not None
    again = replay(toy(bad), finding.keep())
    assert again is not None and again.why == finding.why


def test_a_target_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--inputs", "1", "nothing"])
    assert ended.value.code == 2 and "no target is called nothing" in capsys.readouterr().err


def test_a_file_is_replayed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "input"
    path.write_bytes(bytes(range(20)))
    assert main(["options", str(path)]) == 0
    assert "no finding" in capsys.readouterr().out
