"""deploy/setup.sh: the second run changes nothing, the commands run this checkout, failures say what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy import install

SETUP = install.CHECKOUT / "deploy" / "setup.sh"
NAMES = ("cloud-hypervisor", "flotilla", "ch-remote", "python")


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SETUP)], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_second_run_changes_nothing_and_ends_with_the_folder_of_the_commands() -> None:
    first, second = run_setup(), run_setup()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    folder = Path(second.stdout.splitlines()[-1])
    assert all(os.access(folder / name, os.X_OK) for name in NAMES)
    assert "commands: unchanged" in second.stderr
    assert "native loops: up to date" in second.stderr


def test_commands_run_this_checkout_with_the_locked_packages() -> None:
    folder = Path(run_setup().stdout.splitlines()[-1])
    code = "import shared, zmq; print(shared.__file__, zmq.__file__, sep='\\n')"
    said = subprocess.run([folder / "python", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    ours, theirs = said.stdout.split()
    assert Path(ours).is_relative_to(install.CHECKOUT)
    assert Path(theirs).is_relative_to(install.packages_folder(install.cache_folder(), "runtime"))
    for name in NAMES[:3]:
        done = subprocess.run([folder / name, "--version"], cwd="/", capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_two_checkouts_have_two_folders_in_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for name in ("one", "two"):
        shutil.copytree(install.CHECKOUT / "deploy", tmp_path / name / "deploy", ignore=shutil.ignore_patterns("lab"))
        monkeypatch.setattr(install, "CHECKOUT", tmp_path / name)
        folders.append(install.launchers(tmp_path / "cache"))
    assert folders[0] != folders[1]
    assert str(tmp_path / "one") in (folders[0] / "flotilla").read_text()
    assert str(tmp_path / "two") in (folders[1] / "flotilla").read_text()


def test_missing_package_without_apt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PACKAGES", {"some-package": "no-such-program"})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(install.SetupError, match=r"no apt-get here; install what Debian calls: some-package"):
        install.system_packages()


def test_failing_step_shows_its_last_words_and_the_hint() -> None:
    with pytest.raises(install.SetupError, match=r"(?s)step failed \(exit code 3\): do this\n  last words"):
        install.run(["sh", "-c", "echo last words; exit 3"], "step", "do this")


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_setup(FLOTILLA_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1
    assert str(tmp_path / "file" / "cache") in done.stderr


def test_old_python_is_refused_with_the_way_out(tmp_path: Path) -> None:
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        [str(tmp_path / "bash"), str(SETUP)], capture_output=True, text=True, check=False,
        env={"PATH": str(tmp_path), "FLOTILLA_PYTHON": str(fake), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "3.11" in done.stderr


def test_lock_is_exclusive_and_the_second_waits(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with install.locked(tmp_path / "lock"):
            order.append("second")

    with install.locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_digest_depends_on_where_parts_end() -> None:
    assert install.digest("ab", "c") != install.digest("a", "bc")
    assert install.digest("ab") == install.digest(b"ab")


@pytest.mark.timeout(180)
def test_pip_install_builds_the_native_loops_with_gcc_alone(tmp_path: Path) -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=install.CHECKOUT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in filter(None, names.split("\0")):
        if (install.CHECKOUT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(install.CHECKOUT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    options = ["-q", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    pip: list[str | Path] = [python, "-m", "pip", "install", *options, source]
    # Without isolation and with the locked setuptools, so that no package index is asked.
    tools = str(install.packages_folder(install.cache_folder(), "tools"))
    environment = {**os.environ, "PYTHONPATH": tools}
    done = subprocess.run(pip, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "from shared import native; print(native.ROOT); [native.load(name) for name in native.LOOPS]"
    said = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    assert Path(said.strip()).is_relative_to(tmp_path / "venv")
    for name in NAMES[:3]:
        assert (python.parent / name).read_text().startswith(f"#!{python}")
    subprocess.run([python.parent / "ch-remote", "--version"], check=True, capture_output=True)
