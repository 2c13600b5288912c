from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.devices.state import Fields
from controller.pci.config_space import BARS, DWORDS, BarMove, BarType, ConfigSpace, Header
from controller.pci.pvpanic import PvPanic
from controller.pci.virtio_pci import capabilities
from shared.errors import ProtocolError
from tests.controller import fakes
from tests.controller.fakes import FakeDevice, Machine, machine

WITH_CONFIG = """
    09 50 10 01 00 00 00 00 00 00 00 00 38 00 00 00
    09 60 10 03 00 00 00 00 00 20 00 00 01 00 00 00
    09 70 10 04 00 00 00 00 00 40 00 00 00 10 00 00
    09 84 14 02 00 00 00 00 00 60 00 00 00 10 00 00 04 00 00 00
    09 98 14 05 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    11 00 {nn} 80 00 80 00 00 00 80 04 00
"""
WITHOUT_CONFIG = """
    09 50 10 01 00 00 00 00 00 00 00 00 38 00 00 00
    09 60 10 03 00 00 00 00 00 20 00 00 01 00 00 00
    09 74 14 02 00 00 00 00 00 60 00 00 00 10 00 00 04 00 00 00
    09 88 14 05 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    11 00 {nn} 80 00 80 00 00 00 80 04 00
"""
# kind: virtio type, queues, device-specific configuration, PCI device id, class bytes in configuration space order
DEVICES = {
    "net": (fakes.NET, 3, True, 0x1041, "00 00 02"),
    "block": (fakes.BLOCK, 1, True, 0x1042, "00 80 01"),
    "block with four queues": (fakes.BLOCK, 4, True, 0x1042, "00 80 01"),
    "console": (fakes.CONSOLE, 2, True, 0x1043, "00 ff ff"),
    "rng": (fakes.RNG, 1, False, 0x1044, "00 ff ff"),
    "balloon": (fakes.BALLOON, 2, True, 0x1045, "00 ff ff"),
    "rtc": (fakes.RTC, 1, False, 0x1051, "00 ff ff"),
    "vsock": (fakes.VSOCK, 3, True, 0x1053, "00 ff ff"),
    "mem": (fakes.MEM, 1, True, 0x1058, "00 ff ff"),
    "fs": (fakes.FS, 2, True, 0x105A, "00 ff ff"),
    "pmem": (fakes.PMEM, 1, True, 0x105B, "00 ff ff"),
    "watchdog": (fakes.WATCHDOG, 1, False, 0x1063, "00 ff ff"),
}


def image(made: Machine, slot: int) -> bytes:
    """A function's space as the vCPU loops read it."""
    return bytes(made.page.config_view(slot).cast("B"))


def device(kind: str) -> FakeDevice:
    virtio_type, queues, has_config, _, _ = DEVICES[kind]
    return FakeDevice("_dev", virtio_type, (256,) * queues, has_config=has_config)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("wide", [True, False], ids=["64-bit BAR", "32-bit BAR"])
def test_every_byte_of_a_virtio_function(kind: str, wide: bool) -> None:
    _, queues, has_config, product, class_code = DEVICES[kind]
    with machine() as made:
        transport = made.transport(device(kind))
        made.segment.add(transport, wide=wide)
        space = image(made, 1)
    expected = bytearray(4096)
    expected[0x00:0x04] = bytes.fromhex("f41a") + product.to_bytes(2, "little")
    expected[0x06] = 0x10
    expected[0x08:0x0C] = bytes.fromhex("01" + class_code)
    expected[0x10:0x18] = bytes.fromhex("040080ff ff3f0000" if wide else "0000f8e7 00000000")
    expected[0x2C:0x30] = expected[0x00:0x04]
    expected[0x34] = 0x40
    capability_list = (WITH_CONFIG if has_config else WITHOUT_CONFIG).format(nn=f"{queues:02x}")
    raw = bytes.fromhex(capability_list)
    expected[0x40 : 0x40 + len(raw)] = raw
    assert space == bytes(expected)
    assert not any(space[0xA4:])


def test_the_host_bridge() -> None:
    with machine() as made:
        space = image(made, 0)
    expected = bytearray(4096)
    expected[0:4] = bytes.fromhex("8680570d")
    expected[0x08:0x0C] = bytes.fromhex("00000006")
    assert space == bytes(expected)


def test_pvpanic() -> None:
    with machine() as made:
        made.segment.add(PvPanic(lambda event: None), wide=False)
        space = image(made, 1)
    expected = bytearray(4096)
    expected[0:4] = bytes.fromhex("361b1100")
    expected[4:6] = bytes.fromhex("0301")
    expected[0x08:0x0C] = bytes.fromhex("01008008")
    expected[0x10:0x14] = (0xE7FF_FFF0).to_bytes(4, "little")
    assert space == bytes(expected)


def test_writable_bits_of_a_virtio_function() -> None:
    with machine() as made:
        transport = made.transport()
        made.segment.add(transport, wide=True)
        writable = transport.config.save()["writable_bits"]
    assert isinstance(writable, list)
    assert {i * 4: bits for i, bits in enumerate(writable) if bits} == {
        0x04: 0x0000_FFFF,
        0x0C: 0x0000_00FF,
        0x10: 0xFFFF_FFF0,
        0x14: 0xFFFF_FFFF,
        0x3C: 0x0000_00FF,
        0x98: 0xC000_0000,
    }


def space_with_bars(kind: BarType = BarType.MEMORY_64, base: int = 0x3FFF_FF80_0000) -> ConfigSpace:
    space = ConfigSpace(Header(0x1AF4, 0x1042, 0x018000, 1, 0x1AF4, 0x1042))
    space.add_bar(0, base, 0x8_0000, kind)
    for capability, body in capabilities(2, True):
        space.add_capability(capability, body)
    return space


