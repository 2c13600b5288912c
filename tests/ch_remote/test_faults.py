"""The argument of `ch-remote fault-inject` becomes the body of vmm.fault-inject."""

from __future__ import annotations

import pytest

from ch_remote.faults import fault_body
from shared.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("process=_disk0,fault=kill", {"process": "_disk0", "fault": "kill"}),
        (
            "process=_disk0,fault=kill,request=5,step=done",
            {"process": "_disk0", "fault": "kill", "at": {"request": 5, "step": "done"}},
        ),
        (
            "process=_disk0,fault=slow,value=20,spread=5,shape=normal,seed=1",
            {"process": "_disk0", "fault": "slow", "value": 20, "spread": 5, "shape": "normal", "seed": 1},
        ),
        (
            "process=_disk0,fault=error,rate=0.5,sectors=8-15,count=3",
            {"process": "_disk0", "fault": "error", "rate": 0.5, "sectors": [8, 15], "count": 3},
        ),
        ("sectors=9", {"sectors": [9, 9]}),
        ('value="20"', {"value": 20}),
        ("fault=corrupt-protocol,value=control", {"fault": "corrupt-protocol", "value": "control"}),
        ("fault=stop,duration_ms=300,state=saving", {"fault": "stop", "duration_ms": 300, "at": {"state": "saving"}}),
    ],
)
def test_body(text, body):
    assert fault_body(text) == body


@pytest.mark.parametrize(
    "text",
    [
        "kill", "victim=_disk0", "rate=often", "request=first", "request=²", "value=²", "sectors=a-b", "sectors=8-",
        "sectors=[1,2]-9",
    ],
)  # fmt: skip
def test_what_can_not_be_understood(text):
    with pytest.raises(ConfigError):
        fault_body(text)
