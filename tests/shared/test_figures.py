"""shared.figures: what the controller tells the exporter, through msgpack and between releases."""

from __future__ import annotations

import msgpack
import pytest

from shared import figures
from shared.errors import ProtocolError
from shared.figures import (
    ExitFigures,
    Figures,
    KvmFigures,
    MigrationFigures,
    ProcessFigures,
    WorkerFigures,
    from_wire,
    to_wire,
)

FULL = Figures(
    version="1",
    vm_state="Running",
    processes=(
        ProcessFigures("blk", "_disk0", 7, "running", 2, 30, 4, 1.5, 1, 0, {"hung": 2}, 1),
        ProcessFigures("api", "api", 8),
    ),
    workers=(WorkerFigures("blk", "_disk0", {"read_ops": 1 << 60}), WorkerFigures("net", "_net1")),
    exits=(ExitFigures("vcpu0", {"vcpu": [1, 2], "controller": [0, 3]}),),
    kvm=(KvmFigures("", b"\0\xff"), KvmFigures("vcpu0", b"")),
    migration=MigrationFigures("ongoing", "copying", "send", 5, 6, 2, None, 9.5),
)


def over_the_wire(whole: object) -> object:
    return msgpack.unpackb(msgpack.packb(whole, use_bin_type=True), raw=False, strict_map_key=False)


def test_everything_arrives_as_it_was() -> None:
    assert from_wire(over_the_wire(to_wire(FULL))) == FULL
    assert from_wire(over_the_wire(to_wire(Figures()))) == Figures()


def test_a_newer_controller_is_understood() -> None:
    wire = to_wire(FULL)
    wire["weather"] = "fine"
    wire["processes"][0]["mood"] = {"calm": 1}
    wire["migration"]["colour"] = "blue"
    assert from_wire(wire) == FULL


def test_an_older_controller_is_understood() -> None:
    assert from_wire({}) == Figures()
    assert from_wire({"processes": [{"name": "x"}]}).processes == (ProcessFigures(name="x"),)


@pytest.mark.parametrize(
    "wire",
    [None, [], 3, {"processes": 3}, {"processes": [3]}, {"workers": {}}, {"kvm": None}, {"migration": []}],
    ids=repr,
)
def test_what_is_no_map_of_lists_is_refused(wire: object) -> None:
    with pytest.raises(ProtocolError, match="figures: "):
        from_wire(wire)


def test_no_field_is_left_out_of_the_wire() -> None:
    assert set(to_wire(FULL)) == set(figures._names(Figures))
