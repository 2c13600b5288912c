"""`--net` and net[] of the JSON: keys, defaults, what is refused, names, MACs and PCI slots."""

from __future__ import annotations

import re
from typing import Any

import pytest

from controller.config import options
from controller.config.cli import parse_argv
from controller.config.codec import from_json, to_json
from controller.config.identity import assign_ids, pci_slots
from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    DiskConfig,
    NetConfig,
    PayloadConfig,
    VhostMode,
    VmConfig,
)
from controller.config.validate import validate
from controller.config.validate_net import mac_bytes
from shared.errors import ConfigError, chain
from shared.records import replace

BASE = VmConfig(
    payload=PayloadConfig(kernel="/k"), cpus=CpusConfig(2, 2), console=ConsoleConfig(ConsoleMode.OFF)
)
DISK = DiskConfig(path="/d")


def with_nets(*nets: NetConfig, **changes: Any) -> VmConfig:
    return replace(BASE, net=nets, **changes)


# The command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "net"),
    [
        ("ip=192.168.101.1", NetConfig(ip="192.168.101.1")),
        ("tap=", NetConfig()),
        (
            "tap=t0,ip=10.0.0.1,mask=255.0.0.0,mac=12:34:56:78:90:AB,host_mac=2e:00:00:00:00:01,mtu=9000",
            NetConfig("t0", "10.0.0.1", "255.0.0.0", "12:34:56:78:90:AB", "2e:00:00:00:00:01", 9000),
        ),
        (
            "num_queues=4,queue_size=512,id=n,pci_device_id=9",
            NetConfig(num_queues=4, queue_size=512, id="n", pci_device_id=9),
        ),
        ("fd=7", NetConfig(fds=(7,))),
        ("fd=[7,8]", NetConfig(fds=(7, 8), num_queues=4)),
        ("fd=[7,8],num_queues=2", NetConfig(fds=(7, 8))),
        (
            "vhost_user=on,socket=/s,vhost_mode=server",
            NetConfig(vhost_user=True, vhost_socket="/s", vhost_mode=VhostMode.SERVER),
        ),
        (
            "offload_tso=off,offload_ufo=off,offload_csum=off",
            NetConfig(offload_tso=False, offload_ufo=False, offload_csum=False),
        ),
        ("iommu=off,pci_segment=0,bw_size=0", NetConfig()),
    ],
)
def test_keys_of_the_command_line(text: str, net: NetConfig) -> None:
    assert options.net(text) == net


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iommu=on", "iommu=on is not available yet"),
        ("pci_segment=1", "pci_segment=1 is not available yet"),
        ("bw_size=1", "bw_size=1 is not available yet"),
        ("ops_refill_time=1", "ops_refill_time=1 is not available yet"),
        ("vhost_mode=both", "vhost_mode is one of client, server"),
        ("fd=x", "Unable to convert x for fd"),
        ("mtu=big", "Unable to convert big for mtu"),
        ("bridge=br0", "Unknown option: bridge (known: tap, ip, mask"),
    ],
)
def test_values_that_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.net(text)
    assert chain(caught.value)[0] == f"Error parsing --net {text}"
    assert message in chain(caught.value)[1]


def test_several_devices_after_one_flag_and_by_repeated_flags() -> None:
    vm = parse_argv(["--kernel", "/k", "--net", "ip=10.0.0.1", "ip=10.1.0.1", "--net", "tap=t"]).vm
    assert vm is not None
    assert [net.ip or net.tap for net in vm.net] == ["10.0.0.1", "10.1.0.1", "t"]


# JSON ---------------------------------------------------------------------------------------------------------------

JSON = {
    "id": "_net2", "pci_segment": 0, "pci_device_id": 7, "tap": "tap0", "ip": "192.168.249.1", "mask": "255.255.255.0",
    "mac": "12:34:56:78:90:ab", "host_mac": "2e:00:00:00:00:01", "mtu": 1400, "num_queues": 4, "queue_size": 512,
    "vhost_user": False, "vhost_mode": "Client", "offload_tso": False, "offload_ufo": True, "offload_csum": True,
}  # fmt: skip


def body(*nets: Any) -> dict[str, Any]:
    return {"payload": {"kernel": "/k"}, "net": list(nets)}


def test_cloud_hypervisors_json_comes_back_unchanged() -> None:
    assert to_json(from_json(body(JSON), strict=True))["net"] == [JSON]


def test_an_empty_object_is_a_device_with_defaults() -> None:
    assert from_json(body({}), strict=True).net == (NetConfig(),)
    assert to_json(from_json(body({}), strict=True))["net"] == [
        {
            "pci_segment": 0, "num_queues": 2, "queue_size": 256, "vhost_user": False, "vhost_mode": "Client",
            "offload_tso": True, "offload_ufo": True, "offload_csum": True,
        }
    ]  # fmt: skip


