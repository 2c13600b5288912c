"""What a killed controller would leave behind: names in the file system, and a terminal in raw mode.

Written down from the VM's first moment. The janitor, which comes up later and may have successors, is told all of it,
and from then on of each change (services.py).
"""

from __future__ import annotations

from collections.abc import Callable

from shared.typed import Any


class Leavings:
    """`terminal`: the descriptor of one that is raw now, and its settings before (termios.tcgetattr)."""

    def __init__(self, *paths: str) -> None:
        self.paths = list(paths)
        self.terminal: tuple[int, list[Any]] | None = None
        self.on_path: Callable[[str, bool], None] = lambda _path, _exists: None
        self.on_terminal: Callable[[], None] = lambda: None

    def path(self, path: str, exists: bool) -> None:
        """A socket of ours has appeared, or is gone."""
        if exists:
            self.paths.append(path)
        elif path in self.paths:
            self.paths.remove(path)
        self.on_path(path, exists)

    def raw_terminal(self, fd: int, attributes: list[Any] | None) -> None:
        """A terminal is raw now and had these settings before; None: it is as it was."""
        self.terminal = None if attributes is None else (fd, attributes)
        self.on_terminal()
