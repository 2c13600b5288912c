"""The rules that tools can check: lint, types, which package may import which, and no traces of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each of these is a process of its own. What several need is in shared/.
PROCESSES = {
    "controller", "vcpu_worker", "blk_worker", "net_worker", "console_worker", "migration_agent", "ch_remote",
    "chaos", "metrics_exporter",
}  # fmt: skip
# A vCPU process lives in the controller's address space, so the controller is what loads its code.
ALLOWED = {("controller", "vcpu_worker")}

# Written in pieces, so that this file does not find itself.
TRACES = {
    "a developer's folder": re.compile("/" + "work/(main|shared)|/" + "home/[a-z]|/" + "Users/|/" + "tmp/fl/"),
    "a package server": re.compile("deb" + r"\.debian\.org|py" + r"pi\.org|python" + r"hosted\.org"),
}  # fmt: skip


def packages() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def tracked_files() -> list[Path]:
    """The files that git has or would take, the ignored ones left out."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-8000:]
        pytest.fail(f"{' '.join(command[1:4])} exits {done.returncode}:\n{said}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", ".")


@pytest.mark.timeout(300)
def test_mypy_strict_finds_nothing() -> None:
    run(sys.executable, "-m", "mypy", "--strict", *packages())


@pytest.mark.parametrize("package", sorted(PROCESSES | {"shared"}))
def test_no_process_package_imports_another(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(package)
        for name in sorted(imported(path) & PROCESSES - {package})
        if (package, name) not in ALLOWED
    ]
    assert not wrong


@pytest.mark.parametrize("what", sorted(TRACES))
def test_no_file_names(what: str) -> None:
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        hits = [n for n, line in enumerate(lines, 1) if TRACES[what].search(line)]
        found += [f"{path.relative_to(ROOT)}:{n}" for n in hits]
    assert not found
