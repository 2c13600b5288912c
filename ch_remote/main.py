"""`ch-remote`: parse, ask, print. Exit codes: 0 done, 1 failed, 2 not understood, 130 cancelled by Ctrl-C."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from ch_remote import fleet, report
from ch_remote.arguments import Command, parse_argv
from ch_remote.bar import TICK_SECONDS, Bar, rest
from ch_remote.devices import net_body
from ch_remote.faults import fault_body
from ch_remote.http import Connection, Interrupts, Response, ServerGone
from ch_remote.migration import receive_body, send_body
from ch_remote.verbs import MIGRATIONS, VERBS
from shared.errors import ConfigError, FlotillaError, HostError
from shared.grammar import integer

INTERRUPTED = 130
# Of migration-progress --watch, in seconds.
WATCH_INTERVAL = 0.2
# States of a migration after which nothing follows, in lower case.
FINAL_STATES = ("completed", "cancelled", "failed")
_CLIENT_ERROR = "http client error"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: without the program's name; the process's own by default."""
    try:
        command = parse_argv(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    try:
        return _run(command)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output is gone: what is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _run(command: Command) -> int:
    path = command.api_socket
    if path is None:
        report.print_error(ConfigError("The API socket is not given", "add --api-socket=PATH"))
        return 1
    try:
        body, fds = _request_body(command)
    except ConfigError as error:
        report.print_error(error, f"Error parsing the argument of {command.name}")
        return 1
    except HostError as error:
        report.print_error(error)
        return 1
    try:
        if command.name in MIGRATIONS:
            return _migrate(path, command, body)
        if "--watch" in command.flags:
            return fleet.watch(path, command) if command.name == "fleet" else _watch(path, command)
        with Connection(path) as connection:
            return _finish(connection.request(command.verb.method, command.verb.target, body, fds), command)
    except HostError as error:
        sys.stderr.write(f"Error opening HTTP socket: {error}\n")
        return 1
    except FlotillaError as error:
        report.print_error(error, _CLIENT_ERROR)
        return 1


def _request_body(command: Command) -> tuple[bytes | None, Sequence[int]]:
    """And the descriptors that go with it. Raises ConfigError for a migration's or a device's argument, HostError for
    a file that can't be read and a descriptor that is not open."""
    fds: Sequence[int] = ()
    if command.name == "create":
        return _read(command.argument or "-"), fds
    if command.name == "migration-resolve":
        return _resolution(command), fds
    if command.name == "worker-upgrade":
        return _upgrade(command), fds
    if command.argument is None or command.name not in (*MIGRATIONS, "add-net", "fault-inject"):
        return None, fds
    if command.name == "add-net":
        body, fds = net_body(command.argument)
    elif command.name == "fault-inject":
        body = fault_body(command.argument)
    elif command.name == "send-migration":
        body = send_body(command.argument, "--local" in command.flags)
    else:
        body = receive_body(command.argument)
    import json

    return json.dumps(body, separators=(",", ":")).encode(), fds


def _upgrade(command: Command) -> bytes:
    """Only what was given: the VMM judges it. A path is relative to our folder, which is not the VMM's."""
    import json

    body: dict[str, Any] = {"id": command.argument}
    if "--exec" in command.options:
        body["exec"] = os.path.abspath(command.options["--exec"])
    if "--timeout-ms" in command.options:
        body["timeout_ms"] = integer("--timeout-ms", command.options["--timeout-ms"])
    return json.dumps(body, separators=(",", ":")).encode()


def _resolution(command: Command) -> bytes:
    if len(command.flags) != 1:
        raise ConfigError("migration-resolve: say where the guest is", "either --here or --there")
    return b'{"guest":"here"}' if "--here" in command.flags else b'{"guest":"there"}'


def _read(path: str) -> bytes:
    try:
        if path == "-":
            return sys.stdin.buffer.read()
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise HostError(f"create: cannot read {path}: {error.strerror}") from error


def _finish(response: Response, command: Command) -> int:
    if not report.succeeded(response):
        report.print_refusal(response)
        return 1
    if "--table" in command.flags:
        report.print_table(response)
    else:
        report.print_body(response)
    return 0


def _migrate(path: str, command: Command, body: bytes | None) -> int:
    """Wait for a migration's end. The first Ctrl-C cancels it and waits on; the second gives up waiting."""
    interrupted = False

    def give_up() -> None:
        raise KeyboardInterrupt

    def cancel() -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        sys.stderr.write("Cancelling the migration; Ctrl-C again stops waiting for it.\n")
        verb = VERBS["cancel-migration"]
        try:
            with Connection(path, interrupts, give_up) as second:
                answer = second.request(verb.method, verb.target)
        except FlotillaError as error:
            report.print_error(error, "The migration could not be cancelled")
            return
        if not report.succeeded(answer):
            report.print_refusal(answer)

    bar = Bar(path)
    with Interrupts() as interrupts, Connection(path, interrupts, cancel) as connection:
        if bar.visible:
            connection.tick = TICK_SECONDS, bar.tick
        try:
            response = connection.request(command.verb.method, command.verb.target, body)
        finally:
            bar.clear()
    code = _finish(response, command)
    if not interrupted:
        return code
    if code == 0:
        sys.stderr.write("The migration was completed before it could be cancelled.\n")
    return INTERRUPTED


def _watch(path: str, command: Command) -> int:
    """Print the progress whenever it changed, until the migration or the VMM has ended. On a terminal a bar instead,
    and the progress at the end."""
    last: Response | None = None
    bar = Bar(path, sys.stdout)
    while True:
        began = time.monotonic()
        try:
            with Connection(path) as connection:
                response = connection.request(command.verb.method, command.verb.target)
        except HostError:
            if last is None:
                raise
            bar.clear()
            sys.stderr.write("The VMM has ended, as a source does after a migration that succeeded.\n")
            return 0
        except ServerGone:  # perhaps its API process alone, as in fleet.watch
            if last is None:
                raise
            time.sleep(WATCH_INTERVAL)
            continue
        if not report.succeeded(response):
            report.print_refusal(response)
            return 1
        final = _state(response) in FINAL_STATES
        if final or (response != last and not bar.visible):
            bar.clear()
            report.print_body(response)
        elif bar.visible:
            bar.draw(_json(response))
        if final:
            return 0
        last = response
        time.sleep(max(WATCH_INTERVAL, rest(began)))


def _state(response: Response) -> str:
    return str(_json(response).get("state", "")).lower()


def _json(response: Response) -> dict[str, Any]:
    """The object in an answer, {} if there is none."""
    import json

    try:
        value = json.loads(response.body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
