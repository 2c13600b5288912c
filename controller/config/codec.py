"""VmConfig to and from Cloud Hypervisor's JSON (as Python dicts and lists; `json` is the caller's business).

JSON keys are the field names of `model`. What Cloud Hypervisor has beyond those is in two tables:
`_CONSTANT`, keys that are always written and accepted with this one value, and `_ABSENT`, keys that are
never written and accepted only when null, false or empty. Any other value is refused by name. Our own data
is under `flotilla`, which Cloud Hypervisor ignores.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from controller.config.model import (
    ConsoleConfig,
    CpusConfig,
    DiskConfig,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from shared.errors import ConfigError
from shared.grammar import U64_MAX
from shared.records import Record, defaults, fields

_CONSTANT: dict[type[Any], dict[str, Any]] = {
    CpusConfig: {
        "kvm_hyperv": False,
        "features": {"amx": False},
        "core_scheduling": "Vm",
        "profile": "Host",
    },
    MemoryConfig: {
        "hotplug_method": "Acpi",
        "hugepages": False,
        "prefault": False,
        "reserve": False,
    },
    DiskConfig: {"pci_segment": 0, "backing_files": False},
    NetConfig: {"pci_segment": 0},
    RngConfig: {"pci_segment": 0},
    ConsoleConfig: {"pci_segment": 0},
    VmConfig: {"pvpanic": False, "iommu": False, "watchdog": False, "landlock_enable": False},
}
_ABSENT: dict[type[Any], tuple[str, ...]] = {
    CpusConfig: ("affinity",),
    MemoryConfig: ("hotplug_size", "hotplugged_size", "hugepage_size", "zones"),
    PayloadConfig: ("firmware", "igvm", "host_data", "fw_cfg_config"),
    DiskConfig: ("iommu", "rate_limit_group", "rate_limiter_config", "queue_affinity"),
    NetConfig: ("iommu", "rate_limiter_config"),
    RngConfig: ("iommu",),
    SerialConfig: ("iommu", "pci_segment"),
    ConsoleConfig: ("iommu",),
    VmConfig: (
        "rate_limit_groups",
        "balloon",
        "generic_vhost_user",
        "fs",
        "pmem",
        "devices",
        "user_devices",
        "vdpa",
        "vsock",
        "numa",
        "rtc",
        "pci_segments",
        "platform",
        "tpm",
        "landlock_rules",
        "gdb",
        "ivshmem",
        "pvmemcontrol",
        "preserved_fds",
    ),
}
# Keys without which Cloud Hypervisor refuses the object, though the command line has a default for them.
_REQUIRED: dict[type[Any], tuple[str, ...]] = {
    CpusConfig: ("boot_vcpus", "max_vcpus"),
    MemoryConfig: ("size",),
    RngConfig: ("src",),
    SerialConfig: ("mode",),
    ConsoleConfig: ("mode",),
}
_OURS = "flotilla"
# Fields that Cloud Hypervisor has no key for.
_PRIVATE: dict[type[Any], tuple[str, ...]] = {DiskConfig: ("lock",)}
_DEBUG_CONSOLE = "debug_console"
_HINTS: dict[type[Any], dict[str, Any]] = {}


def to_json(config: VmConfig) -> dict[str, Any]:
    """As vm.info shows it and a migration carries it: unset options are absent, not null."""
    return _encode_object(config)


def from_json(value: object, *, strict: bool) -> VmConfig:
    """The VmConfig that a JSON value describes. Not validated yet.

    strict: refuse keys that nobody knows (vm.create); otherwise ignore them, as Cloud Hypervisor does
    (migrations). Raises ConfigError, which names the key's path, for wrong types, missing or unknown keys,
    and for everything that Cloud Hypervisor has and this version lacks.
    """
    config: VmConfig = _decode_object(VmConfig, value, "", strict)
    return config


def net_from_json(value: object) -> NetConfig:
    """The body of vm.add-net, not validated yet. Raises ConfigError as from_json() does."""
    net: NetConfig = _decode_object(NetConfig, value, "", True)
    return net


def _encode_object(item: Any) -> dict[str, Any]:
    cls = type(item)
    private = _PRIVATE.get(cls, ())
    found: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for name in fields(cls):
        value = getattr(item, name)
        if value is not None and value != ():
            (ours if name in private else found)[name] = _encode(value)
    found.update(_CONSTANT.get(cls, {}))
    if ours:
        found[_OURS] = ours
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return _encode_object(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _hints(cls: type[Any]) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _decode_object(cls: type[Any], value: object, where: str, strict: bool) -> Any:
    mapping = dict(_object(value, where or "the body"))
    own = fields(cls)
    private = _PRIVATE.get(cls, ())
    arguments: dict[str, Any] = {}
    if private:
        arguments |= _decode_private(cls, mapping.pop(_OURS, None), _join(where, _OURS), strict)
    for key, item in mapping.items():
        path = _join(where, key)
        if key in own and key not in private:
            if item is None and (_optional(_hints(cls)[key]) or typing.get_origin(_hints(cls)[key]) is tuple):
                continue
            arguments[key] = _decode(_hints(cls)[key], item, path, strict)
        elif key in _CONSTANT.get(cls, {}):
            _constant(item, _CONSTANT[cls][key], path)
        elif key in _ABSENT.get(cls, ()):
            if item:
                raise _unavailable(path)
        elif cls is VmConfig and key == _DEBUG_CONSOLE:
            _debug_console(item, path)
        elif strict:
            raise ConfigError(f"{path}: unknown key", f"known: {', '.join(_known(cls))}")
    for name in own:
        required = name in _REQUIRED.get(cls, ()) or name not in defaults(cls)
        if required and name not in arguments:
            raise ConfigError(f"{_join(where, name)}: missing")
    return cls(**arguments)


def _decode_private(cls: type[Any], value: object, where: str, strict: bool) -> dict[str, Any]:
    if value is None:
        return {}
    arguments = {}
    for key, item in _object(value, where).items():
        if key in _PRIVATE[cls]:
            arguments[key] = _decode(_hints(cls)[key], item, _join(where, key), strict)
        elif strict:
            raise ConfigError(f"{_join(where, key)}: unknown key", f"known: {', '.join(_PRIVATE[cls])}")
    return arguments


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _known(cls: type[Any]) -> list[str]:
    return [name for name in fields(cls) if name not in _PRIVATE.get(cls, ())]


def _optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in hint.__args__


def _unavailable(path: str) -> ConfigError:
    return ConfigError(f"{path}: not available yet in this version of Flotilla", "leave it out")


def _constant(value: object, only: object, path: str) -> None:
    """null stands for the default, as does an object that lacks some of the default's keys."""
    if isinstance(only, dict) and isinstance(value, Mapping):
        for key, item in value.items():
            if item != only.get(key, item):
                raise _unavailable(_join(path, key))
    elif value is not None and (value != only or type(value) is not type(only)):
        raise _unavailable(path)


