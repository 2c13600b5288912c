"""ch-remote add-net, before the boot and to a running guest."""

from __future__ import annotations

import json

import pytest

from tests.netns import ip
from tests.netpeer import ping
from tests.probe.net.rig import GUEST, HOST, guest, link
from tests.probe.test_migration import hop
from tests.vmm import Vmm, probe

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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tap=lo", "this interface is no TAP"),
        ("mtu=5", "mtu is 5"),
        ("id=_net0", "Identifier _net0 is not unique"),
        ("pci_device_id=1", "slot 1 of PCI segment 0 is taken"),
        ("num_queues=4", "at most two for each vCPU"),
        ("iommu=on", "iommu: not available yet"),
        ("fd=5", "fd=5 is not available yet"),
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
