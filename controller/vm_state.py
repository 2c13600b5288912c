"""A VM's saved state as it came from a peer or a file: its shape, checked before any part of it is used.

    version, vcpus [{…}…], platform {…}, functions {id: {transport {…}, device {…}}}, clock (kvm_clock_data),
    console_worker (a worker's {kind, version, state}, or null), net_workers {id: the same}

What is in a part is for whoever loads it to check.
"""

from __future__ import annotations

import ctypes

from controller.devices.state import Fields
from shared.errors import ProtocolError
from shared.kvm import kvm_clock_data
from shared.typed import Any

_CLOCK_BYTES = ctypes.sizeof(kvm_clock_data)


def checked(state: object) -> dict[str, Any]:
    """The state with what may be missing filled in, and nothing beside its keys. Raises ProtocolError."""
    fields = Fields("VM", state)
    fields.section("platform")
    fields.sections("vcpus")
    for function in fields.maps("functions").values():
        function.section("transport")
        function.section("device")
    assert isinstance(state, dict)
    clock = state.get("clock")
    if not isinstance(clock, bytes) or len(clock) != _CLOCK_BYTES:
        raise ProtocolError(f"state of VM: clock: expected {_CLOCK_BYTES} bytes")
    nets = fields.maps("net_workers") if state.get("net_workers") is not None else {}
    return {
        **{key: state[key] for key in ("vcpus", "platform", "functions", "clock")},
        "console_worker": worker_state(fields.section("console_worker")) if state.get("console_worker") else None,
        "net_workers": {name: worker_state(saved) for name, saved in nets.items()},
    }


def worker_state(saved: Fields) -> dict[str, Any]:
    """The arguments of a worker's `load`: no peer may add any."""
    saved.section("state")
    return {"kind": saved.text("kind"), "version": saved.integer("version", 32), "state": saved.raw("state")}
