"""Runs of scripts in the lab, for tests. What is in the lab and what a script finds there: deploy/lab/README.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deploy.lab.machine import Machine, Sink
from deploy.lab.run import Job, run

LIBRARY = Path(__file__).with_name("library.sh")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a script ended. `died` is not empty when it was the lab machine that fell over, again and again."""

    code: int
    stdout: str
    stderr: str
    died: str
    left: list[str]
    out: Path = field(repr=False)

    def must_succeed(self) -> Outcome:
        """Fail the test, with everything that is known, unless the script ended with 0 and left nothing running."""
        assert not self.died, f"not the fault of the test: the lab machine died: {self.died}"
        assert self.code == 0, f"the script's exit code is {self.code}\n{self.stdout}\n{self.stderr}"
        assert not self.left, f"the script left running: {self.left}"
        return self


class Lab:
    """Scripts start in a fresh lab machine each. `library.sh` is there as $LAB/library.sh."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0

    def run(
        self, script: str, *arguments: str, memory: str = "4G", limit: int = 300, append: str = "",
        puts: dict[str, Path] | None = None, sinks: dict[str, Sink] | None = None, retries: int = 2,
        nested: bool = False,
    ) -> Outcome:  # fmt: skip
        """Run a script given as text. `limit` is in seconds; `puts` maps names below $LAB to files; `nested`: with the
        images of the nested example."""
        self._runs += 1
        folder = self._folder / str(self._runs)
        folder.mkdir()
        file = folder / "script.sh"
        file.write_text(script)
        said = {"stdout": bytearray(), "stderr": bytearray()}
        every: dict[str, Sink] = {name: buffer.extend for name, buffer in said.items()}
        job = Job(file, arguments, {"library.sh": LIBRARY, **(puts or {})}, nested=nested)
        machine = Machine(memory, 1, limit, append)
        verdict = run(job, machine, folder / "out", {**every, **(sinks or {})}, retries)
        texts = {name: buffer.decode(errors="replace") for name, buffer in said.items()}
        assert verdict.code is not None
        return Outcome(verdict.code, **texts, died=verdict.died, left=verdict.left, out=folder / "out")