@pytest.mark.parametrize("probe", [0xFFFF_FFFF, 0xFFFF_FFF0])
def test_sizing_a_64_bit_bar_moves_nothing(probe: int) -> None:
    space = space_with_bars()
    space.write(4, 2, 2)
    assert space.write(0x10, 4, probe) == []
    assert space.read(0x10, 4) == 0xFFF8_0004
    assert space.write(0x10, 4, 0xFF80_0000) == []
    assert space.write(0x14, 4, 0xFFFF_FFFF) == []
    assert space.read(0x14, 4) == 0xFFFF_FFFF
    assert space.write(0x14, 4, 0x3FFF) == []
    assert (space.read(0x10, 4), space.read(0x14, 4)) == (0xFF80_0004, 0x3FFF)
    assert space.bar_address(0) == 0x3FFF_FF80_0000


def test_sizing_a_32_bit_bar() -> None:
    space = space_with_bars(BarType.MEMORY_32, 0xE7F8_0000)
    space.write(0x10, 4, 0xFFFF_FFFF)
    assert space.read(0x10, 4) == 0xFFF8_0000
    space.write(0x14, 4, 0xFFFF_FFFF)
    assert space.read(0x14, 4) == 0


def test_a_move_waits_for_memory_decoding() -> None:
    space = space_with_bars()
    assert space.write(0x10, 4, 0x4000_0004) == []
    assert space.write(0x14, 4, 0x2) == []
    assert space.write(4, 2, 2) == [BarMove(0x3FFF_FF80_0000, 0x2_4000_0000, 0x8_0000, BarType.MEMORY_64)]
    assert space.bar_address(0) == 0x2_4000_0000


def test_a_32_bit_bar_moves_at_once_when_decoding_is_on() -> None:
    space = space_with_bars(BarType.MEMORY_32, 0xE7F8_0000)
    space.write(4, 2, 2)
    moves = space.write(0x10, 4, 0xD000_0000)
    assert moves == [BarMove(0xE7F8_0000, 0xD000_0000, 0x8_0000, BarType.MEMORY_32)]
    space.revert(moves[0])
    assert space.read(0x10, 4) == 0xE7F8_0000


def test_a_reverted_64_bit_move_shows_the_old_address() -> None:
    space = space_with_bars()
    space.write(4, 2, 2)
    space.write(0x10, 4, 0x4000_0000)
    for move in space.write(0x14, 4, 0x2):
        space.revert(move)
    assert (space.read(0x10, 4), space.read(0x14, 4)) == (0xFF80_0004, 0x3FFF)
    assert space.bar_address(0) == 0x3FFF_FF80_0000


@pytest.mark.parametrize(("offset", "size"), [(1, 4), (2, 4), (3, 2), (5, 8)])
def test_a_read_across_a_dword_is_all_ones(offset: int, size: int) -> None:
    assert space_with_bars().read(offset, size) == (1 << 8 * size) - 1


ACCESS = st.tuples(st.integers(0, 4095), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1))


@given(st.lists(ACCESS | ACCESS.map(lambda a: (a[0] % 0xA4, a[1], a[2])), max_size=60))
def test_no_write_changes_a_read_only_bit(writes: list[tuple[int, int, int]]) -> None:
    space = space_with_bars()
    before, writable = list(space.registers), space.save()["writable_bits"]
    assert isinstance(writable, list)
    for offset, size, value in writes:
        for move in space.write(offset, size, value & (1 << 8 * size) - 1):
            assert move.size == 0x8_0000
        space.read(offset, size)
    changed = [old ^ new for old, new in zip(before, space.registers, strict=True)]
    assert all(bits & ~mask == 0 for bits, mask in zip(changed, writable, strict=True))


@given(st.lists(ACCESS.map(lambda a: (a[0] % 0xA4, a[1], a[2])), max_size=30))
def test_a_state_restores_every_register(writes: list[tuple[int, int, int]]) -> None:
    space, other = space_with_bars(), space_with_bars()
    for offset, size, value in writes:
        space.write(offset, size, value & (1 << 8 * size) - 1)
    state = space.save()
    other.load(Fields("copy", state))
    assert other.save() == state
    assert list(other.registers) == list(space.registers)


def test_the_shape_of_the_state() -> None:
    state = space_with_bars().save()
    registers, bars = state["registers"], state["bars"]
    assert isinstance(registers, list) and len(registers) == DWORDS
    assert isinstance(bars, list) and len(bars) == BARS
    assert bars[0] == {
        "addr": 0xFF80_0004,
        "size": 4294443008,
        "used": True,
        "type": "Memory64BitRegion",
    }
    assert bars[1] == {"addr": 0x3FFF, "size": 4294967295, "used": True, "type": None}
    assert state["last_capability"] == [152, 10]
    assert state["msix_cap_reg_idx"] == 38
    assert state["pending_bar_reprogram"] == []
    assert state["rom_bar_used"] is False


def test_a_state_of_another_device_is_refused() -> None:
    state = space_with_bars().save()
    registers = state["registers"]
    assert isinstance(registers, list)
    registers[0] = 0x1041_1AF4
    space = space_with_bars()
    with pytest.raises(ProtocolError, match="0x0 is 0x10411af4"):
        space.load(Fields("_virtio-pci-_disk0", state))
    with pytest.raises(ProtocolError, match="BAR 1 has another size"):
        space.load(Fields("_virtio-pci-_disk0", space_with_bars(BarType.MEMORY_32, 0xE7F8_0000).save()))
    with pytest.raises(ProtocolError, match="bars: expected a list of 6 items, but the key is missing"):
        space.load(Fields("x", {"registers": [0] * DWORDS}))
    assert list(space.registers) == list(space_with_bars().registers)
