"""What has been made, and how it is taken apart again: `contextlib.ExitStack` without its 2 ms of import (ADR 0005)."""

from __future__ import annotations

from collections.abc import Callable

from shared.typed import Any


class Undo:
    """Callbacks, called in reverse order by close(). As a context: closed when the block raises, kept otherwise."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def add(self, step: Callable[..., object], *arguments: Any) -> None:
        self._steps.append((step, arguments))

    def close(self) -> None:
        """Idempotent. A step that raises does not keep the others from being taken; the first error is raised."""
        failure: BaseException | None = None
        while self._steps:
            step, arguments = self._steps.pop()
            try:
                step(*arguments)
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.close()
