"""controller.migration.acceptance: each of its checks refuses, by name, what can't run on this host."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from controller import taps
from controller.config.codec import to_json
from controller.config.identity import assign_ids
from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    DiskConfig,
    ImageType,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from controller.machine import layout
from controller.machine.cpuid import common_cpuid, from_kvm
from controller.machine.hostcpu import host_phys_bits
from controller.migration.acceptance import CHECKS, accept, machine_info
from shared.errors import MigrationError
from shared.kvm import Kvm
from shared.linux import close_fds
from shared.memory import spans
from shared.records import replace
from tests.netns import ip, network_namespace

pytestmark = pytest.mark.probe

RAM = 64 << 20
DISK_SIZE = 8192


@pytest.fixture(autouse=True)
def network():
    with network_namespace():
        yield


class Source:
    """What one would say of a VM that can run here. `held` is closed at the end."""

    def __init__(self, folder: Path, held: contextlib.ExitStack) -> None:
        self.folder, self.held = folder, held
        (folder / "kernel").write_bytes(bytes(4096))
        (folder / "disk").write_bytes(bytes(DISK_SIZE))
        self.config = VmConfig(
            payload=PayloadConfig(str(folder / "kernel")),
            memory=MemoryConfig(size=RAM),
            disks=(DiskConfig(str(folder / "disk"), image_type=ImageType.RAW),),
        )
        self.parts = [(gpa, size, 0, slot) for slot, (gpa, size) in enumerate(spans(RAM))]
        kvm = Kvm()
        try:
            bits = layout.compute(RAM, host_phys_bits(), self.config.cpus.max_phys_bits).phys_bits
            cpuid = common_cpuid(from_kvm(kvm.supported_cpuid()), bits)
            self.info = machine_info(kvm, {}) | {"cpuid": [list(entry) for entry in cpuid], "state_versions": {"vm": 1}}
        finally:
            kvm.close()
        self.info["disk_sizes"] = {"_disk0": DISK_SIZE}

    def change(self, **fields):
        self.config = replace(self.config, **fields)

    def hold(self, **keys):
        """Somebody's TAP."""
        self.held.callback(taps.open_tap(NetConfig(**keys)).close)

    def says(self):
        return to_json(assign_ids(self.config)), self.parts, self.info


@pytest.fixture
def source(tmp_path):
    with contextlib.ExitStack() as held:
        yield Source(tmp_path, held)


def accepted(source):
    """Closed at once: the size of RAM, and whose images were opened."""
    ram, images = accept(*source.says())
    size = sum(os.fstat(fd).st_size for fd in ram)
    close_fds([*ram, *images.values()])
    return size, list(images)


def refusal(source):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(MigrationError) as caught:
        accept(*source.says())
    assert set(os.listdir("/proc/self/fd")) == before
    return str(caught.value)


def test_what_can_run_here_gets_ram_and_its_images(source):
    assert accepted(source) == (RAM, ["_disk0"])


@pytest.mark.parametrize("keys", [{}, {"tap": "new"}, {"num_queues": 4}, {"ip": "10.9.0.1", "mtu": 1400}])
def test_tap_that_can_be_made_is_gone_again(source, keys):
    source.change(net=(NetConfig(**keys),), cpus=replace(source.config.cpus, boot_vcpus=2, max_vcpus=2))
    assert accepted(source) == (RAM, ["_disk0"])
    assert ip("-brief", "link").split()[0] == "lo" and len(ip("-brief", "link").splitlines()) == 1


def taken_tap(source, pairs):
    source.hold(tap="mine", num_queues=2 * pairs)
    source.change(
        net=(NetConfig(tap="mine", num_queues=2 * pairs),), cpus=replace(source.config.cpus, boot_vcpus=2, max_vcpus=2)
    )


def vhost_user(source, kind, name):
    (source.folder / "file").write_bytes(b"")
    device = kind(vhost_user=True, vhost_socket=str(source.folder / name))
    source.change(**({"disks": (*source.config.disks, device)} if kind is DiskConfig else {"net": (device,)}))


