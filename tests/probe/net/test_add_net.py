"""ch-remote add-net, before the boot and to a running guest."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket

import pytest

from tests.netns import ip
from tests.netpeer import ping
from tests.probe.net.rig import GUEST, HOST, guest, inherited_tap, link
from tests.probe.test_migration import hop
from tests.vmm import Vmm, poll, probe

pytestmark = pytest.mark.probe


def test_add_net_before_boot_says_nothing_and_the_guest_has_it(tmp_path):
    with Vmm(tmp_path) as vmm:
        vmm.wait_api()
        body = {
            "payload": {"kernel": probe(), "cmdline": "mode=net"}, "memory": {"size": 128 << 20},
            "serial": {"mode": "Tty"}, "console": {"mode": "Off"},
        }  # fmt: skip
        (tmp_path / "vm.json").write_text(json.dumps(body))
        vmm.ask("create", str(tmp_path / "vm.json"))
        assert vmm.ask("add-net", f"ip={HOST}") is None
        assert link() is None
        vmm.ask("boot")
        ping(GUEST)


def test_add_net_to_a_running_vm_tells_the_place_and_survives_migration_and_reboot(tmp_path):
    """Real guests scan the bus when the GED says so; the probe guest does at its next boot."""
    with guest(tmp_path, name="one") as one, Vmm(tmp_path, name="two") as two:
        ping(GUEST)
        one.wait_api()
        assert one.ask("add-net", "ip=192.168.250.1,id=second,num_queues=2") == {"id": "second", "bdf": "0000:00:03.0"}
        assert one.fleet()["second"]["kind"] == "net" and link("vmtap1")["operstate"] in ("UNKNOWN", "UP")
        bar = one.ask("info")["device_tree"]["_virtio-pci-second"]["resources"][0]["PciBar"]
        assert bar["type_"] == "Mmio64"
        hop(one, two, tmp_path / "sock")
        ping(GUEST)
        assert two.ask("info")["device_tree"]["_virtio-pci-second"]["pci_bdf"] == "0000:00:03.0"
        assert [net["id"] for net in two.ask("info")["config"]["net"]] == ["_net0", "second"]
        two.ask("reboot")
        ping(GUEST)
        assert two.ask("info")["device_tree"]["_virtio-pci-second"]["pci_bdf"] == "0000:00:02.0"
    assert link("vmtap1") is None


def open_fds(pid):
    """What they are of; one that is closed meanwhile is not among them."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def answer(client):
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.read()


def test_add_net_with_a_descriptor_of_a_tap(tmp_path):
    """It travels with the request; the guest finds the card at its next boot."""
    fd = inherited_tap("given", "192.168.250.1")
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        done = vmm.remote("add-net", f"fd={fd},id=second", pass_fds=(fd,))
        assert (done.returncode, json.loads(done.stdout)["id"]) == (0, "second"), done.stderr
        os.close(fd)
        assert link("given") is not None
        assert "/dev/net/tun" not in open_fds(vmm.pid_of("api"))
        vmm.ask("reboot")
        ping(GUEST)
        assert vmm.fleet()["second"]["kind"] == "net" and link("given") is not None
        vmm.ask("delete")
        assert link("given") is None
        assert "/dev/net/tun" not in open_fds(vmm.process.pid)


def test_refused_descriptors_are_closed(tmp_path):
    fd = inherited_tap("given", "192.168.250.1")
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        before = open_fds(vmm.process.pid).count("/dev/net/tun")
        done = vmm.remote("add-net", f"fd={fd},mtu=5", pass_fds=(fd,))
        assert done.returncode == 1 and "mtu is 5" in done.stderr
        os.close(fd)
        poll(lambda: link("given") is None)
        assert open_fds(vmm.process.pid).count("/dev/net/tun") == before


def test_descriptors_that_belong_to_no_request_are_closed(tmp_path):
    reader, writer = os.pipe()
    name = os.readlink(f"/proc/self/fd/{reader}")  # both ends have it
    with guest(tmp_path) as vmm, socket.socket(socket.AF_UNIX) as client:
        vmm.wait_api()
        client.connect(str(vmm.api))
        socket.send_fds(client, [b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n"], [writer])
        assert answer(client)[0] == 200
        socket.send_fds(client, [b"GET /api/v1/vm.unheard-of HTTP/1.1\r\nHost: x\r\n\r\n"], [writer])
        assert answer(client)[0] == 404
        os.close(writer)
        assert os.read(reader, 1) == b""
        socket.send_fds(client, [b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n"], [reader] * 65)
        assert answer(client)[0] == 400
        client.close()
        poll(lambda: name not in open_fds(vmm.pid_of("api")))
    os.close(reader)


@pytest.mark.parametrize("request_name", ["vm.create", "vm.add-net"])
def test_number_of_a_descriptor_in_a_body(tmp_path, request_name):
    with Vmm(tmp_path) as vmm:
        vmm.wait_api()
        net = {"fds": [3], "num_queues": 2}
        body = {"payload": {"kernel": probe()}, "net": [net]} if request_name == "vm.create" else net
        data = json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(vmm.api))
            head = f"PUT /api/v1/{request_name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            client.sendall(head.encode() + data)
            status, said = answer(client)
        assert status == 400 and b"fds in the body" in said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tap=lo", "this interface is no TAP"),
        ("mtu=5", "mtu is 5"),
        ("id=_net0", "Identifier _net0 is not unique"),
        ("pci_device_id=1", "slot 1 of PCI segment 0 is taken"),
        ("num_queues=4", "at most two for each vCPU"),
        ("iommu=on", "iommu: not available yet"),
        ("fd=77", "add-net: fd=77 is not open"),
        ("fd=[1,2],num_queues=2", "2 descriptors and num_queues=2"),
        ("fd=1,tap=some", "tap and fd at once"),
        ("fd=1", "fds[0]: this descriptor is no TAP"),
        ("bridge=br0", "Unknown option: bridge"),
        ("vhost_user=on,socket=/nobody/there", "/nobody/there"),
    ],
)
def test_add_net_that_is_refused_changes_nothing(tmp_path, argument, message):
    with guest(tmp_path) as vmm:
        ping(GUEST)
        vmm.wait_api()
        before = vmm.ask("info"), ip("-brief", "link"), set(vmm.fleet())
        done = vmm.remote("add-net", argument, timeout=60)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert (vmm.ask("info"), ip("-brief", "link"), set(vmm.fleet())) == before
        ping(GUEST)
