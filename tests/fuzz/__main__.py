"""`python -m tests.fuzz [--minutes M | --inputs N] [--seed S] [TARGET…]` and `python -m tests.fuzz TARGET FILE…`.

The first runs each target so long, or on so many inputs, made from its corpus and the seed; it exits 1 at a finding and
says how that is replayed. The second runs a target on files. The C targets are deploy/fuzz.sh's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

from tests.fuzz.engine import CORPUS, Finding, Target, fuzz, replay
from tests.fuzz.targets import TARGETS

CORPUS_FILES, CORPUS_BYTES = 30, 300  # of one target, so that all of them stay below 100 KiB


def say(text: str) -> None:
    print(text, flush=True)


def report(finding: Finding, path: Path) -> None:
    say(f"{finding.target}: FINDING: {finding.why}")
    say(finding.trace)
    say(f"{finding.target}: the input is {path}; again: python -m tests.fuzz {finding.target} {path}")


def run_files(target: Target, paths: list[Path]) -> int:
    code = 0
    for path in paths:
        finding = replay(target, path)
        if finding is None:
            say(f"{target.name}: {path}: no finding")
        else:
            report(finding, path)
            code = 1
    return code


def keep(target: Target, inputs: list[bytes]) -> None:
    """Into the corpus: the shortest of what reached something new, as far as there is room."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    for data in sorted(inputs, key=len):
        if len(list(folder.iterdir())) < CORPUS_FILES and len(data) <= CORPUS_BYTES:
            (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def run_all(targets: list[Target], seed: int, inputs: int | None, seconds: float | None, grow: bool) -> int:
    code = 0
    for target in targets:
        done = fuzz(target, seed=seed, inputs=inputs, seconds=seconds, say=say, every=1 if grow else 4)
        if grow:
            keep(target, done.grown)
        say(f"{target.name}: seed {seed}, {done.inputs} inputs, {done.lines} lines of the product reached")
        if done.finding is not None:
            report(done.finding, done.finding.keep())
            code = 1
    return code


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="for each target")
    parser.add_argument("--inputs", type=int, help="for each target, instead of a time")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--grow", action="store_true", help="keep inputs that reach something new in the corpus")
    parser.add_argument("--list", action="store_true", help="the targets")
    parser.add_argument("words", nargs="*", metavar="TARGET", help="default: all; one and FILEs: run these")
    given = parser.parse_args(argv)
    if given.list:
        for target in TARGETS.values():
            say(f"{target.name:18} {target.about}")
        return 0
    first = given.words[:1]
    if first and first[0] in TARGETS and any(os.path.isfile(word) for word in given.words[1:]):
        return run_files(TARGETS[first[0]], [Path(word) for word in given.words[1:]])
    unknown = [word for word in given.words if word not in TARGETS]
    if unknown:
        parser.error(f"no target is called {unknown[0]}; there are {', '.join(TARGETS)}")
    if given.inputs is None and given.minutes is None:
        parser.error("how long? --minutes M, or --inputs N")
    targets = [TARGETS[word] for word in given.words] or list(TARGETS.values())
    return run_all(targets, given.seed, given.inputs, None if given.minutes is None else 60 * given.minutes, given.grow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
