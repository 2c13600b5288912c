"""From option strings to VmConfig parts: which keys each flag has, and which of them are refused for now.

One table per flag. A key's converter is from `grammar`; `_FIELDS` has the keys whose field in `model` is
called otherwise; keys under `not_yet` have no field at all. Every function raises ConfigError "Error parsing
--FLAG", caused by the error that tells the details.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    DiskConfig,
    DiskLock,
    ImageType,
    LockGranularity,
    MemoryConfig,
    NetConfig,
    RngConfig,
    SerialConfig,
    VhostMode,
)
from controller.machine.topology import Topology
from shared.errors import ConfigError
from shared.grammar import (
    Converter,
    byte_size,
    choice,
    colon_list,
    integer,
    integer_list,
    not_yet,
    parse,
    path,
    string,
    toggle,
    tuple_list,
)
from shared.records import fields
from shared.typed import Any, TypeVar

T = TypeVar("T")

CPUS_SYNTAX = "boot=<vCPUs>,max=<vCPUs>,topology=<threads>:<cores>:<dies>:<packages>,max_phys_bits=<bits>,nested=on|off"
MEMORY_SYNTAX = "size=<bytes, K, M, G>,shared=on|off,thp=on|off"
DISK_SYNTAX = (
    "path=<image or block device>,readonly=on|off,direct=on|off,num_queues=<n>,queue_size=<n>,"
    "vhost_user=on|off,socket=<path>,serial=<up to 20 bytes>,sparse=on|off,image_type=raw,"
    "lock_granularity=byte-range|full,lock=exclusive|shared,id=<id>,pci_device_id=<1..31>"
)
NET_SYNTAX = (
    "tap=<interface>,ip=<address>,mask=<mask>,mac=<address>,host_mac=<address>,mtu=<bytes>,num_queues=<n>,"
    "queue_size=<n>,fd=<fd>|[<fd>,...],vhost_user=on|off,socket=<path>,offload_tso=on|off,offload_ufo=on|off,"
    "offload_csum=on|off,id=<id>,pci_device_id=<1..31>"
)
RNG_SYNTAX = "src=<path>,id=<id>,pci_device_id=<1..31>"
SERIAL_SYNTAX = "off|null|pty|tty|file=<path>|socket=<path>"
CONSOLE_SYNTAX = SERIAL_SYNTAX + ",id=<id>,pci_device_id=<1..31>"

_PCI: dict[str, Converter] = {
    "id": string,
    "pci_device_id": integer,
    "iommu": not_yet(toggle, False),
    "pci_segment": not_yet(integer, 0),
}
_CPUS: dict[str, Converter] = {
    "boot": integer,
    "max": integer,
    "max_phys_bits": integer,
    "nested": toggle,
    "topology": colon_list(4),
    "kvm_hyperv": not_yet(toggle, False),
    "affinity": not_yet(tuple_list(integer, integer_list), ()),
    "features": not_yet(),
    "core_scheduling": not_yet(harmless="vm"),
    "profile": not_yet(harmless="host"),
}
_MEMORY: dict[str, Converter] = {
    "size": byte_size,
    "mergeable": toggle,
    "shared": toggle,
    "thp": toggle,
    "hugepages": not_yet(toggle, False),
    "hugepage_size": not_yet(byte_size),
    "hotplug_method": not_yet(harmless="acpi"),
    "hotplug_size": not_yet(byte_size, 0),
    "hotplugged_size": not_yet(byte_size, 0),
    "prefault": not_yet(toggle, False),
    "reserve": not_yet(toggle, False),
}
_RATE_LIMITS = (
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
)
_DISK: dict[str, Converter] = {
    "path": path,
    "readonly": toggle,
    "direct": toggle,
    "num_queues": integer,
    "queue_size": integer,
    "vhost_user": toggle,
    "socket": path,
    "serial": string,
    "sparse": toggle,
    "image_type": choice(raw=ImageType.RAW, qcow2=ImageType.QCOW2, vhd=ImageType.VHD, vhdx=ImageType.VHDX),
    "lock_granularity": choice(byte_range=LockGranularity.BYTE_RANGE, full=LockGranularity.FULL),
    "lock": choice(exclusive=DiskLock.EXCLUSIVE, shared=DiskLock.SHARED),
    **_PCI,
    "_disable_io_uring": toggle,
    "_disable_aio": toggle,
    "backing_files": not_yet(toggle, False),
    "rate_limit_group": not_yet(),
    "queue_affinity": not_yet(tuple_list(integer, integer_list), ()),
    **{key: not_yet(integer, 0) for key in _RATE_LIMITS},
}
_NET: dict[str, Converter] = {
    "tap": string,
    "ip": string,
    "mask": string,
    "mac": string,
    "host_mac": string,
    "mtu": integer,
    "num_queues": integer,
    "queue_size": integer,
    "fd": integer_list,
    "vhost_user": toggle,
    "socket": path,
    "vhost_mode": choice(client=VhostMode.CLIENT, server=VhostMode.SERVER),
    "offload_tso": toggle,
    "offload_ufo": toggle,
    "offload_csum": toggle,
    **_PCI,
    **{key: not_yet(integer, 0) for key in _RATE_LIMITS},
}
_RNG: dict[str, Converter] = {"src": path, **_PCI}
_SERIAL: dict[str, Converter] = {"file": path, "socket": path}
_CONSOLE: dict[str, Converter] = {**_SERIAL, **_PCI}
_MODES = {
    "off": ConsoleMode.OFF,
    "null": ConsoleMode.NULL,
    "pty": ConsoleMode.PTY,
    "tty": ConsoleMode.TTY,
}
_FIELDS = {
    "boot": "boot_vcpus",
    "max": "max_vcpus",
    "socket": "vhost_socket",
    "fd": "fds",
    "_disable_io_uring": "disable_io_uring",
    "_disable_aio": "disable_aio",
}


def _parse(flag: str, text: str, build: Callable[[], T]) -> T:
    try:
        return build()
    except ConfigError as error:
        raise ConfigError(f"Error parsing {flag} {text}") from error


def _fields(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments: the options that have a field, under its name."""
    named = {_FIELDS.get(key, key): value for key, value in options.items()}
    return {name: named[name] for name in fields(cls) if name in named}


