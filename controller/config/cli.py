"""The command line of `cloud-hypervisor`: argv to Options.

Mistakes of usage (unknown flag, missing value) end the process as clap does: a message on stderr, exit code
2. What a value means is a matter of configuration: ConfigError, which the caller prints and turns into exit
code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import Enum

from controller.config import flags, options, version
from controller.config.model import (
    ConsoleConfig,
    CpusConfig,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from controller.config.validate import validate
from shared.errors import ConfigError
from shared.grammar import expand_home, integer, parse, path
from shared.log import Level
from shared.records import Record
from shared.typed import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from controller.config.metrics import MetricsTarget
    from controller.config.worker_uid import WorkerUid

T = TypeVar("T")


class Seccomp(Enum):
    """What a forbidden system call leads to; the value is the command line's word."""

    TRAP = "true"
    OFF = "false"
    LOG = "log"
    ERRNO = "errno"


class Target(Record):
    """A path, or a file descriptor that this process inherited; exactly one of the two."""

    path: str | None = None
    fd: int | None = None


class Options(Record):
    """The command line, understood. `vm` is None for a VMM that waits for vm.create or a migration."""

    vm: VmConfig | None
    api_socket: Target | None
    event_monitor: Target | None
    log_file: str | None
    log_level: Level
    no_shutdown: bool
    seccomp: Seccomp
    cgroup: str = ""
    allow_fault_injection: bool = False
    metrics: MetricsTarget | None = None
    worker_uid: WorkerUid | None = None


def parse_argv(argv: Sequence[str]) -> Options:
    """Understand argv (without the program's name).

    Raises ConfigError for what a value says, SystemExit(2) for a mistake of usage (after printing it on
    stderr), and SystemExit(0) for --help and --version (after printing those on stdout).
    """
    if not argv:
        sys.stderr.write(flags.help_text())
        raise SystemExit(2)
    given = _scan(argv)
    if "--version" in given:
        _print_version("-v" in given)
    vm = _vm_config(given)
    api_socket = _target(given, "--api-socket", bare_path=True)
    if vm is None and api_socket is None:
        usage_error(
            "neither a VM to boot nor a way to ask for one", "give --kernel <PATH> or --api-socket <PATH>"
        )
    log_file = _single(given, "--log-file", expand_home)
    return Options(
        vm=vm,
        api_socket=api_socket,
        event_monitor=_target(given, "--event-monitor"),
        log_file=log_file or None,
        log_level=Level(min(Level.WARN + len(given.get("-v", ())), Level.TRACE)),
        no_shutdown="--no-shutdown" in given,
        seccomp=_single(given, "--seccomp", _seccomp) or Seccomp.TRAP,
        cgroup=_single(given, "--cgroup", expand_home) or "",
        allow_fault_injection="--allow-fault-injection" in given,
        metrics=_metrics(given),
        worker_uid=_single(given, "--worker-uid", _worker_uid),
    )


def usage_error(message: str, tip: str = "") -> NoReturn:
    """End the process as clap does."""
    tip = f"\n\n  tip: {tip}" if tip else ""
    sys.stderr.write(f"error: {message}{tip}\n\n{flags.USAGE}\n\nFor more information, try '--help'.\n")
    raise SystemExit(2)


