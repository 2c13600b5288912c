"""The documents name what exists: every promise its test or bench, the code map every module, every link its file."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from bench.__main__ import BENCHES

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATION = ROOT / "SPECIFICATION.md"
MAP = ROOT / "docs" / "architecture.md"
DOCUMENTS = sorted([ROOT / "README.md", SPECIFICATION, *(ROOT / "docs").rglob("*.md")])

# `tests/x/test_y.py`, `tests/x/test_y.py::test_z`
TEST = re.compile(r"`(tests/[\w/]+(?:\.py(?:::(\w+))?)?)`")
BENCH = re.compile(r"`python -m bench ([\w-]+)[^`]*`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
MAPPED = ("*.py", "*.c", "*.h", "*.sh")


@functools.cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(), str(path))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def missing(text: str) -> list[str]:
    """The tests and benches that a text names and that are not there."""
    found = []
    for name, function in TEST.findall(text):
        path = ROOT / name.partition("::")[0]
        if not path.exists() or (function and function not in functions(path)):
            found.append(name)
    return found + [f"bench {name}" for name in BENCH.findall(text) if name not in BENCHES]


def rows(text: str) -> list[str]:
    """The body rows of all tables."""
    lines = text.splitlines()
    heads = {n for n, line in enumerate(lines) if line.startswith("|--")}
    return [
        line for n, line in enumerate(lines) if line.startswith("|") and n not in heads and n + 1 not in heads
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_and_bench_that_a_document_names_exists(document: Path) -> None:
    assert not missing(document.read_text())


def test_every_promise_names_what_shows_it() -> None:
    promises = rows(SPECIFICATION.read_text())
    assert len(promises) > 30
    assert not [row for row in promises if not TEST.search(row) and not BENCH.search(row)]


def test_a_name_that_does_not_exist_is_noticed() -> None:
    here = "tests/test_specification.py"
    text = f"| a | `{here}::test_of_nothing` `tests/nowhere.py` `python -m bench nothing` `{here}` |"
    assert missing(text) == [f"{here}::test_of_nothing", "tests/nowhere.py", "bench nothing"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(document: Path) -> None:
    assert not [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]


def mapped() -> set[str]:
    """The paths in the code map's first column."""
    return {match[1] for row in rows(MAP.read_text()) if (match := re.match(r"\| `([\w/.-]+)` \|", row))}


def sources() -> set[str]:
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    found = {path for package in packages for pattern in MAPPED for path in package.rglob(pattern)}
    # A package's __init__ is its folder's line; the probe guest has a map of its own, guest/README.md.
    found = {path.parent if path.name == "__init__.py" else path for path in found}
    names = {str(path.relative_to(ROOT)) for path in found}
    return {name for name in names if not (name.startswith("guest/") and name.endswith((".c", ".h")))}


def test_the_code_map_has_every_module() -> None:
    assert not sorted(sources() - mapped())


def test_the_code_map_has_nothing_that_is_gone() -> None:
    assert not sorted(path for path in mapped() if not (ROOT / path).exists())
