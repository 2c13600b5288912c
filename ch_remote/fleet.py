"""`fleet --watch`: the processes of a VM as a table that stays up to date, until Ctrl-C or the VMM's end."""

from __future__ import annotations

import os
import sys
import time

from ch_remote import report
from ch_remote.arguments import Command
from ch_remote.bar import rest
from ch_remote.http import Connection, Response, ServerGone
from shared.errors import HostError

INTERVAL = 1.0
_HOME_AND_CLEAR = "\033[H\033[J"


def watch(path: str, command: Command) -> int:
    """On a terminal the table is drawn in place; elsewhere it is printed again when it changed, after an empty line."""
    last: list[str] = []
    while True:
        began = time.monotonic()
        try:
            with Connection(path) as connection:
                response: Response = connection.request(command.verb.method, command.verb.target)
        except HostError:
            if not last:
                raise
            sys.stderr.write("The VMM has ended.\n")
            return 0
        except ServerGone:  # perhaps its API process alone: that has a successor, and somebody listens all the time
            if not last:
                raise
            time.sleep(INTERVAL)
            continue
        if not report.succeeded(response):
            report.print_refusal(response)
            return 1
        lines = report.table(response)
        if lines != last:
            _show(lines, first=not last)
        last = lines
        time.sleep(max(INTERVAL, rest(began)))


def _show(lines: list[str], *, first: bool) -> None:
    if sys.stdout.isatty():
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        shown = [line[: columns or 80] for line in lines[: max(1, (rows or 25) - 1)]]
        sys.stdout.write(_HOME_AND_CLEAR + "".join(f"{line}\n" for line in shown))
    else:
        sys.stdout.write(("" if first else "\n") + "".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
