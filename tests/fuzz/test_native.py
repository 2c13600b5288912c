"""Every C target on its corpus, on what was once found, and on inputs from a fixed seed: by gcc with ASan and UBSan."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuzz import native
from tests.fuzz.engine import files

SEED, INPUTS = 1, 500


@pytest.mark.timeout(300)  # gcc, on a machine that may be busy
@pytest.mark.parametrize("target", native.TARGETS.values(), ids=lambda target: target.name)
def test_c_target_has_no_finding(target: native.Target, tmp_path: Path) -> None:
    known = files(target.name)
    assert known, "a corpus goes with every target"
    program, last = native.build_replay(target, tmp_path), tmp_path / "last"
    for words in ([], ["-random", str(SEED), str(INPUTS)]):
        done = subprocess.run(
            [program, *words, *known], env=native.environment(FUZZ_LAST=str(last)), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        found = last.read_bytes().hex() if words and last.exists() else "one of the files"
        assert done.returncode == 0, f"input: {found}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("target", native.TARGETS.values(), ids=lambda target: target.name)
def test_corpus_is_small(target: native.Target) -> None:
    assert sum(path.stat().st_size for path in files(target.name)) < 10_000
