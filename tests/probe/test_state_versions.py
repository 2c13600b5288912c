"""States of other versions between two real VMMs: an older one arrives and goes on, an unknown one is refused by name
with the reason on both sides, and the guest runs on where it was. Each VMM is the real program with another table.
"""

from __future__ import annotations

import pytest

from tests.probe.test_remote_migration import Receiver, tcp
from tests.vmm import PROGRAM, Vmm

pytestmark = [pytest.mark.probe, pytest.mark.timeout(120)]

# The next release: a VM's state has its clock under another name. It saves that, and upgrades what ours saves.
NEXT = """
import controller.vm
from shared import state_versions
from shared.state_versions import StateKind

def rename(state):
    return {("kvm_clock" if key == "clock" else key): value for key, value in state.items()}

class Next(controller.vm.Vm):
    async def save(self):
        return rename(await super().save())

    async def load(self, state):
        upgraded = NEXT.upgrade(state["version"], state)
        assert "kvm_clock" in upgraded and "clock" not in upgraded
        await super().load({**upgraded, "version": 2, "clock": upgraded["kvm_clock"]})

NEXT = StateKind("vm", (rename,))
controller.vm.VM = NEXT
state_versions.KINDS["vm"] = NEXT
import controller.vmm
controller.vmm.Vm = Next
"""
# Another kind's state has a version that we can't know: announced as it should be, or only found out when it is loaded.
NEWER_CONSOLE = """
import controller.vm
from shared import state_versions
from shared.state_versions import StateKind
state_versions.KINDS["console_worker"] = StateKind("console_worker", oldest=9)
"""
SILENT = """
import controller.vm
plain_save, plain_info = controller.vm.Vm.save, controller.vm.Vm.build_info

async def save(self):
    state = await plain_save(self)
    state["console_worker"]["version"] = 9
    return state

def build_info(self):
    return {key: value for key, value in plain_info(self).items() if key != "state_versions"}

controller.vm.Vm.save, controller.vm.Vm.build_info = save, build_info
"""
HINT = "install the release that saved it here, or a newer one"
UNKNOWN = {
    "the VM's own": (NEXT, "vm state has version 2, this release reads 1"),
    "a worker's": (NEWER_CONSOLE, "console_worker state has version 9, this release reads 1"),
    "a worker's that was not announced": (SILENT, "console_worker state has version 9, this release reads 1"),
}


def guest(folder, changes=""):
    return Vmm.guest(folder, "mode=rng", "--console", "null", name="one", program=changes + PROGRAM)


def start(vmm):
    vmm.expect("rng ok 1")
    vmm.wait_api()


def send(source, destination, way, folder):
    """What `ch-remote send-migration` did, and the code and errors of `receive-migration`."""
    with tcp(folder) as (url, _):
        arguments = ["--local", f"unix:{folder}/sock"] if way == "local" else [url]
        receiver = Receiver(destination, arguments[-1])
        sent = source.remote("send-migration", *arguments, timeout=60)
        return sent, *receiver.end()


@pytest.mark.parametrize("which", UNKNOWN)
@pytest.mark.parametrize("way", ["local", "remote"])
def test_unknown_version_is_refused_by_name_on_both_sides_and_the_guest_runs_on(tmp_path, which, way):
    changes, complaint = UNKNOWN[which]
    with guest(tmp_path, changes) as source, Vmm(tmp_path, name="two") as destination:
        start(source)
        sent, code, why = send(source, destination, way, tmp_path)
        assert (sent.returncode, code) == (1, 1)
        for errors in (sent.stderr, why):
            assert complaint in errors and HINT in errors, errors
        assert "the guest runs on here" in sent.stderr and "the destination refused it" in sent.stderr
        progress = source.ask("migration-progress")
        if changes is not SILENT:  # before anything was paused or copied
            assert progress.get("pages", 0) == 0 and "pause" not in progress["breakdown"]
        assert source.ask("info")["state"] == "Running"
        source.more("rng ok ")
        assert destination.ask("ping")


@pytest.mark.parametrize("way", ["local", "remote"])
def test_state_of_the_previous_version_arrives_and_the_guest_goes_on(tmp_path, way):
    """From this release to the next, and from that to one of its own."""
    with (
        guest(tmp_path) as first,
        Vmm(tmp_path, name="two", program=NEXT + PROGRAM) as second,
        Vmm(tmp_path, name="three", program=NEXT + PROGRAM) as third,
    ):
        start(first)
        for source, destination in [(first, second), (second, third)]:
            sent, code, why = send(source, destination, way, tmp_path)
            assert (sent.returncode, code) == (0, 0), f"{sent.stderr}\n{why}\n{destination.errors}"
            assert source.wait() == 0
            destination.expect("rng ok ")
