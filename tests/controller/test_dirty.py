"""controller.dirty: what a device worker writes is in the harvest, with a real KVM VM and a real back end.

What a guest's vCPUs write is verified by the guest itself (tests/probe/test_remote_migration.py).
"""

from __future__ import annotations

import pytest

from controller.dirty import DirtyLog, bitmap_for
from shared.kvm import Kvm
from shared.linux import bytes_at
from shared.pages import Bitmap
from tests.controller.test_vhost_frontend import Rig, rig

__all__ = ("rig",)

pytestmark = pytest.mark.probe


def pages(bitmap: Bitmap) -> set[int]:
    """The numbers of the pages that are marked."""
    data = bytes(bytes_at(bitmap.address, bitmap.size))
    return {8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}


async def serving():
    """The back end is up."""


@pytest.fixture
def log(rig: Rig):
    kvm = Kvm()
    vm = kvm.create_vm()
    for region in rig.memory.regions:
        vm.set_memory(region.slot, region.gpa, region.size, region.address)
    made = DirtyLog(vm, rig.memory, {"_disk0": rig.frontend}, serving)
    yield made
    made.close()
    vm.close()
    kvm.close()


@pytest.fixture
def found(rig: Rig):
    made = bitmap_for((region.end for region in rig.memory.regions), "found")
    yield made
    made.close()


def test_what_a_worker_writes_is_harvested_once(rig: Rig, log: DirtyLog, found: Bitmap) -> None:
    d = rig.drivers[0]
    d.next_buffer = 0x100000
    rig.up()
    rig.run(log.start())
    rig.echo_once(b"x" * 100)
    log.harvest(found)
    assert pages(found) == {d.used >> 12, 0x100}
    found.clear()
    log.harvest(found)
    assert pages(found) == set()


def test_a_successor_of_a_dead_worker_is_logged_too_and_stop_ends_it(
    rig: Rig, log: DirtyLog, found: Bitmap
) -> None:
    d = rig.drivers[0]
    d.next_buffer = 0x200000
    rig.up()
    rig.run(log.start())
    rig.kill()
    rig.run(rig.frontend.replay(rig.back_end()))
    rig.echo_once(b"x" * 100)
    log.harvest(found)
    assert {d.used >> 12, 0x200} <= pages(found)
    rig.run(log.stop())
    found.clear()
    rig.echo_once(b"y")
    found.take(log._shared)
    assert pages(found) == set()


def test_a_first_round_has_what_ram_holds(rig: Rig, log: DirtyLog, found: Bitmap) -> None:
    rig.memory.write(0x300000, b"x")
    log.mark_all(found)
    assert 0x300 in pages(found) and 0x301 not in pages(found)
