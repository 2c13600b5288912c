"""The names of `typing` that code on the boot path needs when it runs; importing `typing` itself takes 5 to 10 ms.

A type checker sees the real ones. At run time annotations are not evaluated (`from __future__ import annotations`), so
what is left are base classes, type variables and cast().
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take a variable of this name for true

if TYPE_CHECKING:
    from typing import Any as Any
    from typing import Final as Final
    from typing import Generic as Generic
    from typing import NoReturn as NoReturn
    from typing import Protocol as Protocol
    from typing import Self as Self
    from typing import TypeVar as TypeVar
    from typing import cast as cast
    from typing import dataclass_transform as dataclass_transform
else:

    class Any:
        """Stands in an alias such as `dict[str, Any]`."""

    Final = NoReturn = Self = Any

    class TypeVar:
        def __init__(self, name, *_, **__):
            self.__name__ = name

    class Generic:
        __slots__ = ()

        def __class_getitem__(cls, _):
            return cls

    class Protocol(Generic):
        __slots__ = ()

    def cast(_, value):
        return value

    def dataclass_transform(**_):
        return lambda cls: cls
