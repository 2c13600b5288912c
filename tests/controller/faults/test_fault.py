"""Bodies of vmm.fault-inject: what is understood, and what is refused with the field's name."""

from __future__ import annotations

import pytest

from controller.config.cli import parse_argv
from controller.faults.fault import At, Channel, Fault, Shape, parse
from controller.faults.inject import words
from shared.errors import ConfigError
from shared.faults import VICTIMS, Kind, Process

THERE = {
    "_disk0": Process.BLK, "_net1": Process.NET, "vcpu0": Process.VCPU, "console": Process.CONSOLE, "api": Process.API,
    "zygote": Process.ZYGOTE, "janitor": Process.JANITOR, "migration": Process.MIGRATION,
}  # fmt: skip
NAMES = {kind: name for name, kind in THERE.items()}
NEEDED = {
    Kind.SLOW: {"value": 5}, Kind.DROP: {"count": 1}, Kind.DUPLICATE: {"count": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_fits_its_victims_and_is_refused_for_the_others(kind):
    for process, name in NAMES.items():
        body = {"process": name, "fault": str(kind), **NEEDED.get(kind, {})}
        if process in VICTIMS[kind]:
            assert parse(body, THERE).kind is kind
        else:
            with pytest.raises(ConfigError, match=f"fault: {kind} makes no sense for a {process} process"):
                parse(body, THERE)


@pytest.mark.parametrize(
    ("body", "fault", "said"),
    [
        ({"fault": "kill"}, Fault("_disk0", Kind.KILL), None),
        (
            {"fault": "kill", "at": {"request": 7, "step": "published"}},
            Fault("_disk0", Kind.KILL, At(request=7, step="published")),
            ("die-published", 7, {}),
        ),
        (
            {"fault": "kill", "at": {"message": "quiesce"}},
            Fault("_disk0", Kind.KILL, At(message="quiesce")),
            ("kill@quiesce", 0, {}),
        ),
        ({"fault": "kill", "at": {"state": "saving"}}, Fault("_disk0", Kind.KILL, At(state="saving")), None),
        ({"fault": "stop", "duration_ms": 300}, Fault("_disk0", Kind.STOP, duration_ms=300), None),
        (
            {"fault": "hang", "at": {"message": "save"}, "duration_ms": 9},
            Fault("_disk0", Kind.HANG, At(message="save"), duration_ms=9),
            ("hang@save", 9, {}),
        ),
        (
            {"fault": "slow", "value": 20, "spread": 5, "shape": "normal", "seed": 3, "at": {"request": 4}},
            Fault("_disk0", Kind.SLOW, At(request=4), 20, spread=5, shape=Shape.NORMAL, seed=3),
            ("delay", 20, {"seed": 3, "after": 3, "spread_ms": 5, "shape": 2}),
        ),
        (
            {"fault": "error", "rate": 0.25, "sectors": [8, 15], "count": 2},
            Fault("_disk0", Kind.ERROR, rate=250_000, sectors=(8, 15), count=2),
            ("fail", 2, {"first_sector": 8, "last_sector": 15, "count": 2, "fail": 250_000}),
        ),
        (
            {"fault": "corrupt-protocol", "value": "control"},
            Fault("_disk0", Kind.CORRUPT, channel=Channel.CONTROL),
            ("corrupt-control", 0, {}),
        ),
        ({"fault": "drop-notification", "count": 3}, Fault("_disk0", Kind.DROP, count=3), ("withhold", 3, {})),
        (
            {"fault": "duplicate-notification", "count": 3},
            Fault("_disk0", Kind.DUPLICATE, count=3),
            ("repeat", 3, {}),
        ),
        ({"fault": "out-of-memory"}, Fault("_disk0", Kind.OUT_OF_MEMORY), ("out-of-memory", 0, {})),
    ],
)
def test_what_is_understood_and_what_the_worker_is_told(body, fault, said):
    assert parse({"process": "_disk0", **body}, THERE) == fault
    if said is not None:
        assert words(fault) == said


DISK = {"process": "_disk0"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body is not an object"),
        ({}, "process is missing (there are: _disk0, _net1, api,"),
        ({"process": 5, "fault": "kill"}, "process is missing"),
        ({"process": "_disk7", "fault": "kill"}, "process: there is no _disk7 (there are: _disk0"),
        ({"process": "controller", "fault": "kill"}, "process: the controller's end is the VM's"),
        (DISK, "fault is missing (one of kill, stop"),
        (DISK | {"fault": "explode"}, "fault: unknown fault 'explode' (one of kill, stop"),
        (DISK | {"fault": ["kill"]}, "fault: unknown fault ['kill']"),
        (DISK | {"fault": "kill", "how": 1}, "unknown field how (known: process, fault"),
        (DISK | {"fault": "kill", "count": 1}, "count: kill has no such field"),
        (DISK | {"fault": "stop", "duration_ms": -1}, "duration_ms: -1 is no whole number from 0"),
        (DISK | {"fault": "stop", "duration_ms": "9"}, "duration_ms: '9' is no whole number"),
        (DISK | {"fault": "stop", "duration_ms": True}, "duration_ms: True is no whole number"),
        (DISK | {"fault": "slow"}, "value: None is no whole number from 1"),
        (DISK | {"fault": "slow", "value": 1, "spread": 2}, "spread: a fixed delay has none"),
        (DISK | {"fault": "slow", "value": 1, "shape": "normal"}, "shape: a normal delay needs spread"),
        (DISK | {"fault": "slow", "value": 1, "shape": "odd"}, "shape: unknown shape 'odd'"),
        ({"process": "_net1", "fault": "slow", "value": 1, "count": 2}, "count: only a blk process has it"),
        (
            {"process": "console", "fault": "slow", "value": 1, "at": {"request": 1}},
            "console processes have no requests",
        ),
        ({"process": "_net1", "fault": "slow", "value": 1, "at": {"request": 1}}, "only a blk process is slow from"),
        (DISK | {"fault": "error", "rate": 0}, "rate: 0 is no part of the requests"),
        (DISK | {"fault": "error", "rate": 1.5}, "rate: 1.5 is no part"),
        (DISK | {"fault": "error", "sectors": [9, 8]}, "sectors: [9, 8] is no range"),
        (DISK | {"fault": "error", "sectors": 9}, "sectors: 9 is no range"),
        (DISK | {"fault": "drop-notification"}, "count is missing"),
        (DISK | {"fault": "corrupt-protocol", "value": "smoke"}, "value: unknown value 'smoke' (one of vhost-user"),
        (DISK | {"fault": "kill", "at": "soon"}, "at is one of state, message, request"),
        (DISK | {"fault": "kill", "at": {}}, "at is one of state, message, request"),
        (DISK | {"fault": "kill", "at": {"state": "saving", "request": 1}}, "at is one of"),
        (DISK | {"fault": "kill", "at": {"moon": "full"}}, "at: unknown point moon (kill has: state, message"),
        (DISK | {"fault": "kill", "at": {"state": "asleep"}}, "state: unknown state 'asleep' (one of idle"),
        (DISK | {"fault": "kill", "at": {"message": "hi"}}, "at: unknown message 'hi' (one of heartbeat"),
        (DISK | {"fault": "kill", "at": {"request": 0}}, "request: 0 is no whole number from 1"),
        (DISK | {"fault": "kill", "at": {"request": 1, "step": "late"}}, "at: unknown step 'late' (one of popped"),
        (DISK | {"fault": "kill", "at": {"state": "saving", "step": "done"}}, "at: step belongs to a request"),
        (DISK | {"fault": "kill", "at": {"message": "save", "step": "done"}}, "at: step belongs to a request"),
        (DISK | {"fault": "stop", "at": {"request": 3}}, "at: stop can't wait for a request (stop has: state)"),
        ({"process": "vcpu0", "fault": "kill", "at": {"request": 3}}, "vcpu processes have no requests to count"),
        ({"process": "api", "fault": "kill", "at": {"message": "save"}}, "api processes are not asked by messages"),
    ],
)
def test_what_is_refused_names_the_field(body, message):
    with pytest.raises(ConfigError) as caught:
        parse(body, THERE)
    assert message in str(caught.value)


def test_the_flag_is_off_unless_it_is_given():
    assert not parse_argv(["--api-socket", "/a"]).allow_fault_injection
    assert parse_argv(["--api-socket", "/a", "--allow-fault-injection"]).allow_fault_injection
