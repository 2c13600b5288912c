"""Where the programs are that are measured: ours as installed, QEMU from PATH, others by environment variable.

    FLOTILLA_BENCH_QEMU               another qemu-system-x86_64
    FLOTILLA_BENCH_CLOUD_HYPERVISOR   a cloud-hypervisor binary, measured beside ours
    FLOTILLA_BENCH_CH_REMOTE          its ch-remote (default: the one beside it); only migrate-local needs it
    FLOTILLA_BENCH_FIRECRACKER        a firecracker binary
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

from bench.errors import BenchError
from deploy import install

ROOT: Final = Path(__file__).resolve().parent.parent
OWN: Final = {"flotilla": "controller.main", "ch-remote": "ch_remote.main"}


def ours(name: str) -> list[str]:
    """argv that starts our `flotilla` (the same program as cloud-hypervisor) or `ch-remote`.

    The launcher that deploy/setup.sh wrote for this very checkout, else the interpreter that runs the bench.
    """
    installed = install.cache_folder() / "checkouts" / install.digest(str(ROOT)) / "bin"
    folders = [os.path.dirname(sys.executable), str(installed), *os.get_exec_path()]
    for folder in folders:
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK) and str(ROOT) in path.read_text(errors="replace"):
            return [str(path)]
    code = f"import sys; sys.path[:] = {[str(ROOT), *sys.path]!r}; from {OWN[name]} import main; sys.exit(main())"
    return [sys.executable, "-IS", "-c", code]


def qemu() -> str:
    """Path of QEMU. Raises BenchError when there is none."""
    return _named("FLOTILLA_BENCH_QEMU") or _found("qemu-system-x86_64")


def cloud_hypervisor() -> str:
    """Path of upstream's binary, "" when none was given. Raises BenchError when it can't be run."""
    return _named("FLOTILLA_BENCH_CLOUD_HYPERVISOR")


def cloud_hypervisor_remote() -> str:
    """The ch-remote that belongs to it. Raises BenchError when it is missing."""
    beside = Path(cloud_hypervisor()).with_name("ch-remote")
    if path := _named("FLOTILLA_BENCH_CH_REMOTE"):
        return path
    if not os.access(beside, os.X_OK):
        raise BenchError(f"{beside} is missing; set FLOTILLA_BENCH_CH_REMOTE")
    return str(beside)


def firecracker() -> str:
    """Path of the binary, "" when none was given. Raises BenchError when it can't be run."""
    return _named("FLOTILLA_BENCH_FIRECRACKER")


def _named(variable: str) -> str:
    path = os.environ.get(variable, "")
    if path and not os.access(path, os.X_OK):
        raise BenchError(f"{variable}={path}: not a program that can be run")
    return path


def _found(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BenchError(f"{name} is not in PATH; bash deploy/setup.sh installs it")
    return path


def environment() -> dict[str, str]:
    """Of what is measured: byte code may be cached, as for a user, and output is not flushed byte by byte."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