def _debug_console(value: object, path: str) -> None:
    """Cloud Hypervisor writes it always; only one that is switched off can be honoured."""
    if value is not None and _object(value, path).get("mode") != "Off":
        raise _unavailable(path)


def _object(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong_type(path, "an object", value)
    return value


def _wrong_type(path: str, expected: str, value: object) -> ConfigError:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a fraction",
    }
    return ConfigError(f"{path}: expected {expected}, not {names.get(type(value), 'null')}")


def _decode(hint: Any, value: object, path: str, strict: bool) -> Any:
    """One value of a field's type: the types that `model` uses, and no others."""
    if _optional(hint):
        (hint,) = (option for option in hint.__args__ if option is not type(None))
    if hint is bool:
        if not isinstance(value, bool):
            raise _wrong_type(path, "true or false", value)
        return value
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong_type(path, "a whole number", value)
        if not 0 <= value <= U64_MAX:
            raise ConfigError(f"{path}: {value} is out of range", "0 to 2**64 - 1")
        return value
    if hint is str:
        return _string(value, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _wrong_type(path, "a list", value)
        item_type = typing.get_args(hint)[0]
        return tuple(
            _decode(item_type, item, f"{path}[{index}]", strict) for index, item in enumerate(value)
        )
    return _decode_object(hint, value, path, strict)


def _string(value: object, path: str) -> str:
    """A string that can be a path: no NUL, no lone surrogate (JSON can express both)."""
    if not isinstance(value, str):
        raise _wrong_type(path, "a string", value)
    try:
        encoded = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise ConfigError(f"{path}: the string has a character that no path can have")
    return value


def _enum(hint: type[Enum], value: object, path: str) -> Enum:
    text = _string(value, path)
    try:
        return hint(text)
    except ValueError:
        words = ", ".join(str(member.value) for member in hint)
        raise ConfigError(f"{path}: {text!r} is not known", f"one of {words}") from None
