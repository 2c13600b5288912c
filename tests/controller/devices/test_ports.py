"""The small port devices: i8042, POST codes, debug consoles; and what they share."""

from __future__ import annotations

import re

import pytest

from controller.devices.debug_port import DebugConsole, DebugPort, firmware_debug_port
from controller.devices.events import GuestEvent
from controller.devices.i8042 import I8042
from controller.devices.misuse import Misuse
from controller.devices.state import Fields
from shared import log
from shared.errors import ProtocolError


def test_i8042() -> None:
    events: list[GuestEvent] = []
    device = I8042(events.append)
    assert [device.read(offset, 1) for offset in range(4)] == [0x20, None, None, 0]
    assert device.read(0, 2) is None
    for offset, size, value in ((3, 1, 0xD1), (0, 1, 0xFE), (3, 2, 0xFE)):
        device.write(offset, size, value)
    assert events == []
    device.write(3, 1, 0xFE)
    assert events == [GuestEvent.RESET]


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0x00, "Firmware"), (0x3F, "Bootloader"), (0x40, "Kernel"), (0x7F, "Userspace"), (0x80, "Custom")],
)
def test_post_codes_are_logged(code: int, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    log.configure(log.Level.INFO)
    try:
        port = DebugPort()
        port.write(0, 1, code)
        assert port.read(0, 1) is None
    finally:
        log.configure(log.Level.WARN)
    assert re.search(rf"{kind} code {code:#x} at \d+\.\d{{6}} s$", capfd.readouterr().err, re.MULTILINE)


def test_debug_consoles() -> None:
    output = bytearray()
    console, firmware = DebugConsole(output.extend), firmware_debug_port(output.extend)
    for byte in b"hi":
        console.write(0, 1, byte)
    firmware.write(0, 1, ord("!"))
    firmware.write(0, 2, 0x4141)
    assert output == b"hi!"
    assert (console.read(0, 1), firmware.read(0, 1), firmware.read(0, 4)) == (None, 0xE9, None)


def test_misuse_is_logged_at_powers_of_two(capfd: pytest.CaptureFixture[str]) -> None:
    misuse = Misuse("device")
    for _ in range(100):
        misuse.report("nonsense")
    lines = capfd.readouterr().err.splitlines()
    assert (misuse.count, len(lines)) == (100, 7)
    assert lines[-1].endswith("device: nonsense (guest error 64 of this device)")


@pytest.mark.parametrize("state", [None, [], 3, "x"])
def test_a_state_must_be_an_object(state: object) -> None:
    with pytest.raises(ProtocolError, match="state of here: expected an object"):
        Fields("here", state)


def test_fields_name_the_place() -> None:
    fields = Fields("here", {"a": {"b": [1, True]}, "n": True, "s": 1})
    with pytest.raises(ProtocolError, match=r"state of here\.a: b: expected unsigned integers of 8 bits"):
        fields.section("a").integers("b", 8)
    with pytest.raises(ProtocolError, match="here: n: expected an unsigned integer of 8 bits"):
        fields.integer("n", 8)
    with pytest.raises(ProtocolError, match="here: missing: expected a boolean, but the key is missing"):
        fields.flag("missing")
    with pytest.raises(ProtocolError, match="here: s: expected a string"):
        fields.text("s")
    with pytest.raises(ProtocolError, match="a list of at most 1 items, not 2"):
        fields.section("a").items("b", limit=1)
    assert "n" in fields and "x" not in fields.private()
