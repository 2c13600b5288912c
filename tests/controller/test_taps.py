"""controller.taps on real interfaces, in a network namespace of the test's own."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys

import pytest

from controller import taps
from controller.config.model import NetConfig
from shared.errors import HostError
from tests.netns import ip, network_namespace

TUNSETQUEUE, IFF_DETACH_QUEUE = 0x4004_54D9, 0x0400
MAC = "2e:00:00:00:00:01"


@pytest.fixture(autouse=True)
def network():
    with network_namespace():
        yield


@pytest.fixture
def opened():
    """open_tap() whose TAPs are closed at the end."""
    made = []

    def make(**keys) -> taps.Tap:
        made.append(taps.open_tap(NetConfig(**keys)))
        return made[-1]

    yield make
    for tap in made:
        tap.close()


def link(name):
    """What iproute2 says of an interface; None when there is none."""
    done = subprocess.run(
        ["ip", "-json", "-details", "address", "show", "dev", name], capture_output=True, check=False
    )
    return json.loads(done.stdout)[0] if done.returncode == 0 else None


def refused(message, **keys):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError) as caught:
        taps.open_tap(NetConfig(**keys))
    assert message in str(caught.value)
    assert set(os.listdir("/proc/self/fd")) == before


def test_kernel_structures():
    assert ctypes.sizeof(taps.ifreq) == 40 and ctypes.sizeof(taps.ethtool_drvinfo) == 196


def test_a_tap_is_made_set_up_and_gone_with_its_descriptor(opened):
    tap = taps.open_tap(NetConfig(ip="192.168.77.1", mask="255.255.255.128", host_mac=MAC, mtu=9000))
    assert (tap.name, len(tap.fds), tap.mtu) == ("vmtap0", 1, 9000)
    assert opened().name == "vmtap1"
    seen = link("vmtap0")
    (address,) = [a for a in seen["addr_info"] if a["family"] == "inet"]
    assert (address["local"], address["prefixlen"], address["broadcast"]) == ("192.168.77.1", 25, "192.168.77.127")
    assert seen["address"] == MAC and seen["mtu"] == 9000 and "UP" in seen["flags"]
    data = seen["linkinfo"]["info_data"]
    assert data["type"] == "tap" and data["vnet_hdr"] and not data["pi"] and not data["persist"]
    size = struct.unpack("i", fcntl.ioctl(tap.fds[0], 0x800454D7, bytes(4)))[0]  # TUNGETVNETHDRSZ
    assert size == taps.VNET_HEADER_SIZE
    tap.close()
    assert link("vmtap0") is None


def test_several_queues(opened):
    tap = opened(tap="many", num_queues=6)
    assert len(tap.fds) == 3 and link("many")["linkinfo"]["info_data"]["numqueues"] == 3


def test_a_duplicate_keeps_the_interface(opened):
    tap = taps.open_tap(NetConfig())
    copy = os.dup(tap.fds[0])
    tap.close()
    assert link("vmtap0") is not None
    os.close(copy)
    assert link("vmtap0") is None


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_tap_that_was_there_is_used_and_stays(pairs):
    ip("tuntap", "add", "users", "mode", "tap", *(["multi_queue"] if pairs > 1 else []))
    tap = taps.open_tap(NetConfig(tap="users", num_queues=2 * pairs))
    assert tap.name == "users" and len(tap.fds) == pairs and "UP" in link("users")["flags"]
    tap.close()
    assert link("users") is not None


def test_one_queue_of_a_tap_that_was_made_for_several(opened):
    ip("tuntap", "add", "users", "mode", "tap", "multi_queue")
    assert opened(tap="users").name == "users"


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("theirs", [1, 2])
def test_tap_in_use(opened, theirs, pairs):
    opened(tap="mine", num_queues=2 * theirs)
    if theirs < pairs:
        refused("--net tap=mine: this TAP was made for one queue", tap="mine", num_queues=2 * pairs)
    else:
        refused("--net tap=mine: another process has this TAP open", tap="mine", num_queues=2 * pairs)
    assert link("mine") is not None


@pytest.mark.parametrize("change", ["down", "disabled"])
def test_tap_in_use_by_somebody_who_does_not_take_its_frames(opened, change):
    """A queue that is switched off counts: its owner may switch it on again."""
    tap = taps.open_tap(NetConfig(tap="mine", num_queues=4))
    if change == "down":
        ip("link", "set", "mine", "down")
    else:
        for fd in tap.fds:
            request = taps.ifreq()
            request.ifru_flags = IFF_DETACH_QUEUE
            fcntl.ioctl(fd, TUNSETQUEUE, request)
    refused("--net tap=mine: another process has this TAP open", tap="mine", num_queues=4)
    tap.close()
    assert len(opened(tap="mine", num_queues=4).fds) == 2


def test_tap_that_was_made_by_its_user_is_free_when_its_holder_has_gone(opened):
    ip("tuntap", "add", "users", "mode", "tap", "multi_queue")
    holder = taps.open_tap(NetConfig(tap="users", num_queues=4))
    refused("--net tap=users: another process has this TAP open", tap="users", num_queues=4)
    refused("--net tap=users: another process has this TAP open", tap="users")
    holder.close()
    assert opened(tap="users", num_queues=4).name == "users"


@pytest.mark.parametrize(
    ("make", "driver"),
    [
        (("link", "add", "other", "type", "bridge"), "bridge"),
        (("link", "add", "other", "type", "veth"), "veth"),
        (("tuntap", "add", "other", "mode", "tun"), "tun"),
    ],
)
def test_interface_that_is_no_tap(make, driver):
    ip(*make)
    refused(f"--net tap=other: this interface is no TAP (its driver is {driver}", tap="other")


def test_loopback_is_no_tap():
    refused("--net tap=lo: this interface is no TAP", tap="lo")


def test_more_queues_than_the_tap_was_made_for():
    ip("tuntap", "add", "single", "mode", "tap")
    refused("--net tap=single: this TAP was made for one queue", tap="single", num_queues=4)


def test_mtu_that_the_kernel_refuses_leaves_no_interface():
    refused("--net tap=big: mtu=70000: Invalid argument", tap="big", mtu=70000)
    assert link("big") is None


def test_without_privileges_a_tap_is_refused_and_a_ready_one_of_ones_own_works():
    ip("tuntap", "add", "ready", "mode", "tap", "user", str(os.getuid()))
    ip("address", "add", "10.9.0.1/24", "dev", "ready")
    ip("link", "set", "ready", "up")
    program = """
