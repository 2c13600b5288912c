"""`flotilla chaos`: the command line, the table, the report.

Exit codes: 0 everything came back and nothing was lost, 1 data was lost, a process did not come back, the guest
did not go on or the campaign could not be done, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TextIO, TypeVar

from chaos.campaign import Campaign, Checks, Outcome, Result
from chaos.client import Api, Gone, Refused
from chaos.schedule import DEFAULT_KINDS, DEFAULT_PROCESSES, Injection, Plan, schedule
from chaos.verify import Image
from shared.errors import ConfigError, FlotillaError, HostError, StateError
from shared.faults import Kind, Process

E = TypeVar("E", bound=StrEnum)

DESCRIPTION: Final = """\
Make processes of a running VM fail at random and see whether each comes back and the guest's data stays whole.
The VMM must have been started with --allow-fault-injection. The same seed gives the same schedule.
"""
COLUMNS: Final = ("process", "injected", "recovered", "median_stall_ms", "worst_stall_ms", "lost")


def parse_argv(argv: Sequence[str]) -> argparse.Namespace:
    """Raises SystemExit: 2 for a mistake, 0 for --help."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("flotilla chaos", description=DESCRIPTION, formatter_class=form)
    parser.add_argument("--api-socket", required=True, metavar="PATH", help="the VMM's API socket")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="[default: 1]")
    parser.add_argument("--minutes", type=_positive(float), metavar="M", help="how long [default: 1]")
    parser.add_argument("--count", type=_positive(int), metavar="N", help="how many injections, instead of --minutes")
    parser.add_argument("--kinds", type=_words(Kind), default=DEFAULT_KINDS, metavar="K,…",
                        help=f"of {', '.join(Kind)} [default: {','.join(DEFAULT_KINDS)}]")  # fmt: skip
    parser.add_argument("--processes", type=_words(Process), metavar="P,…",
                        help=f"of {', '.join(DEFAULT_PROCESSES)} [default: all that the VM has]")  # fmt: skip
    parser.add_argument("--rate", type=_positive(float), default=1.0, metavar="R",
                        help="injections a second [default: 1]")  # fmt: skip
    parser.add_argument("--verify", action="append", default=[], metavar="IMAGE",
                        help="a raw image that the probe guest writes: looked at with the VM paused")  # fmt: skip
    parser.add_argument("--verify-command", action="append", default=[], metavar="CMD",
                        help="a shell command that fails when the guest's data is not what it should be")  # fmt: skip
    parser.add_argument("--verify-every", type=_positive(int), default=10, metavar="N",
                        help="verify after so many injections, and at the end [default: 10]")  # fmt: skip
    parser.add_argument("--report", metavar="FILE", help="everything as JSON")
    parser.add_argument("--quiet", action="store_true", help="only the table")
    parser.add_argument("--dry-run", action="store_true", help="print the schedule and do nothing")
    return parser.parse_args(argv)


def _positive(number: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = number(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
        return value

    return convert


def _words(words: type[E]) -> Callable[[str], tuple[E, ...]]:
    def convert(text: str) -> tuple[E, ...]:
        found = []
        for word in text.split(","):
            if word not in list(words):
                raise argparse.ArgumentTypeError(f"unknown: {word!r}; there are: {', '.join(words)}")
            found.append(words(word))
        return tuple(dict.fromkeys(found))

    return convert


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _run(parse_argv(sys.argv[1:] if argv is None else argv))
    except FlotillaError as error:
        print(f"flotilla chaos: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    """Raises FlotillaError for a campaign that can't begin, and for a report that can't be written."""
    api = Api(options.api_socket)
    images = tuple(Image(path) for path in options.verify)
    plan = _plan(api, options)
    injections = _schedule(plan)
    if options.dry_run:
        for each in injections:
            print(json.dumps(_injection(each)))
        return 0
    report = _open(options.report)
    checks = Checks(images, tuple(options.verify_command), options.verify_every)
    tell = (lambda _: None) if options.quiet else _say
    began = time.monotonic()
    result = Campaign(api, injections, checks, tell).run()
    seconds = time.monotonic() - began
    _print_table(result)
    if report is not None:
        _write(report, _report(plan, injections, result, seconds))
    return {Outcome.OK: 0, Outcome.INTERRUPTED: 130}.get(result.outcome, 1)


def _say(line: str) -> None:
    print(line, flush=True)


def _plan(api: Api, options: argparse.Namespace) -> Plan:
    """Of what the VM has. Raises FlotillaError."""
    api.check()
    try:
        state = api.get("vm.info")["state"]
        there = {row["kind"] for row in api.get("vmm.fleet")}
    except (Refused, Gone) as error:
        raise StateError(f"no VM to play with at --api-socket {options.api_socket}: {error}") from error
    if state != "Running":
        raise StateError(f"the VM's state is {state}", "a campaign needs one that runs")
    wanted = options.processes or tuple(process for process in DEFAULT_PROCESSES if process in there)
    for process in wanted:
        if process not in there:
            has = f"it has: {', '.join(sorted(there))}"
            raise ConfigError(f"--processes: this VM has no {process} process now", has)
    seconds = None if options.count and not options.minutes else 60.0 * (options.minutes or 1.0)
    return Plan(options.seed, options.kinds, wanted, options.rate, seconds, options.count)


def _schedule(plan: Plan) -> list[Injection]:
    try:
        return schedule(plan)
    except ValueError as error:
        raise ConfigError(f"--kinds, --processes: {error}") from None


def _open(path: str | None) -> TextIO | None:
    """Before the campaign: nobody wants to hear of it afterwards."""
    try:
        return None if path is None else Path(path).open("w")
    except OSError as error:
        raise HostError(f"--report {path}: {error.strerror}") from error


def _write(file: TextIO, report: dict[str, Any]) -> None:
    try:
        with file:
            json.dump(report, file, indent=1)
    except OSError as error:
        raise HostError(f"--report {file.name}: {error.strerror}") from error


def _injection(each: Injection) -> dict[str, Any]:
    return {
        "at_s": each.at_s, "process": str(each.process), "index": each.index, "fault": str(each.kind), **each.fields
    }  # fmt: skip


def _report(plan: Plan, injections: Sequence[Injection], result: Result, seconds: float) -> dict[str, Any]:
    return {
        "seed": plan.seed, "seconds": round(seconds, 3), "outcome": str(result.outcome), "why": result.why or None,
        "verifications": result.verifications, "rows": result.rows(),
        "injections": [
            {
                "number": each.number, "at_s": each.at_s, "process": each.process, "kind": str(each.kind),
                "fault": str(each.fault), "pid": each.pid, "recovered": each.recovered, "stall_ms": each.stall_ms,
            }
            for each in result.struck
        ],
        "schedule": [_injection(each) for each in injections],
    }  # fmt: skip


def _print_table(result: Result) -> None:
    lines = [[column.replace("_", " ") for column in COLUMNS]]
    for row in result.rows():
        lines.append(["-" if row[column] is None else str(row[column]) for column in COLUMNS])
    widths = [max(len(line[at]) for line in lines) for at in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"{result.outcome}{': ' + result.why if result.why else ''}; verified {result.verifications} times")


if __name__ == "__main__":
    sys.exit(main())
