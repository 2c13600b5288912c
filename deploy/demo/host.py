"""The example on this host, for KVM on hardware: a home folder with the lab's ~/workloads, and inside.py in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy import install
from deploy.lab import debian, images
from deploy.lab.cache import digest, made

END_SECONDS = 60


def workloads() -> Path:
    """The folder that the lab mounts as ~/workloads, unpacked."""
    disk = images.ready().workloads

    def unpack(target: Path) -> None:
        target.mkdir()
        debian.run(["debugfs", "-R", f"rdump / {target}", disk], "debugfs")

    return made("home", digest("unpacked 1", disk.name), unpack, "the guest's kernels and disks, unpacked")


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A home folder of the demo's own: guests write to their disks, and the next demo starts afresh."""
    source = workloads()
    with tempfile.TemporaryDirectory(prefix="flotilla-home.") as folder:
        copy = Path(folder, "workloads")
        debian.run(["cp", "-a", "--sparse=always", source, copy], "copying the guest's disks")
        yield Path(folder)


def run(commands: Path, out: Path, sink: Callable[[bytes], object], limit: int) -> tuple[int, str]:
    """inside.py with its events going to `sink`; returns its exit code, 124 when its time was up, and its stderr.

    `commands` is the folder with cloud-hypervisor and ch-remote.
    """
    with home() as folder, tempfile.TemporaryFile() as errors:
        reader, writer = os.pipe()
        environment = {
            **os.environ, "HOME": str(folder), "OUT": str(out), "EVENTS": f"/dev/fd/{writer}",
            "PATH": f"{commands}:{os.environ.get('PATH', os.defpath)}", "PYTHONPATH": str(install.CHECKOUT),
        }  # fmt: skip
        words = ["timeout", "-k", str(END_SECONDS), str(limit), sys.executable, "-m", "deploy.demo.inside"]
        process = subprocess.Popen(words, env=environment, pass_fds=[writer], stdin=subprocess.DEVNULL, stderr=errors)
        os.close(writer)
        try:
            while data := os.read(reader, 65536):
                sink(data)
            code = process.wait()
            errors.seek(0)
            return code, errors.read().decode(errors="replace")
        finally:
            os.close(reader)
            if process.poll() is None:
                process.terminate()
                process.wait()