from controller.config.model import NetConfig
from controller.taps import open_tap
from shared.errors import HostError
from shared.sandbox import drop_capabilities
drop_capabilities()
print(open_tap(NetConfig(tap="ready", ip="10.9.0.1", mask="255.255.255.0")).name)
for keys in ({}, {"tap": "ready", "mtu": 1400}):
    try:
        open_tap(NetConfig(**keys))
    except HostError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    name, made, changed = done.stdout.splitlines()
    assert name == "ready"
    assert made.startswith("--net: making a TAP needs CAP_NET_ADMIN")
    assert changed.startswith("--net tap=ready:")


# Descriptors --------------------------------------------------------------------------------------------------------


def raw_tap(name, flags):
    fd = os.open(taps.TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    request = taps.ifreq(ifr_name=name.encode())
    request.ifru_flags = flags
    fcntl.ioctl(fd, taps.TUNSETIFF, request)
    return fd


def test_inherited_descriptor_is_used_and_stays_open(opened):
    fd = raw_tap("theirs", taps.IFF_TAP | taps.IFF_NO_PI | taps.IFF_VNET_HDR)
    os.set_inheritable(fd, True)
    ip("link", "set", "theirs", "mtu", "1400")
    tap = taps.open_tap(NetConfig(fds=(fd,)))
    assert (tap.name, tap.mtu) == ("theirs", 1400) and tap.fds != (fd,)
    assert not os.get_inheritable(fd)
    tap.close()
    assert opened(fds=(fd,)).name == "theirs"
    os.close(fd)


def test_mtu_of_a_tap_in_another_namespace_is_not_taken_from_ours(opened):
    fd = raw_tap("far", taps.IFF_TAP | taps.IFF_NO_PI | taps.IFF_VNET_HDR)
    with network_namespace():
        assert opened(fds=(fd,)).mtu is None
        ip("link", "add", "far", "type", "bridge")
        assert opened(fds=(fd,)).mtu is None
    os.close(fd)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (taps.IFF_TUN | taps.IFF_NO_PI, "is a TUN interface, not a TAP"),
        (taps.IFF_TAP | taps.IFF_NO_PI, "was opened without vnet headers"),
    ],
)
def test_descriptor_of_a_tap_that_does_not_fit(flags, message):
    fd = raw_tap("theirs", flags)
    refused(f"--net fd={fd}: theirs {message}", fds=(fd,))
    os.close(fd)


def test_descriptor_that_is_no_tap():
    for fd in (
        os.open("/dev/null", os.O_RDWR),
        os.open(taps.TUN_DEVICE, os.O_RDWR),
        os.memfd_create("x"),
        socket.socket().detach(),
        os.eventfd(0),
    ):
        refused(f"--net fd={fd}: this descriptor is no TAP", fds=(fd,))
        os.close(fd)


def test_descriptor_that_is_not_open():
    refused("--net fd=999: this descriptor is not open", fds=(999,))


def test_descriptors_of_different_interfaces():
    flags = taps.IFF_TAP | taps.IFF_NO_PI | taps.IFF_VNET_HDR
    fds = (raw_tap("one", flags), raw_tap("two", flags))
    refused("these are TAPs of different interfaces, one, two", fds=fds, num_queues=4)
    for fd in fds:
        os.close(fd)


def test_handed_over_descriptors_are_checked(opened):
    tap = opened(mtu=1300)
    copy = os.dup(tap.fds[0])
    adopted = taps.adopt([copy])
    assert adopted == taps.Tap("vmtap0", (copy,), 1300)
    adopted.close()
    null = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(HostError, match="the peer's TAP can't be used: this descriptor is no TAP"):
        taps.adopt([null])
    with pytest.raises(OSError):
        os.fstat(null)
