"""The same seed gives the same schedule, and every draw makes sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.schedule import DEFAULT_PROCESSES, WEIGHTS, Plan, schedule
from controller.faults.fault import parse
from shared.faults import VICTIMS, Kind, Process

plans = st.builds(
    Plan,
    st.integers(0, 1 << 64),
    st.lists(st.sampled_from(list(Kind)), min_size=1, unique=True).map(tuple),
    st.lists(st.sampled_from(DEFAULT_PROCESSES), min_size=1, unique=True).map(tuple),
    st.floats(0.01, 100),
    st.none(),
    st.integers(1, 40),
).filter(lambda plan: plan.pairs)


@given(plans)
def test_the_same_plan_gives_the_same_schedule(plan):
    assert schedule(plan) == schedule(plan)


@given(plans, st.integers(1, 40))
def test_a_longer_campaign_begins_with_a_shorter_one(plan, more):
    longer = Plan(plan.seed, plan.kinds, plan.processes, plan.rate, count=plan.count + more)
    assert schedule(longer)[: plan.count] == schedule(plan)


@given(plans)
def test_every_injection_is_one_that_the_vmm_takes(plan):
    for each in schedule(plan):
        assert each.process in plan.processes and each.kind in plan.kinds and each.process in VICTIMS[each.kind]
        parse({"process": "it", "fault": str(each.kind), **each.fields}, {"it": each.process})


@given(plans, st.floats(0.1, 60))
def test_times_rise_and_end_with_the_campaign(plan, seconds):
    found = schedule(Plan(plan.seed, plan.kinds, plan.processes, plan.rate, seconds, count=50))
    times = [each.at_s for each in found]
    assert times == sorted(times) and all(at <= seconds for at in times)


def test_another_seed_gives_another_schedule():
    one, two = (schedule(Plan(seed, (Kind.KILL,), DEFAULT_PROCESSES, 1.0, count=20)) for seed in (1, 2))
    assert one != two


def test_every_process_kind_has_its_share():
    found = schedule(Plan(1, (Kind.KILL, Kind.ERROR), DEFAULT_PROCESSES, 1.0, count=700))
    counts = {process: sum(each.process is process for each in found) for process in DEFAULT_PROCESSES}
    assert all(count > 15 * WEIGHTS[process] for process, count in counts.items())


@pytest.mark.parametrize(
    "plan",
    [
        Plan(1, (Kind.KILL,), (Process.BLK,), 1.0),
        Plan(1, (Kind.ERROR,), (Process.VCPU,), 1.0, count=1),
    ],
    ids=["without an end", "nothing fits"],
)
def test_a_plan_that_makes_no_sense(plan):
    with pytest.raises(ValueError):
        schedule(plan)
