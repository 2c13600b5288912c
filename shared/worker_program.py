"""A worker as a program of its own: what `worker-upgrade --exec PATH` starts, of this release and of any other.

    zygote forks ──▶ confine ──▶ exec PATH worker --task=FD ──▶ the sandbox's next steps ──▶ main(start) of the package

docs/worker-upgrade.md is the contract: the task's fields, the descriptors, what is to be done before `hello` is
answered. `flotilla worker --task=FD` is this file; the zygote uses the first half for what it forks itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from shared import log
from shared.errors import ConfigError, FlotillaError, ProtocolError
from shared.linux import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, set_name
from shared.reactor import describe
from shared.typed import Any, Final, NoReturn

LAST_WORDS_BYTES: Final = 1024  # what is read of them (controller/spawn.py)
MAX_TASK: Final = 1 << 20
WORD, OPTION = "worker", "--task="
# As the zygote has them: what is imported when a request comes would find no file any more.
PRELOADED: Final = ("msgpack", "shared.control", "shared.vhost_backend")
# The variables that the program gets. Not PYTHONPATH and its like: they are about the release that starts it.
ENVIRONMENT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR")


def carry_out(main: Callable[[], int], last_words: int) -> NoReturn:
    """Run a worker and end this process with its code. Why it could not go on is written to `last_words`, for the
    controller, which logs it under the worker's name."""
    code = 70
    try:
        code = main()
    except BaseException as error:
        code = 1
        if not isinstance(error, (FlotillaError, OSError)):  # a bug: where it is counts
            code = 70
            print_trace(error)
        os.write(last_words, describe(error).encode()[:LAST_WORDS_BYTES])
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def print_trace(error: BaseException) -> None:
    """Where it came from. Not traceback.print_exc, which opens source files: a sealed process may not."""
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        print(f"  File {code.co_filename}, line {at.tb_lineno}, in {code.co_name}", file=sys.stderr)
        at = at.tb_next
    print(describe(error), file=sys.stderr)


def become(path: str, task: Mapping[str, Any]) -> NoReturn:
    """Go on as another program in this process, which confine(execs=True) has been done for. `task`: all but the
    contract's version; its descriptors stay open. Raises OSError when the program can't be executed."""
    import json

    from shared.worker import CONTRACT

    text = json.dumps({"contract": CONTRACT, **task}).encode()
    fd = os.memfd_create("task", os.MFD_ALLOW_SEALING)
    os.write(fd, text)
    os.lseek(fd, 0, os.SEEK_SET)
    import fcntl

    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    for kept in (*task["fds"].values(), task["last_words"], task["log"]["fd"]):
        os.set_inheritable(kept, True)
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    os.execve(path, [path, WORD, f"{OPTION}{fd}"], environment)


def read_task(arguments: Sequence[str]) -> dict[str, Any]:
    """The task that `worker --task=FD` names. Raises ConfigError, and ProtocolError for another contract's."""
    import json

    from shared.worker import CONTRACT

    if len(arguments) != 1 or not arguments[0].startswith(OPTION) or not arguments[0][len(OPTION) :].isdigit():
        raise ConfigError(f"{WORD} {OPTION}FD is for ch-remote's worker-upgrade --exec, not for people")
    fd = int(arguments[0][len(OPTION) :])
    try:
        text = os.pread(fd, MAX_TASK, 0)
        os.close(fd)
        task = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{WORD} {arguments[0]}: this descriptor has no task: {error}") from error
    if not isinstance(task, dict) or task.get("contract") != CONTRACT:
        found = task.get("contract") if isinstance(task, dict) else None
        raise ProtocolError(f"a task of contract {found!r}, this program has contract {CONTRACT}")
    return task


def main(arguments: Sequence[str]) -> NoReturn:
    """Carry a task out. `arguments`: those behind `worker`. Raises FlotillaError for a task that can't be read, and
    never returns."""
    task = read_task(arguments)
    carry_out(lambda: _worker(task), task["last_words"])


def _worker(task: Mapping[str, Any]) -> int:
    import gc
    from importlib import import_module

    from shared import sandbox
    from shared.ancestry import Ancestry
    from shared.worker import Start

    set_name(task["name"].lstrip("_") or task["kind"])
    settings = task["log"]
    log.configure(log.Level(settings["level"]), settings["fd"], task["name"], settings["began"])
    for fd in (*task["fds"].values(), task["last_words"], settings["fd"]):
        os.set_inheritable(fd, False)
    ancestry = Ancestry(*task["parent"])
    ancestry.die_with_parent()
    calls = sandbox.list_for(task["module"])
    box = sandbox.confined(
        task["sandbox"], calls, task["seccomp"], task["user"], ancestry.settle, own_mounts=task["own_mounts"]
    )
    for name in PRELOADED:
        import_module(name)
    module = import_module(task["module"])
    gc.freeze()
    gc.enable()
    start = Start(
        task["kind"],
        task["name"],
        task["spec"],
        task["fds"],
        task["endpoint"],
        box,
        ancestry.pid,
        task["standby"],
    )
    code: int = module.main(start)
    return code
