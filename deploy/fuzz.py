"""What deploy/fuzz.sh does: clang, the targets' builds, and each target for so many minutes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from deploy.floors import kvm_missing
from deploy.install import SetupError, apt_install, present
from shared.errors import HostError
from tests.fuzz import native
from tests.fuzz.engine import FINDINGS, files
from tests.fuzz.targets import TARGETS

# Debian package -> the program or file by which one sees that it is there.
PACKAGES = {
    "clang-14": native.CLANG,
    "libclang-rt-14-dev": "/usr/lib/clang/14/lib/linux/libclang_rt.fuzzer-x86_64.a",
    "llvm-14": "llvm-symbolizer-14",
}
GUEST = "guest"
ABOUT_GUEST = "the probe guest programs every device at random, on /dev/kvm"
GRACE = 120  # seconds beyond its time until a target is ended
MOST_JOBS = 64
PROGRESS = 30  # seconds between two lines


def say(text: str) -> None:
    print(text, flush=True)


def install_clang() -> None:
    """Raises SetupError."""
    if missing := [package for package, probe in PACKAGES.items() if not present(probe)]:
        apt_install(missing)


def run_native(name: str, seconds: float, work: Path) -> bool:
    """A C target; whether it had no finding."""
    target, found = native.TARGETS[name], FINDINGS / name
    program = native.build_libfuzzer(target, work)
    found.mkdir(parents=True, exist_ok=True)
    before, grown, log = set(found.iterdir()), work / "corpus", work / "log"
    grown.mkdir()
    folders = [str(folder) for folder in (grown, *{path.parent for path in files(name)})]
    bounds = [f"-max_total_time={seconds:.0f}", "-timeout=10", "-rss_limit_mb=2048", f"-max_len={native.MAX_INPUT}"]
    command = [str(program), *bounds, "-print_final_stats=1", f"-artifact_prefix={found}/", *folders]
    with open(log, "wb") as output:
        code = watch(name, command, seconds, output.fileno(), log)
    for line in last_lines(log, ("DONE", "stat::number_of_executed_units")):
        say(f"{name}: {line}")
    if code == 0:
        return True
    say(f"{name}: FINDING (exit code {code})")
    say("\n".join(log.read_text(errors="replace").splitlines()[-60:]))
    for path in sorted(set(found.iterdir()) - before):
        say(f"{name}: the input is {path}; give it a name in tests/fuzz/regressions/{name}/, which the tests replay")
    return False


def watch(name: str, command: list[str], seconds: float, output: int, log: Path) -> int:
    """Run it with a line now and then; its exit code."""
    began = time.monotonic()
    with subprocess.Popen(command, cwd=native.ROOT, stdout=output, stderr=output, env=native.environment()) as process:
        while True:
            try:
                return process.wait(PROGRESS)
            except subprocess.TimeoutExpired:
                now = last_lines(log, ("cov:",))
                say(f"{name}: {time.monotonic() - began:.0f} s: {now[-1] if now else 'starting'}")
            if time.monotonic() - began > seconds + GRACE:
                process.kill()


def last_lines(log: Path, words: tuple[str, ...]) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [next(line for line in reversed(lines) if word in line) for word in words if any(word in x for x in lines)]


def run_module(module: str, name: str, minutes: float, *words: str) -> bool:
    command = [sys.executable, "-m", module, "--minutes", str(minutes), *words]
    try:
        return subprocess.run(command, cwd=native.ROOT, timeout=60 * minutes + 5 * GRACE, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        say(f"{name}: FINDING: it does not end")
        return False


def run_one(name: str, minutes: float) -> bool:
    say(f"{name}: {minutes:g} minutes")
    if name in native.TARGETS:
        with tempfile.TemporaryDirectory(prefix="fl.") as work:
            return run_native(name, 60 * minutes, Path(work))
    if name == GUEST:
        if reason := kvm_missing():
            say(f"{name}: left out: {reason}")
            return True
        return run_module("tests.fuzz.guest", name, minutes)
    return run_module("tests.fuzz", name, minutes, name)


def usage(wrong: str) -> int:
    print(f"fuzz: {wrong}\nusage: deploy/fuzz.sh [--jobs N] MINUTES [TARGET…] | --list", file=sys.stderr)
    return 2


def main(arguments: list[str]) -> int:
    about = {name: target.about for name, target in (*native.TARGETS.items(), *TARGETS.items())} | {GUEST: ABOUT_GUEST}
    if arguments == ["--list"]:
        for name, text in about.items():
            say(f"{name:18} {text}")
        return 0
    jobs = 1
    if arguments[:1] == ["--jobs"]:
        number, arguments = "".join(arguments[1:2]), arguments[2:]
        if not number.isdecimal() or not 0 < (jobs := int(number)) <= MOST_JOBS:
            return usage(f"--jobs {number}: how many targets at a time? 1 to {MOST_JOBS}")
    try:
        minutes = float(arguments[0])
    except (IndexError, ValueError):
        return usage("how many minutes for each target?")
    if not 0 < minutes < 10_000:
        return usage(f"{arguments[0]} minutes?")
    names = arguments[1:] or list(about)
    if unknown := [name for name in names if name not in about]:
        return usage(f"no target is called {unknown[0]}; there are {', '.join(about)}")
    try:
        if set(names) & set(native.TARGETS):
            install_clang()
        with ThreadPoolExecutor(jobs) as pool:
            fine = list(pool.map(run_one, names, repeat(minutes)))
        failed = [name for name, was_fine in zip(names, fine, strict=True) if not was_fine]
    except (SetupError, HostError) as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 1
    say(f"fuzz: {len(names)} targets, findings in {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
