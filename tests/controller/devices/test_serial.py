from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.devices.serial import INPUT_HIGH, INPUT_LOW, Serial
from shared.errors import ProtocolError
from shared.reactor import Reactor, drain_eventfd
from tests.controller.fakes import finish
from vcpu_worker.layout import TX_SLOTS, UartPage

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


class Port:
    """COM1 with its page, its interrupt eventfd and what it printed."""

    def __init__(self) -> None:
        self.page = UartPage()
        self.irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.printed = bytearray()
        self.full = False
        self.held: list[bool] = []
        self.deferred: list[Callable[[], None]] = []
        self.waits: list[float] = []
        self.slow: Callable[[], None] = lambda: None
        self.serial = Serial(
            self.page,
            self.irq_fd,
            self._print,
            self._defer,
            is_full=lambda: self.full,
            hold_input=self.held.append,
        )

    def _print(self, data: bytes) -> None:
        self.slow()
        self.printed.extend(data)

    def _defer(self, seconds: float, callback: Callable[[], None]) -> None:
        self.waits.append(seconds)
        self.deferred.append(callback)

    def read(self, register: int) -> int:
        value = self.serial.read(register, 1)
        assert value is not None
        return value

    def write(self, register: int, value: int) -> None:
        finish(self.serial.write(register, 1, value))

    @property
    def interrupts(self) -> int:
        return drain_eventfd(self.irq_fd)

    def native(self, data: bytes) -> None:
        """What a vCPU loop does with THR writes."""
        for byte in data:
            head = self.page.tx_head
            self.page.tx_slots[head % TX_SLOTS] = byte
            self.page.tx_head = head + 1
        if data and self.page.tx_wanted:
            self.page.tx_wanted = 0
            os.eventfd_write(self.page.tx_fd, 1)

    def poll(self) -> int:
        """Run what was deferred; how many callbacks that were."""
        due, self.deferred = self.deferred, []
        for callback in due:
            callback()
        return len(due)

    def close(self) -> None:
        self.serial.close()
        os.close(self.irq_fd)


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    made.close()


def test_power_on(port: Port) -> None:
    assert [port.read(register) for register in (IER, IIR, LCR, MCR, LSR, MSR, SCR)] == [
        *(0x00, 0xC1, 0x03, 0x08, 0x60, 0xB0, 0x00)
    ]
    port.write(LCR, 0x83)
    assert (port.read(DATA), port.read(IER)) == (12, 0)


def test_only_byte_accesses_count(port: Port) -> None:
    for size in (2, 4):
        assert port.serial.read(LSR, size) is None
        assert port.serial.write(DATA, size, 0x4141) is None
    assert not port.printed


def test_the_page_tells_the_vcpu_loops_what_they_need(port: Port) -> None:
    assert (port.page.present, port.page.lcr, port.page.mcr, port.page.lsr) == (1, 3, 8, 0x60)
    assert (port.page.irq_fd, port.page.tx_fd) == (port.irq_fd, port.serial.tx_fd)
    assert port.page.tx_wanted != 0, "armed: the first byte wakes us"
    port.write(LCR, 0x83)
    port.write(MCR, 0x1B)
    port.write(LCR, 0x13)
    port.write(IER, 0xFF)
    assert (port.page.lcr, port.page.mcr, port.page.ier) == (0x13, 0x1B, 0x0F)


def test_registers_that_are_read_only_or_not_there(port: Port) -> None:
    for register, value in ((IIR, 0xC7), (LSR, 0xFF), (MSR, 0xFF)):
        port.write(register, value)
    assert [port.read(register) for register in (IIR, LSR, MSR)] == [0xC1, 0x60, 0xB0]
    port.write(SCR, 0x5A)
    assert port.read(SCR) == 0x5A


def test_divisor(port: Port) -> None:
    port.write(LCR, 0x80)
    port.write(DATA, 0x34)
    port.write(IER, 0x12)
    assert (port.read(DATA), port.read(IER)) == (0x34, 0x12)
    port.write(LCR, 3)
    assert port.read(IER) == 0
    assert not port.printed
    assert port.serial.save()["baud_divisor"] == 0x1234


