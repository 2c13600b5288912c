"""vcpu_worker.layout against layout.h, and the transmit ring without any vCPU."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from pathlib import Path

import pytest

from shared import native
from vcpu_worker import layout

STRUCTS = {
    "vcpu_page": layout.VcpuPage,
    "uart_page": layout.UartPage,
    "pci_page": layout.PciPage,
    "timer_page": layout.TimerPage,
    "machine_page": layout.MachinePage,
    "vcpu_start": layout.VcpuStart,
}


def test_both_layouts_are_the_same(tmp_path: Path) -> None:
    wanted = {f"sizeof(struct {name})": ctypes.sizeof(kind) for name, kind in STRUCTS.items()}
    for name, kind in STRUCTS.items():
        for field, *_ in kind._fields_:
            wanted[f"offsetof(struct {name}, {field})"] = getattr(kind, field).offset
            wanted[f"sizeof(((struct {name} *)0)->{field})"] = getattr(kind, field).size
    wanted |= {f"STATE_{state.name}": state.value for state in layout.State}
    wanted |= {f"STAT_{stat.name}": stat.value for stat in layout.Stat}
    wanted |= {f"FINISHED_BY_{finisher.name}": finisher.value for finisher in layout.Finisher}
    wanted["FINISHERS"] = len(layout.Finisher)
    for name in (
        "MAX_VCPUS", "TX_SLOTS", "PCI_SLOTS", "PCI_CONFIG_SIZE", "VCPU_PAGE_SIZE", "EXIT_SENTINEL", "EXIT_REASONS",
    ):  # fmt: skip
        wanted[name] = getattr(layout, name)
    wanted["STAT_COUNT"], wanted["COMMAND_PAUSE"] = len(layout.Stat), layout.COMMAND_PAUSE
    lines = "".join(f'printf("%lld\\n", (long long)({expression}));\n' for expression in wanted)
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "layout.h"\nint main(void)\n{{\n{lines}return 0;\n}}\n'
    )
    folder = Path(native.ROOT) / "vcpu_worker"
    subprocess.run(["gcc", f"-I{folder}", "-o", tmp_path / "layout", source], check=True, timeout=30)
    output = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, timeout=10).stdout
    assert dict(zip(wanted, map(int, output.split()), strict=True)) == wanted


def test_the_loop_touches_neither_tls_nor_a_library() -> None:
    """Its process runs on the TLS register of the thread that made it."""
    library = Path(native.ROOT) / native.LOOPS["vcpu"].library
    code = subprocess.run(["objdump", "-d", library], check=True, capture_output=True, text=True, timeout=20).stdout
    assert "vcpu_spawn" in code
    assert "%fs:" not in code
    assert "@plt" not in code


@pytest.fixture
def uart() -> layout.UartPage:
    return layout.StatePages(mmap.mmap(-1, layout.state_size(1)), 1).uart


def test_an_empty_ring_gives_nothing_and_can_be_armed(uart: layout.UartPage) -> None:
    assert uart.drain() == b""
    assert uart.arm() is False
    assert uart.tx_wanted == 1
    assert uart.arm() is False
    assert uart.tx_wanted == 2, "each wish has a number of its own"


def test_a_byte_left_half_way_at_the_head_is_taken(uart: layout.UartPage) -> None:
    """A vCPU was killed between its tag and the head: the consumer finishes for it, and settles it."""
    uart.tx_slots[0] = 1 << 63 | 7 << 18 | 5 << 8 | ord("x")
    assert uart.arm() is True
    assert uart.drain() == b"x"
    assert uart.tx_done[5] == 7
    assert uart.tx_slots[0] == 1, "empty, for the next lap"


def test_too_small_a_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        layout.StatePages(mmap.mmap(-1, layout.state_size(1)), 2)
    with pytest.raises(ValueError, match="vCPUs"):
        layout.StatePages(mmap.mmap(-1, layout.state_size(1)), 0)


def test_dynamic_dwords_are_single_bits() -> None:
    pci = layout.StatePages(mmap.mmap(-1, layout.state_size(1)), 1).pci
    pci.set_dynamic(31, 1023)
    assert pci.dynamic[31][31] == 1 << 31
    pci.set_dynamic(31, 1023, False)
    assert not any(any(row) for row in pci.dynamic)
    pci.config_view(31)[1023] = 0x12345678
    assert pci.config[31][1023] == 0x12345678
