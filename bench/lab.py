"""A bench inside the lab (deploy/lab): the same code, on an emulated host with a real KVM."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.errors import BenchError
from deploy.lab.cache import say
from deploy.lab.debian import DebianError
from deploy.lab.kernel import KernelError
from deploy.lab.machine import Machine, Sink
from deploy.lab.run import Job
from deploy.lab.run import run as run_in_lab

LIMIT_SECONDS: Final = 1200
PATIENCE_SECONDS: Final = 120
# Python is 25 times slower in there: a heartbeat each millisecond would be all that it does.
TICK_US: Final = 10_000

SCRIPT: Final = """\
cd "$HOME"
export PYTHONPATH=/lab/code:/opt/python
exec python3 -m bench {words}
"""


def _repeat(data: bytes) -> None:
    say(data.decode(errors="replace").rstrip())


def run(kernel: str, words: Sequence[str], memory: str) -> dict[str, Any]:
    """The result of `python -m bench WORDS` there. Raises BenchError."""
    said = bytearray()
    given = [*words, "--json", "--kernel", "/lab/probe.elf", "--patience", str(PATIENCE_SECONDS)]
    with tempfile.TemporaryDirectory(prefix="bench.") as name:
        script = Path(name) / "bench.sh"
        script.write_text(SCRIPT.format(words=shlex.join(given)))
        job = Job(script, (), {"probe.elf": Path(kernel)})
        sinks: dict[str, Sink] = {"stdout": said.extend, "stderr": _repeat}
        try:
            verdict = run_in_lab(job, Machine(memory, 1, LIMIT_SECONDS), None, sinks)
        except (DebianError, KernelError) as error:
            raise BenchError(f"no lab: {error}") from error
    if verdict.died:
        raise BenchError(f"the lab machine died: {verdict.died}")
    lines = said.decode(errors="replace").splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise BenchError(f"the bench in the lab ended with {verdict.code}: {' '.join(lines[-3:])}") from None
    return {**answer, "where": "lab"}
