"""Classes made of fields, without the price of `dataclasses` and `typing.NamedTuple` (docs/adr/0005-boot-imports.md).

    class Image(Record):                    frozen, slotted; equality and hash by value, of the same class only
        path: str
        fds: list[int] = field(default_factory=list)

    class Queue(Record, frozen=False):      may change, and so has no hash
        size: int = 128

    class Range(NamedTuple):                typing's, as far as we use it: a tuple with names, defaults and _replace()
        start: int
        size: int

Both are called like dataclasses; a call that does not fit raises TypeError. Type checkers know them
(`dataclass_transform`). No source code is generated, which costs a microsecond per instance and saves half a
millisecond per class.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

from shared.typed import TYPE_CHECKING, Any, Self, TypeVar, cast, dataclass_transform

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple

T = TypeVar("T")


class _Fresh:
    """A default that is made anew for each instance."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], T]) -> T:
    """The default of a field that no two instances may share."""
    return cast("T", _Fresh(default_factory))


class _Fields(type):
    """Takes a class's annotations for its fields, and what they are set to for the defaults."""

    _fields: tuple[str, ...]
    _field_defaults: dict[str, Any]

    @staticmethod
    def collect(namespace: dict[str, Any]) -> tuple[str, ...]:
        names = tuple(namespace.get("__annotations__", ()))
        namespace["_field_defaults"] = {name: namespace.pop(name) for name in names if name in namespace}
        namespace["_fields"] = namespace["__match_args__"] = names
        return names

    def bind(cls, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
        """One value per field. Raises TypeError."""
        values = list(arguments)
        for name in cls._fields[len(values) :]:
            if name in keywords:
                values.append(keywords.pop(name))
            elif name in cls._field_defaults:
                default = cls._field_defaults[name]
                values.append(default.make() if type(default) is _Fresh else default)
            else:
                raise TypeError(f"{cls.__name__}: {name} is missing")
        if keywords or len(values) > len(cls._fields):
            surplus = ", ".join(keywords) or f"{len(values)} values"
            raise TypeError(f"{cls.__name__}({', '.join(cls._fields)}) does not take {surplus}")
        return values


class _RecordType(_Fields):
    _setters: list[Callable[[Any, Any], None]]

    def __new__(meta, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, frozen: bool = True) -> Any:
        if any(getattr(base, "_fields", ()) for base in bases):
            raise TypeError(f"{name}: a record can't take over the fields of another")
        names = namespace["__slots__"] = meta.collect(namespace)
        if not frozen:
            namespace |= {"__setattr__": object.__setattr__, "__delattr__": object.__delattr__, "__hash__": None}
        cls: Any = super().__new__(meta, name, bases, namespace)
        # A slot's own setter does not go through __setattr__, so it serves a frozen instance, too.
        cls._setters = [cls.__dict__[field].__set__ for field in names]
        return cls


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Record(metaclass=_RecordType):
    """See the module."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        cls = type(self)
        for set_field, value in zip(cls._setters, cls.bind(arguments, keywords), strict=True):
            set_field(self, value)

    def __setattr__(self, name: str, _: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} can't be set: the record is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} can't be deleted: the record is frozen")

    def __eq__(self, other: object) -> bool:
        return _values(self) == _values(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(_values(self))

    def __repr__(self) -> str:
        return _describe(self)


class _NamedTupleType(_Fields):
    def __new__(meta, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        names = meta.collect(namespace)
        namespace |= {field: property(itemgetter(position)) for position, field in enumerate(names)}
        return super().__new__(meta, name, bases, {**namespace, "__slots__": ()})


class _NamedTuple(tuple[Any, ...], metaclass=_NamedTupleType):
    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        return super().__new__(cls, cls.bind(arguments, keywords))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        return _describe(self)

    def _replace(self, **changes: Any) -> Self:
        return replace(self, **changes)


if not TYPE_CHECKING:
    NamedTuple = _NamedTuple


def fields(record: Any) -> tuple[str, ...]:
    """The field names of a record or of its class, in order."""
    names: tuple[str, ...] = record._fields
    return names


def defaults(record: Any) -> dict[str, Any]:
    """The defaults of a record's class; a field that is not in here has to be given."""
    found: dict[str, Any] = record._field_defaults
    return found


def replace(record: T, **changes: Any) -> T:
    """A copy with some fields changed. Raises TypeError for a field that is not there."""
    cls: Any = type(record)
    copy: T = cls(**dict(zip(cls._fields, _values(record), strict=True)) | changes)
    return copy


def _values(record: Any) -> tuple[Any, ...]:
    return tuple([getattr(record, name) for name in record._fields])


def _describe(record: Any) -> str:
    pairs = ", ".join(f"{name}={value!r}" for name, value in zip(record._fields, _values(record), strict=True))
    return f"{type(record).__name__}({pairs})"