def _scan(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag, in order; -v has one entry per v. Ends the process on a mistake, and for
    --help.
    """
    given: dict[str, list[str]] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        name, equals, attached = word.partition("=")
        if name.startswith("-") and not name.startswith("--") and len(name) > 1:
            _short_flags(word, given)
            continue
        flag = flags.FLAGS.get(name)
        if flag is None:
            _long_flag(name, given, word)
            continue
        values = [attached] if equals else []
        if not flag.value:
            if equals:
                usage_error(f"unexpected value '{attached}' for '{name}' found; no more were expected")
        elif not equals or flag.many:
            while position < len(argv) and not _is_flag(argv[position]) and (flag.many or not values):
                values.append(argv[position])
                position += 1
            if not values:
                what = f"{name} <{flag.value}>" + ("..." if flag.many else "")
                usage_error(f"a value is required for '{what}' but none was supplied")
        if name in given and not flag.many:
            usage_error(f"the argument '{name}' cannot be used multiple times")
        given.setdefault(name, []).extend(values)
    return given


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _short_flags(word: str, given: dict[str, list[str]]) -> None:
    for letter in word[1:]:
        if letter == "v":
            given.setdefault("-v", []).append("")
        elif letter == "V":
            given["--version"] = []
        elif letter == "h":
            _print_help()
        else:
            usage_error(f"unexpected argument '-{letter}' found")


def _long_flag(name: str, given: dict[str, list[str]], word: str) -> None:
    """A word that is no flag of the table: --help, --version, a flag we refuse, or a mistake."""
    if word == "--help":
        _print_help()
    if word == "--version":
        given["--version"] = []
        return
    if name in flags.REFUSED:
        usage_error(f"{name} is not available yet in this version of Flotilla ({flags.REFUSED[name]})")
    if not name.startswith("--") or name == "--":
        usage_error(f"unexpected argument '{word}' found")
    import difflib

    similar = difflib.get_close_matches(name, flags.FLAGS, 1)
    usage_error(
        f"unexpected argument '{name}' found",
        f"a similar argument exists: '{similar[0]}'" if similar else "",
    )


def _print_help() -> NoReturn:
    sys.stdout.write(flags.help_text())
    raise SystemExit(0)


def _print_version(verbose: bool) -> NoReturn:
    lines = [
        f"cloud-hypervisor {version.BUILD_VERSION}",
        f"Migration Protocol Versions: {version.MIGRATION_PROTOCOLS}",
    ]
    if verbose:
        lines.append(f"Enabled features: [{', '.join(version.FEATURES)}]")
    print("\n".join(lines))
    raise SystemExit(0)


def _single(given: dict[str, list[str]], name: str, convert: Callable[[str], T]) -> T | None:
    values = given.get(name)
    return convert(values[0]) if values else None


def _seccomp(text: str) -> Seccomp:
    try:
        return Seccomp(text)
    except ValueError:
        words = ", ".join(mode.value for mode in Seccomp)
        usage_error(f"invalid value '{text}' for '--seccomp <MODE>'\n  [possible values: {words}]")


def _worker_uid(text: str) -> WorkerUid:
    from controller.config.worker_uid import parse

    return parse(text)


def _target(given: dict[str, list[str]], name: str, bare_path: bool = False) -> Target | None:
    """`path=P` or `fd=N`; where bare_path, a string without either is the path itself."""
    text = _single(given, name, str)
    if text is None:
        return None
    if bare_path and not text.startswith(("path=", "fd=")):
        found: dict[str, object] = {"path": expand_home(text)} if text else {}
    else:
        try:
            found = parse(text, {"path": path, "fd": integer})
        except ConfigError as error:
            raise ConfigError(f"Error parsing {name} {text}") from error
    if len(found) != 1:
        raise ConfigError(
            f"Error parsing {name} {text}", "expected a path, or fd= and a number, and not both"
        )
    return Target(**found)  # type: ignore[arg-type]


def _metrics(given: dict[str, list[str]]) -> MetricsTarget | None:
    """Where the metrics exporter is to listen."""
    address, path = _single(given, "--metrics", str), _single(given, "--metrics-socket", expand_home)
    if address is None and path is None:
        return None
    if address is not None and path is not None:
        usage_error("the argument '--metrics <ADDRESS>' cannot be used with '--metrics-socket <PATH>'")
    from controller.config.metrics import parse_address, parse_path

    return parse_address(address) if address is not None else parse_path(path or "")


def _vm_config(given: dict[str, list[str]]) -> VmConfig | None:
    kernel = _single(given, "--kernel", expand_home)
    if kernel is None:
        orphans = [name for name in given if name in flags.FLAGS and flags.FLAGS[name].vm]
        if orphans:
            usage_error(
                "the following required arguments were not provided:\n  --kernel <PATH>",
                f"{', '.join(orphans)} describe{'s' if len(orphans) == 1 else ''} a VM, which needs something to boot",
            )
        return None
    config = VmConfig(
        payload=PayloadConfig(
            kernel=kernel,
            cmdline=_single(given, "--cmdline", str),
            initramfs=_single(given, "--initramfs", expand_home),
        ),
        cpus=_single(given, "--cpus", options.cpus) or CpusConfig(),
        memory=_single(given, "--memory", options.memory) or MemoryConfig(),
        disks=tuple(options.disk(text) for text in given.get("--disk", ())),
        net=tuple(options.net(text) for text in given.get("--net", ())),
        rng=_single(given, "--rng", options.rng) or RngConfig(),
        serial=_single(given, "--serial", options.serial) or SerialConfig(),
        console=_single(given, "--console", options.console) or ConsoleConfig(),
    )
    validate(config)
    return config
