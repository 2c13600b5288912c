"""COM1, a 16550 without FIFOs as Cloud Hypervisor has it: 8 ports from 0x3F8, interrupt line 4, edges only.

Its registers live in the page that the vCPU loops share (vcpu_worker/layout.py, UartPage). They finish most THR
writes and LSR reads themselves; bytes wait in the page's ring until `drain()` takes them in batches. Everything
else comes here.

Sources: National Semiconductor PC16550D data sheet; the reference's cloud-hypervisor-machine page, sections 5.1
and 7.7. Things to know: FCR writes are ignored, LSR never shows an error, and enabling the transmit interrupt
raises none by itself. The receive interrupt is as in hardware: it lasts as long as a byte waits, and enabling it then
is an edge. Linux has all interrupts off while its console prints, and a byte that comes meanwhile must not be lost.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

from controller.bus import Effect
from controller.devices.state import Fields, State
from shared.reactor import Future, drain_eventfd
from shared.typed import Final
from vcpu_worker.layout import UartPage

_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)

_IER_RECEIVE: Final = 0x01
_IER_TRANSMIT: Final = 0x02
_IER_WRITABLE: Final = 0x0F
_IIR_NONE: Final = 0x01
_IIR_TRANSMIT: Final = 0x02
_IIR_RECEIVE: Final = 0x04
_IIR_FIFO: Final = 0xC0
_LCR_DLAB: Final = 0x80
_MCR_LOOP: Final = 0x10
_LSR_DATA: Final = 0x01
_LSR_IDLE: Final = 0x60  # transmitter empty, line idle
_MODEM_STATUS: Final = 0xB0
_LOOPBACK_LIMIT: Final = 64

# A fast typist, a file as standard input: hold the host side back between these marks.
INPUT_HIGH, INPUT_LOW = 4096, 1024
# After a batch the ring is looked at again so many seconds later, before vCPUs are asked to wake us: a guest that
# prints costs a thousand wake-ups a second, not one a byte. Where a batch itself takes long (we share a slow CPU with
# the guest, which prints its kernel's messages), many times as long later, so that it gets most of that CPU.
BATCH_SECONDS: Final = 0.001
MOST_BATCH_SECONDS: Final = 0.02
BATCH_REST: Final = 10


class Serial:
    """The device. `irq_fd` is the eventfd of its IOAPIC pin. The owner reads `tx_fd` and calls `on_tx()` then."""

    def __init__(
        self,
        page: UartPage,
        irq_fd: int,
        output: Callable[[bytes], None],
        defer: Callable[[float, Callable[[], None]], object],
        *,
        is_full: Callable[[], bool] = lambda: False,
        hold_input: Callable[[bool], None] = lambda held: None,
    ) -> None:
        """`output` takes what the guest prints; while `is_full()` it is given nothing and the guest waits, until
        `output_drained()`. `hold_input(True)` asks for no more `push_input()`. `defer` is Reactor.call_later.
        """
        self.tx_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._page = page
        self._irq_fd = irq_fd
        self._output = output
        self._defer = defer
        self._is_full = is_full
        self._hold_input = hold_input
        self._input: deque[int] = deque()
        self._input_held = False
        self._scratch = 0
        self._divisor = 12  # 9600 baud
        self._room: Future[None] | None = None  # vCPUs that wait for the output
        self._scheduled = False
        self._wait = BATCH_SECONDS
        page.ier, page.lcr, page.mcr, page.lsr = 0, 0x03, 0x08, _LSR_IDLE
        page.irq_fd, page.tx_fd = irq_fd, self.tx_fd
        page.thr_irq_pending = 0
        page.present = 1
        self._pump()

    # Output -----------------------------------------------------------------------------------------------------

    def on_tx(self) -> None:
        """`tx_fd` is readable: the ring has bytes."""
        drain_eventfd(self.tx_fd)
        self._pump()

    def _pump(self) -> None:
        """One batch. While bytes keep coming the ring is polled; when it stays empty vCPUs are asked to wake us."""
        if self._is_full():
            return  # output_drained() goes on
        began = time.monotonic()
        data = self._page.drain()
        if data:
            self._output(data)
            took = time.monotonic() - began
            self._wait = min(max(BATCH_SECONDS, BATCH_REST * took), MOST_BATCH_SECONDS)
            self._poll_later()
        elif self._page.arm():
            self._poll_later()

    def _poll_later(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._defer(self._wait, self._polled)

    def _polled(self) -> None:
        self._scheduled = False
        if self._page.present:
            self._pump()

    def output_drained(self) -> None:
        """The output takes data again."""
        self._pump()
        room, self._room = self._room, None
        if room is not None:
            room.set_result(None)

    def flush(self) -> None:
        """Give everything in the ring to the output, full or not: before a state is taken and at the end."""
        while data := self._page.drain():
            self._output(data)

    # Input ------------------------------------------------------------------------------------------------------

    def push_input(self, data: bytes) -> None:
        """What the user types. In loopback mode the line is cut and it is lost."""
        if not data or self._page.mcr & _MCR_LOOP:
            return
        self._input.extend(data)
        self._received()
        if len(self._input) > INPUT_HIGH and not self._input_held:
            self._input_held = True
            self._hold_input(True)

    def _received(self) -> None:
        # LSR first: the interrupt may reach another vCPU, which reads LSR, before this returns.
        self._page.lsr |= _LSR_DATA
        if self._page.ier & _IER_RECEIVE:
            os.eventfd_write(self._irq_fd, 1)

    def _take_input(self) -> int:
        if len(self._input) <= 1:
            self._page.lsr &= ~_LSR_DATA
        byte = self._input.popleft() if self._input else 0
        if self._input_held and len(self._input) < INPUT_LOW:
            self._input_held = False
            self._hold_input(False)
        return byte

    # Registers --------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int | None:
        if size != 1:
            return None
        if offset <= _IER and self._page.lcr & _LCR_DLAB:
            return self._divisor >> 8 * offset & 0xFF
        match offset:
            case 0:  # _DATA
                return self._take_input()
            case 2:  # _IIR
                return self._identify() | _IIR_FIFO
        return self._plain_registers()[offset]

    def _pending(self) -> int:
        receives = self._page.ier & _IER_RECEIVE and self._page.lsr & _LSR_DATA
        return (_IIR_RECEIVE if receives else 0) | (_IIR_TRANSMIT if self._page.thr_irq_pending else 0)

    def _identify(self) -> int:
        """The foremost interrupt. A transmit interrupt is over when the guest has been told of it, and only then: a
        vCPU may raise the next one at any time."""
        pending = self._pending()
        if pending & _IIR_RECEIVE:
            return _IIR_RECEIVE
        if pending:
            self._page.thr_irq_pending = 0
        return pending or _IIR_NONE

    def signal(self) -> None:
        """The guest goes on, here or elsewhere: one edge for what is pending, so that none that was lost is missed."""
        if self._pending():
            os.eventfd_write(self._irq_fd, 1)

    def _plain_registers(self) -> tuple[int, ...]:
        page = self._page
        return (0, page.ier, 0, page.lcr, page.mcr, page.lsr, _MODEM_STATUS, self._scratch)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        if size != 1:
            return None
        page = self._page
        if offset <= _IER and page.lcr & _LCR_DLAB:
            shift = 8 * offset
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
        elif offset == _DATA:
            return self._transmit(value)
        elif offset == _IER:
            enabled = value & ~page.ier
            page.ier = value & _IER_WRITABLE
            if enabled & _IER_RECEIVE and page.lsr & _LSR_DATA:
                os.eventfd_write(self._irq_fd, 1)
        elif offset == _LCR:
            page.lcr = value
        elif offset == _MCR:
            page.mcr = value
        elif offset == _SCR:
            self._scratch = value
        return None

    def _transmit(self, value: int) -> Effect | None:
        """A byte that the vCPU could not put into the ring itself: loopback, or the ring is full."""
        if self._page.mcr & _MCR_LOOP:
            if len(self._input) < _LOOPBACK_LIMIT:
                self._input.append(value)
                self._received()
            return None
        if self._is_full():
            return self._transmit_later(value)
        self._send(value)
        return None

    def _send(self, value: int) -> None:
        self.flush()  # what is in the ring is older
        self._output(bytes((value,)))
        if self._page.ier & _IER_TRANSMIT:
            self._page.thr_irq_pending = 1
            os.eventfd_write(self._irq_fd, 1)

    async def _transmit_later(self, value: int) -> None:
        while self._is_full():
            if self._room is None:
                self._room = Future()
            await self._room
        self._send(value)

    # State ------------------------------------------------------------------------------------------------------

    def save(self) -> State:
        """Keys of Cloud Hypervisor's `__serial`. vCPUs are paused; nothing is left in the ring afterwards."""
        self.flush()
        page = self._page
        return {
            "interrupt_enable": page.ier,
            "interrupt_identification": self._pending() or _IIR_NONE,
            "line_control": page.lcr,
            "line_status": page.lsr,
            "modem_control": page.mcr,
            "modem_status": _MODEM_STATUS,
            "scratch": self._scratch,
            "baud_divisor": self._divisor,
            "in_buffer": list(self._input),
        }

    def load(self, state: object) -> None:
        """Raises ProtocolError; nothing has changed then."""
        fields = Fields("__serial", state)
        ier, lcr, mcr, iir, scratch = (
            fields.integer(key, 8)
            for key in (
                "interrupt_enable",
                "line_control",
                "modem_control",
                "interrupt_identification",
                "scratch",
            )
        )
        divisor = fields.integer("baud_divisor", 16)
        buffer = fields.integers("in_buffer", 8, limit=1 << 20)

        page = self._page
        page.ier, page.lcr, page.mcr = ier & _IER_WRITABLE, lcr, mcr
        page.thr_irq_pending = int(bool(iir & _IIR_TRANSMIT))
        self._scratch, self._divisor = scratch, divisor
        self._input = deque(buffer)
        page.lsr = _LSR_IDLE | (_LSR_DATA if buffer else 0)

    def close(self) -> None:
        """Take the device away from the vCPUs, which must not run any more."""
        self.flush()
        self._page.present = 0
        self._page.tx_fd = self._page.irq_fd = 0
        os.close(self.tx_fd)
