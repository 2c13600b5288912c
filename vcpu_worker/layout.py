"""The shared pages of a VM's vCPU processes: layout.h field by field (tests compare the two).

    StatePages     one shared mapping: a MachinePage, then one VcpuPage of VCPU_PAGE_SIZE bytes per vCPU index
    MachinePage    .timer (ACPI PM timer)  .uart (COM1 registers and transmit ring)  .pci (CF8 latch, config space)

Zeros are a valid initial state: no UART, no PCI, no PM timer, every exit goes to the controller. Epochs and the
done tables belong together, so a mapping is used for one life of one VM.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Iterator
from ctypes import c_int32, c_uint8, c_uint32, c_uint64

from shared import native
from shared.typed import Any

MAX_VCPUS = 1024
TX_SLOTS = 4096
PCI_SLOTS = 32
PCI_CONFIG_SIZE = 4096
VCPU_PAGE_SIZE = 4096
EXIT_SENTINEL = 0xF1071111
COMMAND_PAUSE = 1
EXIT_REASONS = 48


class State(enum.IntEnum):
    """What a vCPU process is doing; its own word, for people and supervision."""

    STARTING = 0  # cloned, has not entered the guest yet
    RUNNING = 1  # in KVM_RUN, or finishing an exit by itself
    EXITING = 2  # waits until the controller has finished an exit
    PARKED = 3  # paused, no exit pending
    FAILED = 4  # KVM_RUN failed; waits for the controller


class Stat(enum.IntEnum):
    """Indices into VcpuPage.stats: exits finished natively, exits handed over, and events."""

    UART_WRITE = 0
    UART_STATUS = 1
    PCI_ADDRESS = 2
    PCI_READ = 3
    ECAM_READ = 4
    PM_TIMER = 5
    POST_CODE = 6
    HANDED_PIO = 7
    HANDED_MMIO = 8
    HANDED_OTHER = 9
    INTERRUPTED = 10
    STARTS = 11


class Finisher(enum.IntEnum):
    """Who finished an exit: the first index of VcpuPage.exits. The second is KVM's reason, EXIT_REASONS - 1 for those
    that it can't tell."""

    VCPU = 0
    CONTROLLER = 1


class VcpuPage(ctypes.Structure):
    _fields_ = (
        ("command", c_uint32),
        ("pad0", c_uint32),
        ("done", c_uint64),
        ("pad1", c_uint8 * 48),
        ("state", c_uint32),
        ("parked", c_uint32),
        ("error", c_uint32),
        ("pad2", c_uint32),
        ("epoch", c_uint64),
        ("handoff", c_uint64),
        ("stats", c_uint64 * len(Stat)),
        ("exits", (c_uint64 * EXIT_REASONS) * len(Finisher)),
    )


class UartPage(ctypes.Structure):
    """COM1. The serial device writes present, ier, lcr, mcr, lsr, irq_fd and tx_fd; vCPUs write the rest.

    A vCPU finishes a THR write itself while lcr.DLAB and mcr.LOOP are clear and the ring has room; it reads LSR from
    here. With ier.THRI set it then sets thr_irq_pending and writes irq_fd; the device clears thr_irq_pending when
    the guest reads IIR. Fd 0 means none.
    """

    _fields_ = (
        ("present", c_uint32),
        ("ier", c_uint32),
        ("lcr", c_uint32),
        ("mcr", c_uint32),
        ("lsr", c_uint32),
        ("thr_irq_pending", c_uint32),
        ("irq_fd", c_int32),
        ("tx_fd", c_int32),
        ("tx_wanted", c_uint64),
        ("tx_wishes", c_uint64),
        ("pad0", c_uint8 * 16),
        ("tx_head", c_uint64),
        ("pad1", c_uint8 * 56),
        ("tx_tail", c_uint64),
        ("pad2", c_uint8 * 56),
        ("tx_done", c_uint64 * MAX_VCPUS),
        ("tx_slots", c_uint64 * TX_SLOTS),
    )

    def drain(self) -> bytes:
        """Take all transmitted bytes out of the ring, in the guest's global order. Only one consumer may call it."""
        count = library().uart_drain(ctypes.addressof(self), _drain_buffer, TX_SLOTS)
        return _drain_buffer.raw[:count]

    def arm(self) -> bool:
        """Ask for one write to tx_fd at the next byte. True when bytes are there already: drain, then arm again."""
        return bool(library().uart_arm(ctypes.addressof(self)))