def test_no_devices_leave_no_key() -> None:
    for value in ([], None):
        assert "net" not in to_json(from_json({"payload": {"kernel": "/k"}, "net": value}, strict=True))


def test_descriptors_are_numbers() -> None:
    config = from_json(body({"fds": [5, 6], "num_queues": 4}), strict=True)
    assert config.net[0].fds == (5, 6) and to_json(config)["net"][0]["fds"] == [5, 6]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"iommu": True}, "net[0].iommu: not available yet"),
        ({"pci_segment": 1}, "net[0].pci_segment: not available yet"),
        (
            {"rate_limiter_config": {"ops": {"size": 1, "refill_time": 1}}},
            "net[0].rate_limiter_config: not available yet",
        ),
        ({"vhost_mode": "Both"}, "net[0].vhost_mode: 'Both' is not known"),
        ({"mtu": "1500"}, "net[0].mtu: expected a whole number"),
        ({"fds": 5}, "net[0].fds: expected a list"),
        ({"bridge": "br0"}, "net[0].bridge: unknown key"),
    ],
)
def test_json_that_is_refused_by_name(net: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(body(net), strict=True)
    assert str(caught.value).startswith(message)


# Sense --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net",
    [
        NetConfig(),
        NetConfig(tap="a" * 15),
        NetConfig(ip="192.168.1.1", mask="255.255.255.252", mac="2E:00:00:00:00:01"),
        NetConfig(mtu=1280),
        NetConfig(mtu=65521),
        NetConfig(num_queues=4, queue_size=4),
        NetConfig(fds=(3, 4), num_queues=4, mtu=1400),
        NetConfig(vhost_user=True, vhost_socket="/s", mac="2e:00:00:00:00:01"),
    ],
)
def test_sensible_devices_pass(net: NetConfig) -> None:
    validate(with_nets(net))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (NetConfig(mac="2e:00:00:00:00"), "mac '2e:00:00:00:00' is no address"),
        (NetConfig(mac="2e:00:00:00:00:0g"), "is no address"),
        (NetConfig(mac="01:00:5e:00:00:01"), "is no address of a network card"),
        (NetConfig(mac="00:00:00:00:00:00"), "is no address"),
        (NetConfig(host_mac="ff:ff:ff:ff:ff:ff"), "host_mac 'ff:ff:ff:ff:ff:ff' is no address"),
        (NetConfig(mtu=1279), "net[0] (--net ): mtu is 1279 (1280 to 65521)"),
        (NetConfig(mtu=65522), "mtu is 65522"),
        (NetConfig(num_queues=0), "num_queues is 0 (an even number"),
        (NetConfig(num_queues=3), "num_queues is 3 (an even number"),
        (NetConfig(num_queues=6), "num_queues is 6 (at most two for each vCPU, 4)"),
        (NetConfig(queue_size=100), "queue_size is 100 (a power of two"),
        (NetConfig(queue_size=2), "queue_size is 2"),
        (NetConfig(queue_size=65536), "queue_size is 65536"),
        (NetConfig(mask="255.255.255.0"), "a mask without an ip"),
        (
            NetConfig(ip="10.0.0.1", mask="255.0.255.0"),
            "net[0] (--net ip=10.0.0.1): mask 255.0.255.0 is no network mask",
        ),
        (NetConfig(ip="10.0.0.1", mask="0.0.0.0"), "is no network mask"),
        (NetConfig(ip="10.0.0.1", mask="24"), "mask '24' is no IPv4 address"),
        (NetConfig(ip="10.0.0"), "ip '10.0.0' is no IPv4 address"),
        (NetConfig(ip="fd00::1"), "ip fd00::1: IPv6 is not available yet"),
        (NetConfig(tap="a" * 16), "has 16 bytes (a network interface's name has at most 15)"),
        (NetConfig(tap="ü" * 8), "has 16 bytes"),
        (NetConfig(tap="a/b"), "tap 'a/b' is no name"),
        (NetConfig(tap="a b"), "is no name"),
        (NetConfig(tap="vm%d"), "is no name"),
        (NetConfig(tap=".."), "is no name"),
        (NetConfig(tap=""), "is no name"),
        (NetConfig(fds=(2,)), "fd=2 is standard input, output or error"),
        (NetConfig(fds=(5, 6)), "2 descriptors and num_queues=2"),
        (NetConfig(tap="t", fds=(5,)), "net[0] (--net tap=t): tap and fd at once"),
        (NetConfig(ip="10.0.0.1", fds=(5,)), "ip and fd at once"),
        (NetConfig(host_mac="2e:00:00:00:00:01", fds=(5,)), "host_mac and fd at once"),
        (NetConfig(vhost_socket="/s"), "a socket without vhost_user"),
        (NetConfig(vhost_user=True), "vhost_user needs a socket"),
        (NetConfig(vhost_user=True, vhost_socket="/s", tap="t"), "tap has no meaning with vhost_user"),
        (NetConfig(vhost_user=True, vhost_socket="/s", ip="10.0.0.1"), "ip has no meaning with vhost_user"),
        (NetConfig(vhost_user=True, vhost_socket="/s", fds=(5,)), "fds has no meaning with vhost_user"),
        (
            NetConfig(vhost_user=True, vhost_socket="/s", num_queues=4),
            "vhost_user with 4 queues is not available",
        ),
        (
            NetConfig(vhost_user=True, vhost_socket="/s", vhost_mode=VhostMode.SERVER),
            "vhost_mode server is not",
        ),
        (NetConfig(id="__net"), "net[0].id is __net"),
        (NetConfig(pci_device_id=32), "net[0].pci_device_id is 32"),
    ],
)
def test_nonsense_is_refused_by_name(net: NetConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_nets(net))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (NetConfig(tap="t"), NetConfig(tap="t"), "net[1]: tap t is taken (net[0] has it already)"),
        (
            NetConfig(mac="2e:00:00:00:00:0a"),
            NetConfig(mac="2E:00:00:00:00:0A"),
            "net[1]: mac 2e:00:00:00:00:0a is taken",
        ),
        (NetConfig(fds=(5,)), NetConfig(fds=(5,)), "net[1]: fd 5 is taken"),
        (NetConfig(fds=(5, 5), num_queues=4), NetConfig(), "net[0]: fd 5 is taken"),
        (NetConfig(pci_device_id=4), NetConfig(pci_device_id=4), "net[0] has that slot already"),
    ],
)
def test_what_two_devices_can_not_share(first: NetConfig, second: NetConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_nets(first, second))
    assert message in str(caught.value)


