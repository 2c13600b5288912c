"""Golden states of the workers: every version that this release reads loads into a real worker, and what that saves is
what it was given; and save() gives the shape that the present version has. tests/probe/test_golden_vm.py has the VM's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.fleet import WorkerSpec
from shared.messages import Verb
from shared.state_versions import KINDS, VM, StateKind
from tests import golden_states
from tests.controller.processes import running
from tests.golden_states import explain, path_of, read, record, shape
from tests.test_worker_contract import BlkSubject, ConsoleSubject, NetSubject, Subject

Make = Callable[[], Subject]


class FileConsoleSubject(ConsoleSubject):
    """A host end that keeps what it has not written while it is held."""

    def spec(self) -> tuple[WorkerSpec, dict[str, int]]:
        spec = {"console": {"mode": "File", "path": ""}, "rng": {"src": "/dev/urandom"}}
        made = WorkerSpec("console", "console", "console_worker.__main__", "worker", spec)
        return made, {"console.out": os.open(self.folder / "console", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)}


SUBJECTS: dict[str, type[Subject]] = {
    "blk_worker": BlkSubject, "console_worker": FileConsoleSubject, "net_worker": NetSubject
}  # fmt: skip
# What a state can have that a worker's first save() has not.
RECORDED: dict[str, dict[str, Any]] = {
    "console_worker": {"console": {"in_buffer": list(b"typed"), "out_buffer": list(b"printed\r\n")}},
    "net_worker": {"offloads": 0, "announce": True},
}
VERSIONS = [(name, version) for name in SUBJECTS for version in range(KINDS[name].oldest, KINDS[name].version + 1)]


@pytest.fixture
def make(tmp_path: Path, name: str) -> Iterator[Make]:
    made: list[Subject] = []
    with running(str(tmp_path)) as (reactor, fleet):

        def start() -> Subject:
            made.append(SUBJECTS[name](reactor, fleet, tmp_path))
            made[-1].start()
            made[-1].call(Verb.QUIESCE)
            return made[-1]

        yield start
        for subject in made:
            subject.close()


def save(subject: Subject) -> dict[str, Any]:
    """Without the folder of this test in it."""
    saved = subject.call(Verb.SAVE)
    if "disk_path" in saved["state"]:
        saved["state"]["disk_path"] = Path(saved["state"]["disk_path"]).name
    return saved


def test_every_kind_has_its_test_here() -> None:
    assert set(SUBJECTS) == set(KINDS) - {VM.name}


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_version_that_is_read_has_a_golden_state(kind: StateKind) -> None:
    versions = range(kind.oldest, kind.version + 1)
    assert not [path_of(kind, version).name for version in versions if not path_of(kind, version).exists()], (
        f"record it with {golden_states.RECORD}=1"
    )
    assert {path.name for path in golden_states.FOLDER.glob(f"{kind.name}-v*")} == {
        path_of(kind, version).name for version in versions
    }


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_a_worker_saves_has_the_shape_of_its_version(make: Make, name: str) -> None:
    kind, subject = KINDS[name], make()
    fresh = save(subject)
    subject.call(Verb.LOAD, **{**fresh, "state": {**fresh["state"], **RECORDED.get(name, {})}})
    saved = save(subject)
    record(kind, saved)
    for given in (fresh, saved):
        assert not (why := explain(kind, given, read(kind, kind.version))), why


@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_golden_state_loads_into_a_worker_and_is_what_that_saves(make: Make, name: str, version: int) -> None:
    kind, subject = KINDS[name], make()
    golden = read(kind, version)
    subject.call(Verb.LOAD, **golden)
    assert save(subject) == {
        "kind": name, "version": kind.version, "state": kind.upgrade(version, golden["state"])
    }  # fmt: skip


# The tools of these tests ----------------------------------------------------------------------------------------


def test_bytes_and_maps_come_back_from_a_golden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_states, "FOLDER", tmp_path)
    monkeypatch.delenv(golden_states.RECORD, raising=False)
    kind = StateKind("toy")
    golden = {
        "kind": "toy", "version": 1,
        "state": {"none": None, "yes": True, "blob": bytes(100) + b"\x01\x02" + b"\xff" * 7 + bytes(8), "no": b"",
                  "deep": [{"list": [*range(100), *[-1] * 50]}, [1, 2], [], {}]},
    }  # fmt: skip
    record(kind, golden)
    assert not path_of(kind, 1).exists()
    monkeypatch.setenv(golden_states.RECORD, "1")
    record(kind, golden)
    assert read(kind, 1) == golden
    text = path_of(kind, 1).read_text()
    assert '"00*100 0102ffffffffffffff 00*8"' in text and ' 98 99 -1*50"' in text
    record(kind, {})
    assert read(kind, 1) == golden


def test_a_changed_save_is_explained_with_what_to_do() -> None:
    kind, golden = StateKind("toy"), {"a": 1, "rings": [{"base": 1}], "buffer": [1, 2]}
    assert explain(kind, {"a": 7, "rings": [{"base": 1}, {"base": 2}], "buffer": []}, golden) == ""
    why = explain(kind, {"a": "1", "rings": [{"base": 1, "more": None}], "buffer": []}, golden)
    assert "\n  + a: str\n  + rings[].more: NoneType\n  - a: int\n" in why
    assert "toy's upgrades in shared/state_versions.py" in why and "toy-v2.json" in why


def test_shape_tells_a_map_from_a_list_and_a_number_from_a_flag() -> None:
    assert shape({"a": {"b": [[1, b""], [True]]}, "c": {}}) == {
        "a.b[][]: int", "a.b[][]: bytes", "a.b[][]: bool", "c: empty map"
    }  # fmt: skip
