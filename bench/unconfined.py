"""Our VMM without its sandbox, for comparison: no program of ours can be started so, this is the bench's doing.

Workers get the profile of somebody who gives up nothing: no namespaces, the host's files, all capabilities. Together
with `--seccomp false` nothing is left of the walls but rlimits and no_new_privs, which cost nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

LAST_LINE: Final = "sys.exit(main())"
ZYGOTE: Final = "from bench.unconfined import open_zygote; open_zygote(); "


def argv(ours: list[str]) -> list[str]:
    """The command that starts it, from the one that starts ours: a launcher, or an interpreter with its code."""
    if len(ours) == 1:
        first, _, body = Path(ours[0]).read_text().partition("\n")
        ours = [*first.removeprefix("#!").split(), "-c", body]
    assert ours[-1].rstrip().endswith(LAST_LINE)
    body = ours[-1].rstrip().removesuffix(LAST_LINE)
    return [*ours[:-1], f"{body}from bench.unconfined import open_controller; open_controller(); {LAST_LINE}"]


def open_controller() -> None:
    """Every zygote that this process starts opens its profiles first."""
    from controller import spawn

    confined = spawn.exec_python
    spawn.exec_python = lambda code, arguments, fds: confined(ZYGOTE + code, arguments, fds)


def open_zygote() -> None:
    from shared import sandbox

    everything = tuple(range(sandbox.CAP_LAST_CAP + 1))
    for name in sandbox.PROFILES:
        sandbox.PROFILES[name] = sandbox.Profile(0, files=True, capabilities=everything)
