"""deploy/demo.sh: where the example can run, the run, its summary and its report."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy import floors
from deploy.demo import display, host
from deploy.demo.example_faults import PROCESSES
from deploy.install import SetupError
from deploy.lab.debian import DebianError
from deploy.lab.kernel import KernelError
from deploy.lab.machine import INTERRUPTED, TIMED_OUT, Machine
from deploy.lab.run import HOST_DIED, Job, needed, run

LIMITS = {"local": 900, "nested": 2700, "faults": 2700}  # seconds of one lab machine's life
MODULES = {"local": "inside", "nested": "nested", "faults": "faults"}
LAB_ONLY = {
    "nested": "the lab is the document's host machine: two VMs in it, and a VMM in each of them",
    "faults": "the lab is the host of the VM, and of the network card that it gets",
}
LAB_MEMORY = "4G"
SCRIPT = Path(__file__).with_name("run.sh")

DESCRIPTION = """\
A Debian guest boots from a disk image as a fleet of processes, checksums its second disk in a loop, and moves,
alive, to another VMM by the commands of Cloud Hypervisor's live-migration document.

  local    (the document's first example) from VMM to VMM on one host
  nested   (its second) between two VMs, each with a VMM inside, over their network and two socats; always in the lab
  faults   (ours) every process of a VM in turn is killed 20 times and stopped 5 times, under verified disk and network
           load; a lab machine for each kind of process
"""


def choose(no_lab: bool, name: str = "local") -> tuple[str, str]:
    """("lab" or "host", why). Raises DebianError when neither is possible."""
    if name in LAB_ONLY:
        return choose_lab(no_lab, name)
    if floors.kvm_runs_linux():
        return "host", "/dev/kvm stands on hardware, so the guest runs on this host"
    if missing := floors.kvm_missing():
        why = missing
    else:
        names = sorted(path.name for path in Path("/sys/module").glob("kvm_*"))
        kind = ", ".join(names) or "no kvm_intel, no kvm_amd"
        why = f"/dev/kvm is a software KVM ({kind}): Linux does not boot on it"
    if no_lab:
        raise DebianError(f"{why}; without --no-lab the demo runs in the lab")
    if reason := floors.lab_missing():
        raise DebianError(f"{why}; and the lab can't be started: {reason}")
    return "lab", f"{why}, so the lab is started: a host with a KVM of its own, emulated by QEMU, many times slower"


def choose_lab(no_lab: bool, name: str) -> tuple[str, str]:
    """Their host machine gets TAPs and forwards between them: that is no demo's to do to this host."""
    if no_lab:
        raise DebianError(f"the {name} example needs a host machine of its own: leave out --no-lab")
    if reason := floors.lab_missing():
        raise DebianError(f"the lab can't be started: {reason}")
    return "lab", LAB_ONLY[name]


def parse(arguments: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("demo.sh", description=DESCRIPTION, formatter_class=form)
    parser.add_argument("example", nargs="?", choices=LIMITS, default="local", help="which one (default: local)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what happened to FILE as JSON")
    parser.add_argument("--processes", type=processes, default=list(PROCESSES), metavar="KIND,…",
                        help=f"faults: which kinds of processes (default: {','.join(PROCESSES)})")  # fmt: skip
    parser.add_argument("--no-lab", action="store_true", help="fail where this host's own KVM can't run Linux")
    return parser.parse_args(arguments)


def processes(text: str) -> list[str]:
    words = text.split(",")
    if unknown := [word for word in words if word not in PROCESSES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are: {', '.join(PROCESSES)}")
    return words


def perform(name: str, where: str, view: display.Display, feed: display.Feed, words: list[str]) -> tuple[int, str]:
    """The example in one of the two places; its exit code and what it said on stderr. `words`: for its module."""
    errors = bytearray()
    with tempfile.TemporaryDirectory(prefix="flotilla-demo.") as folder:
        out = Path(folder)
        if where == "host":
            return host.run(Path(sys.executable).parent, out, feed, LIMITS[name])
        job = Job(SCRIPT, [MODULES[name], *words], nested=name == "nested")
        needed(job)
        view.say("starting the lab")
        sinks: dict[str, Any] = {"events": feed, "stdout": errors.extend, "stderr": errors.extend}
        verdict = run(job, Machine(LAB_MEMORY, 1, LIMITS[name]), out, sinks)
        return verdict.code or 0, errors.decode(errors="replace")


def play(options: argparse.Namespace, where: str) -> tuple[int, dict[str, Any]]:
    """The example, or each of its parts until one fails: exit code and report."""
    name = options.example
    parts = [[process] for process in options.processes] if name == "faults" else [[]]
    view = display.display()
    code, runs = 0, []
    report: dict[str, Any] = {}
    with view:
        for words in parts:
            feed = display.Feed(view)
            code, said = perform(name, where, view, feed, words)
            report = {**(feed.report or {}), "ok": code == 0 and feed.report is not None}
            runs.append(report)
            if not report["ok"]:
                report["failure"] = failure(name, code, feed, said)
                code = code or 1
                break
    return code, summed(runs) if name == "faults" else report


def summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of the fault example as one report."""
    report: dict[str, Any] = {"ok": all(run["ok"] for run in runs), "runs": runs}
    for figure in ("lost", "guest_errors"):
        report[figure] = sum(run.get(figure, 0) for run in runs)
    if not report["ok"]:
        report["failure"] = runs[-1]["failure"]
    return report


def failure(name: str, code: int, feed: display.Feed, said: str) -> str:
    """Why there is no success, in words."""
    if code == HOST_DIED:
        return "the lab machine itself died, again and again (that is no fault of the VMM); try once more"
    if code == TIMED_OUT:
        return f"the example did not end within {LIMITS[name]} s\n{said[-3000:]}"
    return feed.failure or said[-3000:] or f"the example ended with exit code {code}"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    report: dict[str, Any] = {"ok": False}
    try:
        where, why = choose(options.no_lab, options.example)
        report |= {"where": where, "why": why}
        print(f"demo: {why}", flush=True)
        code, played = play(options, where)
        report = played | report | {"ok": played["ok"]}
    except (DebianError, KernelError, SetupError) as error:
        report["failure"], code = str(error), 1
    except KeyboardInterrupt:
        report["failure"], code = "interrupted", INTERRUPTED
    if options.report:
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + "\n".join(display.summary(report)), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
