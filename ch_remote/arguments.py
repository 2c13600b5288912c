"""argv of `ch-remote` to a Command; clap's manners: usage errors on stderr with exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from ch_remote.verbs import OPTIONS, REFUSED, REFUSED_FLAGS, USAGE, VERBS, Verb, help_text

# The same string as the VMM's --version; a test compares them.
VERSION = "v53.0-flotilla-0.1.0"


class Command(NamedTuple):
    """What to do. argument is None where an optional one was not given; flags and options hold those that were."""

    api_socket: str | None
    name: str
    verb: Verb
    argument: str | None
    flags: frozenset[str]
    options: dict[str, str]


def usage_error(message: str, tip: str = "") -> NoReturn:
    tip = f"\n\n  tip: {tip}" if tip else ""
    sys.stderr.write(f"error: {message}{tip}\n\n{USAGE}\n\nFor more information, try '--help'.\n")
    raise SystemExit(2)


def parse_argv(argv: Sequence[str]) -> Command:
    """Understand argv (without the program's name). Options may stand anywhere.

    Raises SystemExit: 2 for a mistake, 0 for --help and --version, each after printing.
    """
    if not argv:
        sys.stderr.write(help_text())
        raise SystemExit(2)
    api_socket: str | None = None
    words: list[str] = []
    flags: set[str] = set()
    options: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--api-socket":
            if api_socket is not None:
                usage_error("the argument '--api-socket' cannot be used multiple times")
            api_socket = value if equals else next(rest, "")
            if not api_socket or (not equals and api_socket.startswith("-")):
                usage_error("a value is required for '--api-socket <PATH>' but none was supplied")
        elif name in OPTIONS:
            if name in options:
                usage_error(f"the argument '{name}' cannot be used multiple times")
            options[name] = value if equals else next(rest, "")
            if not options[name] or (not equals and options[name].startswith("-")):
                usage_error(f"a value is required for '{name}' but none was supplied")
        elif word in ("-h", "--help") or (word == "help" and not words):
            _say(help_text())
        elif word in ("-V", "--version"):
            _say(f"ch-remote {VERSION}\n")
        elif name in REFUSED_FLAGS:
            usage_error(
                f"{name} is not available yet in this version of Flotilla", "use --api-socket <PATH>"
            )
        elif word.startswith("-") and word != "-":
            flags.add(word)
        else:
            words.append(word)
    if not words:
        usage_error("a command is missing" if not flags else f"unexpected argument '{min(flags)}' found")
    return _command(api_socket, words, flags, options)


def _command(api_socket: str | None, words: list[str], flags: set[str], options: dict[str, str]) -> Command:
    name, *arguments = words
    verb = VERBS.get(name)
    if verb is None:
        if name in REFUSED:
            usage_error(f"{name} is not available yet in this version of Flotilla")
        import difflib

        similar = difflib.get_close_matches(name, VERBS, 1)
        tip = f"a similar command exists: '{similar[0]}'" if similar else ""
        usage_error(f"unrecognized subcommand '{name}'", tip)
    if unknown := (flags - set(verb.flags)) | (options.keys() - {option for option, _ in verb.options}):
        usage_error(f"unexpected argument '{min(unknown)}' found for {name}")
    if len(arguments) > (1 if verb.argument else 0):
        usage_error(f"unexpected argument '{arguments[-1]}' found for {name}")
    if not arguments and verb.argument and not verb.argument.startswith("["):
        usage_error(f"the following required arguments were not provided for {name}:\n  <{verb.argument}>")
    if api_socket is not None and api_socket.startswith("~/"):
        api_socket = os.path.expanduser(api_socket)
    return Command(api_socket, name, verb, arguments[0] if arguments else None, frozenset(flags), options)


def _say(text: str) -> NoReturn:
    sys.stdout.write(text)
    raise SystemExit(0)