class PciPage(ctypes.Structure):
    """Configuration space of bus 0, function 0, as the vCPUs read it.

    config[slot][dword] holds little-endian dwords; a dword whose bit is set in dynamic[slot] is read by the
    controller. A slot whose bit in `present` is clear reads as all ones. Writes always go to the controller.
    """

    _fields_ = (
        ("latch", c_uint64),
        ("latch_tag", c_uint64),
        ("ecam_base", c_uint64),
        ("ecam_size", c_uint64),
        ("present", c_uint32),
        ("enabled", c_uint32),
        ("pad0", c_uint8 * 24),
        ("latch_done", c_uint64 * MAX_VCPUS),
        ("dynamic", (c_uint32 * (PCI_CONFIG_SIZE // 4 // 32)) * PCI_SLOTS),
        ("config", (c_uint32 * (PCI_CONFIG_SIZE // 4)) * PCI_SLOTS),
    )

    def set_address(self, value: int) -> None:
        """Store into the CF8 latch from the controller: restore, or an access that is not a dword."""
        library().pci_latch_store(ctypes.addressof(self), value)

    def set_dynamic(self, slot: int, dword: int, dynamic: bool = True) -> None:
        """Say whether the controller answers reads of this dword of a slot's configuration space."""
        word, bit = divmod(dword, 32)
        if dynamic:
            self.dynamic[slot][word] |= 1 << bit
        else:
            self.dynamic[slot][word] &= ~(1 << bit)

    def config_view(self, slot: int) -> memoryview:
        """The slot's 4096 bytes as a writable memoryview of 1024 dwords (format "I")."""
        return memoryview(self.config[slot]).cast("B").cast("I")


class TimerPage(ctypes.Structure):
    """ACPI PM timer at port 0x608: 3.579545 MHz, 32 bits, 0 at CLOCK_MONOTONIC == start (ns)."""

    _fields_ = (("start", c_uint64), ("present", c_uint32), ("pad0", c_uint8 * 52))


class MachinePage(ctypes.Structure):
    _fields_ = (("timer", TimerPage), ("uart", UartPage), ("pci", PciPage))


class VcpuStart(ctypes.Structure):
    """struct vcpu_start: what vcpu_spawn() is given."""

    _fields_ = (
        ("page", c_uint64),
        ("run", c_uint64),
        ("machine", c_uint64),
        ("seccomp", c_uint64),
        ("stack", c_uint64),
        ("stack_size", c_uint64),
        ("vcpu_fd", c_int32),
        ("event_fd", c_int32),
        ("index", c_uint32),
        ("parent", c_int32),
        ("pidfd", c_int32),
        ("kick_signal", c_uint32),
        ("name", ctypes.c_char * 16),
    )


VCPU_PAGES_OFFSET = (ctypes.sizeof(MachinePage) + VCPU_PAGE_SIZE - 1) // VCPU_PAGE_SIZE * VCPU_PAGE_SIZE


class StatePages:
    """The pages in `buffer`, a writable shared mapping of zeros with state_size(vcpus) bytes or more.

    It must outlive every vCPU process. Raises ValueError when the buffer is too small.
    """

    def __init__(self, buffer: Any, vcpus: int) -> None:
        if not 0 < vcpus <= MAX_VCPUS:
            raise ValueError(f"{vcpus} vCPUs: 1 to {MAX_VCPUS} are possible")
        self.vcpus = vcpus
        self.machine = MachinePage.from_buffer(buffer)
        self._pages = tuple(
            VcpuPage.from_buffer(buffer, VCPU_PAGES_OFFSET + index * VCPU_PAGE_SIZE) for index in range(vcpus)
        )

    @property
    def uart(self) -> UartPage:
        page: UartPage = self.machine.uart
        return page

    @property
    def pci(self) -> PciPage:
        page: PciPage = self.machine.pci
        return page

    @property
    def timer(self) -> TimerPage:
        page: TimerPage = self.machine.timer
        return page

    def vcpu(self, index: int) -> VcpuPage:
        return self._pages[index]

    def __iter__(self) -> Iterator[VcpuPage]:
        return iter(self._pages)


def state_size(vcpus: int) -> int:
    """Bytes of shared memory that StatePages needs."""
    return VCPU_PAGES_OFFSET + vcpus * VCPU_PAGE_SIZE


_drain_buffer = ctypes.create_string_buffer(TX_SLOTS)
_library: ctypes.CDLL | None = None

# name: (result, arguments); pointers are plain addresses
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "vcpu_spawn": (ctypes.c_long, (c_uint64,)),
    "vcpu_command": (None, (c_uint64, c_uint32)),
    "vcpu_finish": (None, (c_uint64, c_uint64)),
    "uart_drain": (c_uint32, (c_uint64, ctypes.c_char_p, c_uint32)),
    "uart_arm": (c_uint32, (c_uint64,)),
    "pci_latch_store": (None, (c_uint64, c_uint32)),
}


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Give a loaded vcpu.so its signatures."""
    for name, (result, arguments) in _FUNCTIONS.items():
        function: Callable[..., Any] = getattr(loaded, name)
        function.restype = result  # type: ignore[attr-defined]  # ctypes has no public type for a function pointer
        function.argtypes = arguments  # type: ignore[attr-defined]
    return loaded


def library() -> ctypes.CDLL:
    """The native loop, loaded once. Raises HostError when it was never built."""
    global _library
    if _library is None:
        _library = declare(native.load("vcpu"))
    return _library
