"""controller.faults.inject: what a fault's end lifts, with real processes and no VM."""

from __future__ import annotations

import time

import pytest

from controller.events import EventMonitor
from controller.faults.inject import Injector
from controller.fleet import WorkerSpec
from controller.supervision import process_state
from shared.messages import Verb
from tests.controller.processes import Turned, running

WITNESS = "_disk1"


class Rig(Turned):
    """Two workers. A toy's count is the value of the last word that it was told; `clear` makes it 0."""

    def __init__(self, reactor, fleet):
        super().__init__(reactor)
        self.injector = Injector(reactor, fleet, EventMonitor(time.monotonic()), dict)
        self.processes = {
            name: self.run(fleet.start(WorkerSpec("blk", name, "tests.toy_worker", "worker"), {}, lambda _: None))
            for name in ("_disk0", WITNESS)
        }

    def inject(self, fault, process="_disk0", **fields):
        return self.run(self.injector.request({"process": process, "fault": fault, **fields}))

    def count(self, process="_disk0"):
        return self.run(self.processes[process].call(Verb.STATS))["count"]

    def outlast(self, duration_ms):
        """Until a fault of this duration, told now, has been lifted: so have those that were told before."""
        self.inject("slow", WITNESS, value=9, duration_ms=duration_ms)
        while self.count(WITNESS):
            pass

    def state(self):
        return process_state(self.processes["_disk0"].pid)[0]


@pytest.fixture
def rig(tmp_path):
    with running(str(tmp_path)) as (reactor, fleet):
        yield Rig(reactor, fleet)


def test_the_end_of_a_fault_lifts_it(rig):
    rig.inject("slow", value=5, duration_ms=50)
    rig.outlast(60)
    assert rig.count() == 0


def test_the_end_of_a_fault_does_not_lift_a_later_one(rig):
    rig.inject("slow", value=5, duration_ms=50)
    rig.inject("slow", value=7)
    rig.outlast(60)
    assert rig.count() == 7


def test_a_fault_that_waits_for_a_message_leaves_the_end_of_another_as_it_is(rig):
    rig.inject("slow", value=5, duration_ms=50)
    rig.inject("hang", at={"message": "save"}, duration_ms=1)
    rig.outlast(60)
    assert rig.count() == 0


def test_the_end_of_a_stop_does_not_lift_a_later_one(rig):
    rig.inject("stop", duration_ms=50)
    rig.inject("stop")
    rig.until(lambda: rig.state() == "T")
    rig.outlast(60)
    assert rig.state() == "T"


def test_a_stop_and_a_word_lift_one_another_not(rig):
    rig.inject("slow", value=5)
    rig.inject("stop")
    rig.until(lambda: rig.state() == "T")
    rig.inject("stop", duration_ms=50)
    rig.outlast(60)
    assert rig.count() == 5
