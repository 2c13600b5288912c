"""What the user gets to see: answers verbatim, errors as Cloud Hypervisor's numbered chain.

Messages and cells may quote a worker or a migration's peer: they are shown as one line that moves no cursor.
"""

from __future__ import annotations

import sys
from typing import Any

from ch_remote.http import Response
from shared.errors import chain
from shared.visible import visible

_STATUS = {
    100: "Continue",
    200: "OK",
    204: "NoContent",
    400: "BadRequest",
    404: "NotFound",
    429: "TooManyRequests",
    500: "InternalServerError",
    501: "NotImplemented",
}
_PROGRAM = "Error: ch-remote exited with the following"


def succeeded(response: Response) -> bool:
    return response.status in (200, 204)


def print_body(response: Response) -> None:
    """The body as the server sent it, and a newline; nothing if there is none."""
    if response.body:
        sys.stdout.write(response.body.decode(errors="replace") + "\n")
        sys.stdout.flush()


def print_error(error: BaseException, *context: str) -> None:
    """An error and its causes, below the lines of `context`, on stderr."""
    # A system call's error is in our message already; the chain would say it twice.
    messages = [*context, *(text for text in chain(error) if not text.startswith("[Errno"))]
    if len(messages) == 1:
        sys.stderr.write(f"{_PROGRAM} error:\n  {visible(messages[0])}\n")
        return
    _print_chain(messages)


def print_refusal(response: Response) -> None:
    """The server's error answer: its JSON array of strings continues the chain."""
    name = _STATUS.get(response.status, "Unknown")
    messages = ["http client error", f"Server responded with {name}"]
    if not response.body:
        _print_chain(messages)
        return
    reasons, problem = _reasons(response.body)
    _print_chain(messages + reasons)
    if problem:
        body = visible(response.body.decode(errors="replace"))
        sys.stderr.write(
            f"  X: Can't get remote's error messages from JSON response: {problem}: body='{body}'\n"
        )


def _print_chain(messages: list[str]) -> None:
    lines = [f"  {level}: {visible(message)}\n" for level, message in enumerate(messages)]
    sys.stderr.write(f"{_PROGRAM} chain of errors:\n{''.join(lines)}")


def _reasons(body: bytes) -> tuple[list[str], str]:
    """The strings of an error array, or none and what is wrong with the body."""
    import json

    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        return [], str(error)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return [], "not an array of strings"
    return value, ""


def table(response: Response) -> list[str]:
    """The lines of vmm.fleet's processes, with the server's keys as columns; the body itself if it is no such list."""
    import json

    try:
        value: Any = json.loads(response.body)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = value.get("processes")
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return [visible(line) for line in response.body.decode(errors="replace").splitlines()]
    columns = list(dict.fromkeys(key for row in value for key in row))
    rows = [[visible(key.upper()) for key in columns], *([_cell(row.get(key)) for key in columns] for row in value)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def print_table(response: Response) -> None:
    """See table()."""
    sys.stdout.write("".join(f"{line}\n" for line in table(response)))
    sys.stdout.flush()


def _cell(value: object) -> str:
    if isinstance(value, list):
        return visible(" ".join(map(str, value))) or "-"
    return "-" if value is None else visible(str(value))