def test_bytes_of_a_mac() -> None:
    assert mac_bytes("12:34:56:78:90:AB") == bytes.fromhex("1234567890ab")
    assert mac_bytes("+2:34:56:78:90:ab") is None
    assert mac_bytes("12:34:56:78:90:ab:cd") is None


# Names and places ---------------------------------------------------------------------------------------------------


def test_ids_are_numbered_by_one_counter_over_disks_and_nets() -> None:
    config = assign_ids(with_nets(NetConfig(), NetConfig(id="x"), NetConfig(), disks=(DISK, DISK)))
    assert [disk.id for disk in config.disks] == ["_disk0", "_disk1"]
    assert [net.id for net in config.net] == ["_net2", "x", "_net3"]


def test_a_random_mac_is_local_and_then_fixed() -> None:
    config = assign_ids(with_nets(NetConfig(), NetConfig()))
    macs = [net.mac for net in config.net]
    assert (
        all(mac is not None and re.fullmatch("2e(:[0-9a-f]{2}){5}", mac) for mac in macs)
        and len(set(macs)) == 2
    )
    assert assign_ids(config) == config
    assert from_json(to_json(config), strict=True) == config


def test_the_mask_of_an_ip_without_one_is_a_class_c_network() -> None:
    config = assign_ids(
        with_nets(NetConfig(ip="192.168.101.1"), NetConfig(ip="10.0.0.1", mask="255.0.0.0"), NetConfig())
    )
    assert [net.mask for net in config.net] == ["255.255.255.0", "255.0.0.0", None]


@pytest.mark.parametrize(
    ("config", "slots"),
    [
        (
            with_nets(NetConfig(), disks=(DISK,) * 3),
            {"_disk0": 1, "_disk1": 2, "_disk2": 3, "_net3": 4, "__rng": 5},
        ),
        (
            with_nets(NetConfig(), disks=(DISK,) * 3, console=ConsoleConfig(ConsoleMode.TTY)),
            {"__console": 1, "_disk0": 2, "_disk1": 3, "_disk2": 4, "_net3": 5, "__rng": 6},
        ),
        (
            with_nets(NetConfig(pci_device_id=1), NetConfig(), disks=(DISK,)),
            {"_disk0": 2, "_net1": 1, "_net2": 3, "__rng": 4},
        ),
    ],
)
def test_pci_slots_of_the_migration_document(config: VmConfig, slots: dict[str, int]) -> None:
    assert pci_slots(assign_ids(config)) == slots