def test_batch_that_takes_long_is_followed_by_a_longer_wait(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is ours: an output that takes 1.5 ms leaves the guest ten times as much before the next look."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def spend(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    for seconds in (0.00001, 0.0015, 0.5):
        port.slow = spend(seconds)
        port.native(b"x")
        port.serial.on_tx()
        port.poll()
    assert port.waits == pytest.approx([0.001, 0.015, 0.02])


def test_output_in_batches_and_in_order(port: Port) -> None:
    port.native(b"hello ")
    assert port.page.tx_wanted == 0
    port.native(b"world")
    port.serial.on_tx()
    assert port.printed == b"hello world"
    assert len(port.deferred) == 1, "looked at again soon, before vCPUs have to wake us"
    port.native(b"!")
    assert drain_eventfd(port.serial.tx_fd) == 0
    assert port.poll() == 1
    assert port.printed == b"hello world!"
    assert port.poll() == 1
    assert port.deferred == []
    assert port.page.tx_wanted != 0
    port.native(b"?")
    assert drain_eventfd(port.serial.tx_fd) == 1


def test_a_byte_that_comes_here_follows_what_is_in_the_ring(port: Port) -> None:
    port.native(b"ab")
    port.write(DATA, ord("c"))
    assert port.printed == b"abc"


def test_a_full_output_stops_the_ring_and_lets_the_guest_wait(port: Port) -> None:
    port.full = True
    port.native(b"a")
    port.serial.on_tx()
    assert not port.printed
    reactor = Reactor()
    effect = port.serial.write(DATA, 1, ord("b"))
    assert effect is not None
    task = reactor.spawn(effect)
    reactor.call_soon(reactor.stop)
    reactor.run()
    assert not task.done() and not port.printed
    port.full = False
    port.serial.output_drained()
    reactor.run_until(task, 5)
    assert port.printed == b"ab"
    reactor.close()


def test_a_thr_write_interrupts_only_when_that_is_enabled(port: Port) -> None:
    port.write(DATA, 65)
    assert (port.interrupts, port.read(IIR)) == (0, 0xC1)
    port.write(IER, 2)
    assert port.interrupts == 0, "enabling alone raises nothing"
    port.write(DATA, 66)
    assert port.interrupts == 1
    assert port.read(IIR) == 0xC2
    assert port.read(IIR) == 0xC1, "reading clears"


def test_a_transmit_interrupt_that_a_vcpu_raised_is_seen_and_cleared_by_iir(port: Port) -> None:
    port.write(IER, 2)
    port.page.thr_irq_pending = 1
    assert port.read(IIR) == 0xC2
    assert port.page.thr_irq_pending == 0
    assert port.read(IIR) == 0xC1


def test_input(port: Port) -> None:
    port.write(IER, 1)
    port.serial.push_input(b"xyz")
    assert port.interrupts == 1
    assert (port.read(IIR), port.read(LSR), port.page.lsr) == (0xC4, 0x61, 0x61)
    assert [port.read(DATA) for _ in range(4)] == [ord("x"), ord("y"), ord("z"), 0]
    assert (port.read(LSR), port.page.lsr) == (0x60, 0x60)


def test_input_without_its_interrupt_is_only_seen_in_lsr(port: Port) -> None:
    port.serial.push_input(b"x")
    assert (port.interrupts, port.read(IIR), port.read(LSR)) == (0, 0xC1, 0x61)


def test_enabling_the_receive_interrupt_while_a_byte_waits_raises_it(port: Port) -> None:
    """Linux prints to its console with all interrupts off: what is typed meanwhile is announced afterwards."""
    port.write(IER, 5)
    port.write(IER, 0)
    port.serial.push_input(b"x")
    assert (port.interrupts, port.read(IIR)) == (0, 0xC1)
    port.write(IER, 5)
    assert (port.interrupts, port.read(IIR)) == (1, 0xC4)
    port.write(IER, 7)
    assert port.interrupts == 0, "enabled already"


def test_enabling_the_receive_interrupt_without_a_byte_raises_nothing(port: Port) -> None:
    port.write(IER, 1)
    assert (port.interrupts, port.read(IIR)) == (0, 0xC1)


def test_receive_interrupt_lasts_until_the_last_byte_is_read(port: Port) -> None:
    """A driver that takes a limited number of bytes at a time looks at IIR whether to go on."""
    port.write(IER, 1)
    port.serial.push_input(b"xy")
    assert (port.read(IIR), port.read(IIR)) == (0xC4, 0xC4)
    port.read(DATA)
    assert port.read(IIR) == 0xC4
    port.read(DATA)
    assert port.read(IIR) == 0xC1


def test_received_byte_goes_before_a_transmit_interrupt_which_stays(port: Port) -> None:
    port.write(IER, 3)
    port.serial.push_input(b"x")
    port.write(DATA, 65)
    assert port.serial.save()["interrupt_identification"] == 6
    assert port.read(IIR) == 0xC4
    port.read(DATA)
    assert port.read(IIR) == 0xC2
    assert port.read(IIR) == 0xC1


@pytest.mark.parametrize("ier", [0, 1, 2, 3])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("sent", [False, True])
def test_guest_that_goes_on_gets_an_edge_for_what_is_pending(port: Port, ier: int, waits: bool, sent: bool) -> None:
    port.write(IER, ier)
    if waits:
        port.serial.push_input(b"x")
    if sent:
        port.write(DATA, 65)
    assert port.interrupts == (waits and bool(ier & 1)) + (sent and bool(ier & 2))
    other = Port()
    other.serial.load(port.serial.save())
    assert other.interrupts == 0, "not before its IOAPIC is there"
    other.serial.signal()
    assert bool(other.interrupts) == bool((waits and ier & 1) or (sent and ier & 2))
    other.close()


def test_loopback(port: Port) -> None:
    port.write(MCR, 0x18)
    port.write(IER, 1)
    for byte in range(70):
        port.write(DATA, byte)
    port.serial.push_input(b"lost")
    assert not port.printed
    assert port.interrupts == 64
    assert [port.read(DATA) for _ in range(65)] == [*range(64), 0]


def test_the_host_side_is_held_back_while_the_guest_does_not_read(port: Port) -> None:
    port.serial.push_input(bytes(INPUT_HIGH))
    assert port.held == []
    port.serial.push_input(b"more")
    assert port.held == [True]
    for _ in range(INPUT_HIGH + 4 - INPUT_LOW + 1):
        port.read(DATA)
    assert port.held == [True, False]


def test_state(port: Port) -> None:
    port.write(IER, 3)
    port.write(LCR, 0x1B)
    port.write(MCR, 0x0B)
    port.write(SCR, 7)
    port.native(b"tail")
    port.page.thr_irq_pending = 1
    port.serial.push_input(b"in")
    state = port.serial.save()
    assert port.printed == b"tail", "nothing stays behind in the ring"
    assert state == {
        "interrupt_enable": 3,
        "interrupt_identification": 6,
        "line_control": 0x1B,
        "line_status": 0x61,
        "modem_control": 0x0B,
        "modem_status": 0xB0,
        "scratch": 7,
        "baud_divisor": 12,
        "in_buffer": [105, 110],
    }
    other = Port()
    other.serial.load(state)
    assert other.serial.save() == state
    assert (other.page.ier, other.page.lcr, other.page.mcr, other.page.lsr) == (3, 0x1B, 0x0B, 0x61)
    assert other.read(IIR) == 0xC4
    assert [other.read(DATA), other.read(DATA)] == [105, 110]
    other.close()


@pytest.mark.parametrize(
    ("key", "value"), [("line_control", 256), ("in_buffer", [300]), ("baud_divisor", -1), ("scratch", True)]
)
def test_a_bad_state_changes_nothing(port: Port, key: str, value: object) -> None:
    before = port.serial.save()
    with pytest.raises(ProtocolError, match=f"__serial: {key}"):
        port.serial.load({**before, key: value})
    assert port.serial.save() == before


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([1, 2, 4]), st.integers(0, 255)),
        max_size=80,
    )
)
def test_no_access_raises_and_lsr_shows_whether_input_waits(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    port = Port()
    try:
        for is_write, register, size, value in accesses:
            if is_write:
                finish(port.serial.write(register, size, value))
            else:
                port.serial.read(register, size)
            if value & 1:
                port.serial.push_input(b"k")
            state = port.serial.save()
            waiting = state["in_buffer"]
            assert isinstance(waiting, list)
            assert bool(port.page.lsr & 1) == bool(waiting)
    finally:
        port.close()
