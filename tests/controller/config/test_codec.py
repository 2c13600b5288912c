"""controller.config.codec: VmConfig and Cloud Hypervisor's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.config.codec import from_json, to_json
from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    DiskConfig,
    DiskLock,
    ImageType,
    LockGranularity,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from controller.machine.topology import Topology
from shared.errors import ConfigError

# A configuration as Cloud Hypervisor v53 sends it in a migration: what this version of ours has, all keys present.
GOLDEN = """
{
  "cpus": {"boot_vcpus": 2, "max_vcpus": 4,
    "topology": {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1},
    "kvm_hyperv": false, "max_phys_bits": 46, "features": {"amx": false}, "nested": true,
    "core_scheduling": "Vm", "profile": "Host"},
  "memory": {"size": 4294967296, "mergeable": false, "hotplug_method": "Acpi", "shared": true, "hugepages": false,
    "prefault": false, "reserve": false, "thp": true},
  "payload": {"kernel": "/var/images/vmlinux", "cmdline": "root=/dev/vda1 console=ttyS0"},
  "disks": [
    {"id": "_disk0", "pci_segment": 0, "path": "/var/images/focal.raw", "readonly": false, "direct": false,
     "num_queues": 1, "queue_size": 128, "vhost_user": false, "disable_io_uring": false, "disable_aio": false,
     "backing_files": false, "sparse": true, "image_type": "Raw", "lock_granularity": "ByteRange"},
    {"id": "data", "pci_segment": 0, "pci_device_id": 5, "readonly": false, "direct": false, "num_queues": 2,
     "queue_size": 256, "vhost_user": true, "vhost_socket": "/run/blk.sock", "disable_io_uring": false,
     "disable_aio": false, "backing_files": false, "sparse": true, "image_type": "Unknown",
     "lock_granularity": "ByteRange"}],
  "rng": {"src": "/dev/urandom", "pci_segment": 0},
  "serial": {"mode": "Tty"},
  "console": {"mode": "File", "file": "/var/log/console", "pci_segment": 0},
  "pvpanic": false, "iommu": false, "watchdog": false, "landlock_enable": false
}
"""


def golden() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(GOLDEN)
    return value


def test_cloud_hypervisors_json_comes_back_unchanged() -> None:
    config = from_json(golden(), strict=True)
    assert config.cpus == CpusConfig(2, 4, Topology(2, 2, 1, 1))
    assert config.disks[1] == DiskConfig(
        vhost_user=True,
        vhost_socket="/run/blk.sock",
        id="data",
        pci_device_id=5,
        num_queues=2,
        queue_size=256,
    )
    assert to_json(config) == golden()


def test_a_payload_alone_is_enough() -> None:
    assert from_json({"payload": {"kernel": "/k"}}, strict=True) == VmConfig(PayloadConfig("/k"))


def test_our_own_data_is_under_one_key() -> None:
    config = VmConfig(PayloadConfig("/k"), disks=(DiskConfig("/d", lock=DiskLock.SHARED),))
    value = to_json(config)
    assert value["disks"][0]["flotilla"] == {"lock": "shared"} and "lock" not in value["disks"][0]
    assert from_json(value, strict=True) == config


def put(value: dict[str, Any], path: str, item: object) -> dict[str, Any]:
    """The value with `item` at a path such as disks[0].serial."""
    here: Any = value
    *parents, last = path.replace("[0]", ".0").split(".")
    for part in parents:
        here = here[int(part)] if part == "0" else here.setdefault(part, {})
    here[int(last) if last == "0" else last] = item
    return value


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("balloon", {"size": 0}),
        ("fs", [{"tag": "x"}]),
        ("pmem", [{"file": "/x"}]),
        ("vsock", {"cid": 3, "socket": "/x"}),
        ("devices", [{}]),
        ("user_devices", [{}]),
        ("vdpa", [{}]),
        ("generic_vhost_user", [{}]),
        ("numa", [{}]),
        ("rtc", {"pci_segment": 0}),
        ("pci_segments", [{}]),
        ("platform", {"num_pci_segments": 2}),
        ("tpm", {"socket": "/x"}),
        ("rate_limit_groups", [{}]),
        ("landlock_rules", [{}]),
        ("landlock_enable", True),
        ("pvpanic", True),
        ("iommu", True),
        ("watchdog", True),
        ("debug_console", {"mode": "Tty", "iobase": 233}),
        ("payload.firmware", "/fw"),
        ("payload.igvm", "/x"),
        ("cpus.kvm_hyperv", True),
        ("cpus.features.amx", True),
        ("cpus.core_scheduling", "Vcpu"),
        ("cpus.profile", "Skylake"),
        ("cpus.affinity", [{"vcpu": 0, "host_cpus": [1]}]),
        ("memory.zones", [{"id": "m", "size": 1}]),
        ("memory.hugepages", True),
        ("memory.hotplug_size", 4096),
        ("memory.hotplug_method", "VirtioMem"),
        ("disks[0].iommu", True),
        ("disks[0].pci_segment", 1),
        ("disks[0].rate_limiter_config", {"ops": {}}),
        ("disks[0].queue_affinity", [{}]),
        ("disks[0].backing_files", True),
        ("rng.iommu", True),
        ("console.pci_segment", 1),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_not_available_yet_is_refused_by_name(path: str, item: object, strict: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(put(golden(), path, item), strict=strict)
    assert str(caught.value).startswith(f"{path}: not available yet")


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("net", []),
        ("net", None),
        ("platform", None),
        ("debug_console", {"mode": "Off", "iobase": 233}),
        ("debug_console", None),
        ("disks[0].iommu", False),
        ("disks[0].serial", None),
        ("disks[0].flotilla", None),
        ("cpus.features", {}),
        ("cpus.profile", None),
        ("memory.zones", None),
        ("serial.pci_segment", 0),
    ],
)
def test_what_changes_nothing_is_accepted(path: str, item: object) -> None:
    assert from_json(put(golden(), path, item), strict=True) == from_json(golden(), strict=True)


@pytest.mark.parametrize(
    ("path", "item", "message"),
    [
        ("cpus", 3, "expected an object, not a number"),
        ("cpus", None, "expected an object, not null"),
        ("cpus.boot_vcpus", "2", "expected a whole number, not a string"),
        ("cpus.boot_vcpus", True, "expected a whole number, not a boolean"),
        ("cpus.boot_vcpus", 1.0, "expected a whole number, not a fraction"),
        ("cpus.boot_vcpus", None, "expected a whole number, not null"),
        ("cpus.boot_vcpus", -1, "-1 is out of range"),
        ("memory.size", 1 << 64, "18446744073709551616 is out of range"),
        ("memory.shared", "on", "expected true or false, not a string"),
        ("memory.shared", None, "expected true or false, not null"),
        ("payload", [], "expected an object, not a list"),
        ("payload.kernel", 3, "expected a string, not a number"),
        ("payload.kernel", "a\0b", "no path can have"),
        ("payload.kernel", "\ud800", "no path can have"),
        ("disks", {}, "expected a list, not an object"),
        ("disks[0]", "x", "expected an object, not a string"),
        ("disks[0].image_type", "Vmdk", "'Vmdk' is not known"),
        ("disks[0].flotilla", [], "expected an object, not a list"),
        ("serial.mode", "tty", "'tty' is not known"),
        ("cpus.topology", {}, ""),
        ("debug_console", 3, "expected an object, not a number"),
    ],
)
def test_wrong_types_name_the_key(path: str, item: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(put(golden(), path, item), strict=False)
    assert str(caught.value).startswith(path) and message in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_body_that_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="the body: expected an object"):
        from_json(value, strict=True)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("", "payload"),
        ("cpus", "boot_vcpus"),
        ("cpus", "max_vcpus"),
        ("memory", "size"),
        ("rng", "src"),
        ("serial", "mode"),
        ("console", "mode"),
        ("cpus.topology", "packages"),
    ],
)
def test_keys_that_cloud_hypervisor_requires_are_required(path: str, key: str) -> None:
    value = golden()
    here = value
    for part in path.split(".") if path else ():
        here = here[part]
    del here[key]
    with pytest.raises(ConfigError) as caught:
        from_json(value, strict=False)
    assert str(caught.value) == (f"{path}.{key}" if path else key) + ": missing"


@pytest.mark.parametrize("path", ["speed", "cpus.speed", "disks[0].speed", "disks[0].lock", "payload.speed"])
def test_unknown_keys_are_refused_by_vm_create_and_ignored_by_a_migration(path: str) -> None:
    value = put(golden(), path, "shared")
    with pytest.raises(ConfigError) as caught:
        from_json(value, strict=True)
    assert str(caught.value).startswith(f"{path}: unknown key")
    assert from_json(value, strict=False) == from_json(golden(), strict=True)


def test_unknown_private_keys_are_ignored_by_a_migration() -> None:
    value = put(golden(), "disks[0].flotilla", {"lock": "exclusive", "later": 1})
    assert from_json(value, strict=False).disks[0].lock is DiskLock.EXCLUSIVE
    with pytest.raises(ConfigError, match=r"disks\[0\].flotilla.later: unknown key"):
        from_json(value, strict=True)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10)
optional_text = st.none() | texts
numbers = st.integers(0, 2**64 - 1)
destinations = {"mode": st.sampled_from(ConsoleMode), "file": optional_text, "socket": optional_text}
pci = {"id": optional_text, "pci_device_id": st.none() | numbers}
topologies = st.none() | st.builds(Topology, numbers, numbers, numbers, numbers)
configs = st.builds(
    VmConfig,
    payload=st.builds(PayloadConfig, optional_text, optional_text, optional_text),
    cpus=st.builds(CpusConfig, numbers, numbers, topologies, numbers, st.booleans()),
    memory=st.builds(MemoryConfig, numbers, st.booleans(), st.booleans(), st.booleans()),
    disks=st.lists(
        st.builds(
            DiskConfig,
            path=optional_text,
            readonly=st.booleans(),
            num_queues=numbers,
            vhost_socket=optional_text,
            serial=optional_text,
            image_type=st.sampled_from(ImageType),
            lock_granularity=st.sampled_from(LockGranularity),
            lock=st.none() | st.sampled_from(DiskLock),
            **pci,
        ),
        max_size=3,
    ).map(tuple),
    rng=st.builds(RngConfig, texts, **pci),
    serial=st.builds(SerialConfig, **destinations),
    console=st.builds(ConsoleConfig, **destinations, **pci),
)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a JSON value that is neither object nor list."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


@given(configs, st.booleans())
def test_every_configuration_comes_back_through_json(config: VmConfig, strict: bool) -> None:
    value = to_json(config)
    assert not any(item is None for item in leaves(value))
    text = json.dumps(value)
    assert from_json(json.loads(text), strict=strict) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
paths = st.sampled_from(
    [
        "cpus",
        "cpus.boot_vcpus",
        "cpus.features",
        "memory",
        "memory.size",
        "payload",
        "payload.kernel",
        "disks",
        "disks[0]",
        "disks[0].path",
        "disks[0].flotilla",
        "disks[0].queue_size",
        "rng",
        "rng.src",
        "serial",
        "serial.mode",
        "console",
        "console.file",
        "debug_console",
        "net",
        "platform",
        "cpus.topology",
        "x",
    ]
)


@given(paths, json_values, st.booleans())
def test_any_json_is_a_configuration_or_a_config_error(path: str, item: object, strict: bool) -> None:
    try:
        config = from_json(put(golden(), path, item), strict=strict)
    except ConfigError as error:
        assert path.split(".")[0].split("[")[0] in str(error)
    else:
        assert isinstance(config, VmConfig)
