"""One job in the lab: stage the checkout and the files, start the machine, again if it fell over, collect."""

from __future__ import annotations

import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploy import bundle, install
from deploy.lab import debian, images, nested
from deploy.lab.cache import lab_folder, say
from deploy.lab.machine import Machine, Session, Sink, Verdict

HOST_DIED = 125
BUSY = 0.1  # the part of a job's time for which it may wait for a CPU before that is told
RESERVED = {"code", "bin", "job", "greeting"}

# What the launchers of the lab put in front of the path: see init/lab for the mounts.
LAB_PATHS = ["/lab/code", "/opt/python"]

GREETING = """
This is the lab: a Debian host with a KVM of its own. cloud-hypervisor, flotilla and ch-remote are in PATH;
vmlinux, bzImage, initrd, focal.efi, focal.raw and tmp.img are in ~/workloads. tmux gives more than one terminal.
Nothing here outlasts the session. exit or Ctrl-D ends it; Ctrl-] pulls the plug.

"""


@dataclass(frozen=True, slots=True)
class Job:
    """What to run: a script with its arguments, or a shell when there is no script.

    `puts` maps names below /lab to files or folders here. `nested`: with the images of the nested example (nested.py).
    """

    script: Path | None = None
    arguments: Sequence[str] = ()
    puts: dict[str, Path] = field(default_factory=dict)
    rows: int = 24
    columns: int = 80
    nested: bool = False


def stage(job: Job, machine: Machine, tree: Path) -> None:
    """Lay out the job disk: the checkout's packages, the commands, the script and what came along."""
    bundle.copy_code(tree / "code", development=True)
    (tree / "bin").mkdir()
    for name, module in install.COMMANDS.items():
        launcher = tree / "bin" / name
        # No bundle: one that was made here names the files of this machine.
        text = install.LAUNCHER.format(python="/usr/bin/python3", paths=LAB_PATHS, module=module, bundle="")
        launcher.write_text(text)
        launcher.chmod(0o755)
    puts = dict(job.puts)
    if job.script:
        puts[job.script.name] = job.script
    for name, source in puts.items():
        if name.partition("/")[0] in RESERVED:
            raise debian.DebianError(f"--put: the name {name} is taken in the lab; choose another by --put FILE=NAME")
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        debian.run(["cp", "-aL", "--sparse=always", source, tree / name], f"staging {source}")
    (tree / "greeting").write_text(GREETING.replace("\n", "\r\n"))
    words = ["bash", f"/lab/{job.script.name}", *job.arguments] if job.script else []
    settings = {"MODE": "run" if job.script else "shell", "LIMIT": machine.limit, "ROWS": job.rows}
    settings |= {"COLUMNS": job.columns, "BUNDLE_AT": nested.BUNDLE_START // nested.MIB}
    lines = [f"{name}={value}" for name, value in settings.items()]
    (tree / "job").write_text("\n".join([*lines, f"COMMAND=({shlex.join(words)})", ""]))


def needed(job: Job) -> images.Images:
    """The images for a job, built where they are missing."""
    return nested.ready() if job.nested else images.ready()


def job_disk(job: Job, machine: Machine, work: Path) -> Path:
    tree, disk = work / "tree", work / "job.ext4"
    tree.mkdir()
    stage(job, machine, tree)
    used = sum(path.lstat().st_size + 4096 for path in tree.rglob("*"))
    images.filesystem(disk, tree, int(used * 1.1) + (16 << 20))
    shutil.rmtree(tree)
    return disk


def run(
    job: Job, machine: Machine, out: Path | None = None, sinks: dict[str, Sink] | None = None, retries: int = 2
) -> Verdict:
    """Run a job; when the lab machine itself dies, again, `retries` times at most. Prints what happened to stderr.

    `out` gets what the job left in $OUT, with .dmesg, and .console of the lab machine.
    """
    ready = needed(job)
    for left in range(retries, -1, -1):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="run.", dir=lab_folder()) as folder:
            work = Path(folder)
            disk = job_disk(job, machine, work)
            staged = time.monotonic()
            with open(work / "out.tar", "wb") as tar:
                session = Session(machine, {**(sinks or {}), "out": tar.write})
                verdict = session.run(ready, disk, work)
            if out:
                collect(work / "out.tar", out)
                (out / ".console").write_text(verdict.console)
        say(_summary(verdict, staged - began, time.monotonic() - staged))
        if not verdict.died:
            return verdict
        if left:
            say(f"the lab machine itself died ({verdict.died}); starting again, {left} tries left")
    say(f"the lab machine itself died ({verdict.died}); end of its console:")
    print(verdict.console[-3000:], file=sys.stderr)
    return replace(verdict, code=HOST_DIED)


def collect(tar: Path, out: Path) -> None:
    """Unpack the job's $OUT. What did not arrive whole, as from a machine that died, is said and left out."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(tar, "r:") as archive:
            # Plain files and folders below `out` only (extractall's own filters came after Debian 12's Python).
            inside = [each for each in archive if ".." not in Path(each.name).parts and not each.name.startswith("/")]
            archive.extractall(out, [each for each in inside if each.isreg() or each.isdir()])
    except tarfile.ReadError as error:
        say(f"$OUT did not come back whole: {error} ({tar.stat().st_size} bytes came)")


def _summary(verdict: Verdict, staging: float, machine: float) -> str:
    up = f"up after {verdict.up:.1f} s of its own time" if verdict.up is not None else "never up"
    how = "died" if verdict.died else f"the job's exit code is {verdict.code}"
    left = f"; the job left running: {', '.join(verdict.left)}" if verdict.left else ""
    busy = f"; other work on this host kept it from a CPU for {verdict.waited:.0f} s"
    kept = busy if verdict.waited > BUSY * machine else ""
    return f"{how}; staging {staging:.1f} s, machine {machine:.1f} s ({up}){kept}{left}"
