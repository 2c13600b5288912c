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
from deploy.install import SetupError
from deploy.lab.debian import DebianError
from deploy.lab.kernel import KernelError
from deploy.lab.machine import INTERRUPTED, TIMED_OUT, Machine
from deploy.lab.run import HOST_DIED, Job, needed, run

LIMITS = {"local": 900, "nested": 2700}  # seconds
MODULES = {"local": "inside", "nested": "nested"}
LAB_MEMORY = "4G"
SCRIPT = Path(__file__).with_name("run.sh")

DESCRIPTION = """\
A Debian guest boots from a disk image as a fleet of processes, checksums its second disk in a loop, and moves,
alive, to another VMM by the commands of Cloud Hypervisor's live-migration document.

  local    (the document's first example) from VMM to VMM on one host
  nested   (its second) between two VMs, each with a VMM inside, over their network and two socats; always in the lab
"""


def choose(no_lab: bool, name: str = "local") -> tuple[str, str]:
    """("lab" or "host", why). Raises DebianError when neither is possible."""
    if name == "nested":
        return choose_nested(no_lab)
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


def choose_nested(no_lab: bool) -> tuple[str, str]:
    """Its host machine gets TAPs and forwards between them: that is no demo's to do to this host."""
    if no_lab:
        raise DebianError("the nested example needs a host machine of its own: leave out --no-lab")
    if reason := floors.lab_missing():
        raise DebianError(f"the lab can't be started: {reason}")
    return "lab", "the lab is the document's host machine: two VMs in it, and a VMM in each of them"


def parse(arguments: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("demo.sh", description=DESCRIPTION, formatter_class=form)
    parser.add_argument("example", nargs="?", choices=LIMITS, default="local", help="which one (default: local)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what happened to FILE as JSON")
    parser.add_argument("--no-lab", action="store_true", help="fail where this host's own KVM can't run Linux")
    return parser.parse_args(arguments)


def perform(name: str, where: str, view: display.Display, feed: display.Feed) -> tuple[int, str]:
    """The example in one of the two places; its exit code and what it said on stderr."""
    errors = bytearray()
    with tempfile.TemporaryDirectory(prefix="flotilla-demo.") as folder:
        out = Path(folder)
        if where == "host":
            return host.run(Path(sys.executable).parent, out, feed, LIMITS[name])
        job = Job(SCRIPT, [MODULES[name]], nested=name == "nested")
        needed(job)
        view.say("starting the lab")
        sinks: dict[str, Any] = {"events": feed, "stdout": errors.extend, "stderr": errors.extend}
        verdict = run(job, Machine(LAB_MEMORY, 1, LIMITS[name]), out, sinks)
        return verdict.code or 0, errors.decode(errors="replace")


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
        view = display.display()
        feed = display.Feed(view)
        with view:
            code, said = perform(options.example, where, view, feed)
        report = {**(feed.report or {"ok": False}), **report, "ok": code == 0 and feed.report is not None}
        if not report["ok"]:
            report["failure"] = failure(options.example, code, feed, said)
            code = code or 1
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