def cpus(text: str) -> CpusConfig:
    def build() -> CpusConfig:
        fields = _fields(CpusConfig, parse(text, _CPUS))
        fields.setdefault("max_vcpus", fields.get("boot_vcpus", 1))
        if "topology" in fields:
            fields["topology"] = Topology(*fields["topology"])
        return CpusConfig(**fields)

    return _parse("--cpus", text, build)


def memory(text: str) -> MemoryConfig:
    return _parse("--memory", text, lambda: MemoryConfig(**_fields(MemoryConfig, parse(text, _MEMORY))))


def disk(text: str) -> DiskConfig:
    return _parse("--disk", text, lambda: DiskConfig(**_fields(DiskConfig, parse(text, _DISK))))


def net(text: str) -> NetConfig:
    def build() -> NetConfig:
        fields = _fields(NetConfig, parse(text, _NET))
        if fields.get("fds"):
            fields.setdefault("num_queues", 2 * len(fields["fds"]))
        return NetConfig(**fields)

    return _parse("--net", text, build)


def rng(text: str) -> RngConfig:
    return _parse("--rng", text, lambda: RngConfig(**_fields(RngConfig, parse(text, _RNG))))


def serial(text: str) -> SerialConfig:
    return _parse("--serial", text, lambda: SerialConfig(**_destination(parse(text, _SERIAL, _MODES))))


def console(text: str) -> ConsoleConfig:
    def build() -> ConsoleConfig:
        options = parse(text, _CONSOLE, _MODES)
        return ConsoleConfig(
            **_destination(options),
            **{key: options[key] for key in ("id", "pci_device_id") if key in options},
        )

    return _parse("--console", text, build)


def _destination(options: Mapping[str, Any]) -> dict[str, Any]:
    """mode, file and socket of a serial port or console; exactly one destination must be named."""
    named = [key for key in (*_MODES, "file", "socket") if key in options]
    if len(named) != 1:
        given = " and ".join(named) if named else "none"
        raise ConfigError("Invalid console destination", f"expected one of {SERIAL_SYNTAX}; given: {given}")
    word = named[0]
    if word in _MODES:
        return {"mode": options[word]}
    return {"mode": ConsoleMode(word.capitalize()), word: options[word]}
