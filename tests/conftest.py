"""Rules for every test: it leaves nothing behind (see leaks.py), and it ends (pytest-timeout, pyproject.toml)."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from shared import native
from shared.errors import HostError
from tests import leaks

FLOORS = ("probe", "lab", "external")

# No test asserts a time, and hypothesis' deadline of 200 ms for an example would.
settings.register_profile("flotilla", deadline=None)
settings.load_profile("flotilla")


def pytest_configure() -> None:
    leaks.become_subreaper()
    # A shell starts what it puts into the background with SIGINT ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leaks.isolate()
    for name in native.available():
        try:
            native.build(name)
        except HostError as error:
            raise pytest.UsageError(f"a native loop does not compile, so nothing was tested: {error}") from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(name) for name in FLOORS):
            item.add_marker(pytest.mark.unit)


@pytest.fixture(scope="session", autouse=True)
def runtime_folder() -> Iterator[Path]:
    """A short XDG_RUNTIME_DIR of this run's own (a unix socket's path has 107 bytes at most)."""
    folder = Path(tempfile.mkdtemp(prefix="fl."))
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def signals_only_processes() -> Iterator[None]:
    """A pid of 0 (a row of `vmm.fleet` has it while its process is being replaced) is a process group for kill(2):
    ours, with whoever runs the tests. A test that sends a signal there fails instead."""
    kill = os.kill

    def careful(pid: int, number: int) -> None:
        assert pid > 0, f"kill({pid}) is for a whole group of processes"
        kill(pid, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", careful)
        yield


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest, runtime_folder: Path) -> Iterator[None]:
    before = leaks.Snapshot.take(runtime_folder)
    yield
    tmp_path = getattr(request.node, "funcargs", {}).get("tmp_path")
    if left := leaks.find(before, tmp_path):
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)
