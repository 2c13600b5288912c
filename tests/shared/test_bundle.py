"""shared.bundle: its code is used exactly while the sources are what they were; nothing that is wrong with it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOW = "import toy.part; print(toy.part.VALUE, toy.part.__file__, list(toy.__path__), toy.part.where())"


def python(folder: Path, code: str) -> str:
    """What `code` prints in a fresh interpreter that finds our packages and those in `folder`, and writes no .pyc."""
    start = f"import sys; sys.path[:0] = {[str(ROOT), str(folder)]!r}; from shared import bundle; "
    command = [sys.executable, "-ISB", "-c", start + code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def write(path: Path, value: int, status: os.stat_result | None = None) -> None:
    """A module that says `value`; with the times of `status` if given."""
    code = f"import inspect\nVALUE = {value}\ndef where(): return inspect.getsource(where).strip()[:4]\n"
    path.write_text(code)
    if status is not None:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A package `toy` with a module `part` that says 1, and `tmp_path/bundle` made of both."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text("")
    path = tmp_path / "toy" / "part.py"
    write(path, 1)
    assert refresh(tmp_path) == "True"
    return path


def refresh(folder: Path) -> str:
    return python(folder, f"print(bundle.refresh({str(folder / 'bundle')!r}, 'toy.part'))")


def value(folder: Path) -> str:
    shown = python(folder, f"bundle.use({str(folder / 'bundle')!r}); {SHOW}").split()
    assert shown[1:] == [str(folder / "toy" / "part.py"), f"['{folder / 'toy'}']", "def"]
    return shown[0]


def test_code_comes_from_the_bundle_and_the_modules_look_as_ever(part: Path, tmp_path: Path):
    write(part, 2, part.stat())  # as no editor does it: same size, same time
    assert value(tmp_path) == "1"


def test_a_source_with_another_time_is_imported_itself(part: Path, tmp_path: Path):
    before = part.stat()
    write(part, 2)
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert value(tmp_path) == "2"


def test_a_source_of_another_size_is_imported_itself(part: Path, tmp_path: Path):
    write(part, 22, part.stat())
    assert value(tmp_path) == "22"


def test_a_source_that_is_gone_is_not_imported(part: Path, tmp_path: Path):
    part.unlink()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        value(tmp_path)
    assert "No module named 'toy.part'" in caught.value.stderr


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage", "another Python"])
def test_a_bundle_that_is_no_use_is_as_good_as_none(part: Path, tmp_path: Path, damage: str):
    bundle = tmp_path / "bundle"
    data = bundle.read_bytes()
    header, _, rest = data.partition(b"\n")
    if damage == "missing":
        bundle.unlink()
    else:
        bundle.write_bytes(
            {
                "empty": b"",
                "cut": data[: len(data) // 2],
                "garbage": header + b"\n" + bytes(len(rest)),
                "another Python": header.replace(b"3.", b"2.") + b"\n" + rest,
            }[damage]
        )
    write(part, 2, part.stat())
    assert value(tmp_path) == "2"


def test_refresh_writes_only_when_a_source_has_changed(part: Path, tmp_path: Path):
    assert refresh(tmp_path) == "False"
    write(part, 33)
    assert refresh(tmp_path) == "True"
    assert value(tmp_path) == "33"
    assert [path.name for path in tmp_path.iterdir() if "bundle" in path.name] == ["bundle"]
