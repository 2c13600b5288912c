"""controller.vm_state: a VM's state from a peer is refused by key, before any part of it is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from controller.vm_state import checked
from shared.errors import ProtocolError
from shared.state_versions import VM
from tests.golden_states import read


@pytest.fixture
def golden() -> dict[str, Any]:
    state: dict[str, Any] = read(VM, VM.version)["state"]
    return state


def test_a_whole_state_is_taken_without_its_version(golden: dict[str, Any]) -> None:
    assert checked(golden) == {key: value for key, value in golden.items() if key != "version"}


def test_a_vm_without_console_and_cards(golden: dict[str, Any]) -> None:
    state = checked({**golden, "console_worker": None, "net_workers": None})
    assert state["console_worker"] is None and state["net_workers"] == {}


@pytest.mark.parametrize("key", ["vcpus", "platform", "functions", "clock"])
@pytest.mark.parametrize("value", [None, 1 << 40, "x", [1]])
def test_a_part_of_another_shape(golden: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=key):
        checked({**golden, key: value})
    del golden[key]
    with pytest.raises(ProtocolError, match=key):
        checked(golden)


def test_a_clock_of_another_size(golden: dict[str, Any]) -> None:
    """A number here would have become so many zeros."""
    for clock in (b"", golden["clock"] + b"\0", len(golden["clock"])):
        with pytest.raises(ProtocolError, match="clock: expected 48 bytes"):
            checked({**golden, "clock": clock})


def test_a_function_without_its_transport(golden: dict[str, Any]) -> None:
    del golden["functions"]["_disk0"]["transport"]
    with pytest.raises(ProtocolError, match=r"_disk0: transport"):
        checked(golden)


def test_a_worker_state_adds_no_arguments_of_its_own(golden: dict[str, Any]) -> None:
    golden["console_worker"] |= {"timeout": None, "verb": "shutdown"}
    golden["net_workers"]["_net1"]["timeout"] = 1
    state = checked(golden)
    for saved in (state["console_worker"], state["net_workers"]["_net1"]):
        assert set(saved) == {"kind", "version", "state"}