# The check, what is different at the source, and what the refusal says of it; {} is the folder.
CASES = {
    "state of another release": (
        "_versions", lambda s: s.info.update(state_versions={"vm": 99}), "vm state has version 99",
    ),
    "regions": ("_memory", lambda s: s.parts.append((1 << 40, 4096, 0, 1)), "its RAM is laid out as [(0, 67108864"),
    "features of a CPU": ("_cpu", lambda s: s.info.update(cpuid=[]), "this host's CPU can't run the guest"),
    "KVM": (
        "_kvm", lambda s: s.info["kvm"].update(XSAVE2=1 << 30), "KVM capability XSAVE2 is ",
    ),
    "disk of another size": (
        "_disks", lambda s: s.info["disk_sizes"].update(_disk0=1),
        "--disk path={}/disk has 8192 bytes, at the source 1",
    ),
    "no disk": ("_disks", lambda s: (s.folder / "disk").unlink(), "--disk path={}/disk: No such file or directory"),
    "no kernel": ("_files", lambda s: (s.folder / "kernel").unlink(), "--kernel {}/kernel: No such file or directory"),
    "no initramfs": (
        "_files", lambda s: s.change(payload=replace(s.config.payload, initramfs=f"{s.folder}/initrd")),
        "--initramfs {}/initrd: No such file or directory",
    ),
    "no folder for serial": (
        "_files", lambda s: s.change(serial=SerialConfig(ConsoleMode.FILE, f"{s.folder}/none/log")),
        "--serial file={}/none/log: its folder {}/none: No such file or directory",
    ),
    "no folder for console": (
        "_files", lambda s: s.change(console=ConsoleConfig(ConsoleMode.SOCKET, None, f"{s.folder}/none/sock")),
        "--console socket={}/none/sock: its folder {}/none: No such file or directory",
    ),
    "no rng": (
        "_files", lambda s: s.change(rng=RngConfig(f"{s.folder}/hwrng")),
        "--rng src={}/hwrng: No such file or directory",
    ),
    "no back end of a disk": (
        "_files", lambda s: vhost_user(s, DiskConfig, "sock"), "--disk socket={}/sock: No such file or directory",
    ),
    "file where a card's back end should be": (
        "_files", lambda s: vhost_user(s, NetConfig, "file"), "--net socket={}/file: this is a regular file",
    ),
    "taken TAP": ("_nets", lambda s: taken_tap(s, 1), "--net tap=mine: another process has this TAP open"),
    "taken TAP for several queues": (
        "_nets", lambda s: taken_tap(s, 2), "--net tap=mine: another process has this TAP open",
    ),
    "TAP by descriptor": (
        "_nets", lambda s: s.change(net=(NetConfig(fds=(77,)),)), "_net1: its TAP was given by descriptor (fd=)",
    ),
}  # fmt: skip


def test_every_check_has_a_case():
    assert {check for check, *_ in CASES.values()} == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named(source, case):
    _, change, words = CASES[case]
    change(source)
    assert f"this host can't take the guest: {words.replace('{}', str(source.folder))}" in refusal(source)


def test_all_that_differs_is_named_at_once(source):
    for _, change, _ in (CASES["no kernel"], CASES["disk of another size"], CASES["taken TAP"]):
        change(source)
    message = refusal(source)
    for words in ("--kernel", "has 8192 bytes", "--net tap=mine"):
        assert words in message


def test_tap_is_accepted_once_its_holder_has_gone(source):
    taken_tap(source, 2)
    ip("link", "set", "mine", "down")
    assert "another process has this TAP open" in refusal(source)
    source.held.close()
    assert accepted(source) == (RAM, ["_disk0"])


def test_without_privileges_a_tap_that_would_have_to_be_made_is_refused(source):
    source.change(net=(NetConfig(),))
    program = """
import json, sys
from controller.migration.acceptance import accept
from shared.errors import MigrationError
from shared.sandbox import drop_capabilities
config, parts, info = json.load(sys.stdin)
drop_capabilities()
try:
    accept(config, [tuple(part) for part in parts], info)
except MigrationError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(source.says()), capture_output=True, text=True, check=False
    )
    assert done.stderr == "" and "--net: making a TAP needs CAP_NET_ADMIN" in done.stdout
