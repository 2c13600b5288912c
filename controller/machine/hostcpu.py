"""The host's own CPUID, asked by the instruction.

KVM_GET_SUPPORTED_CPUID leaves out what the guest is to see as well (brand string, cache descriptions), and no file in
/proc has it all. CPUID needs no privilege, so a few bytes of machine code do it; no page is ever writable and
executable at once.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from shared.linux import PROT_READ, check, libc
from shared.typed import Any

PROT_EXEC = 4
BRAND_STRING_LEAVES = range(0x8000_0002, 0x8000_0005)
PHYS_BITS_LEAF = 0x8000_0008
DEFAULT_PHYS_BITS = 36

# void cpuid(uint32_t leaf, uint32_t index, uint32_t registers[4]), System V calling convention.
_CODE = bytes.fromhex(
    "53"  # push rbx
    "4989d0"  # mov r8, rdx
    "89f8"  # mov eax, edi
    "89f1"  # mov ecx, esi
    "0fa2"  # cpuid
    "418900"  # mov [r8], eax
    "41895804"  # mov [r8 + 4], ebx
    "41894808"  # mov [r8 + 8], ecx
    "4189500c"  # mov [r8 + 12], edx
    "5b"  # pop rbx
    "c3"  # ret
)


@cache
def _instruction() -> tuple[Any, mmap.mmap]:
    """The function, and the page that it lives in."""
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    check(libc.mprotect(address, mmap.PAGESIZE, PROT_READ | PROT_EXEC), "mprotect")
    return ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(address), page


def host_cpuid(leaf: int, index: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of this CPU."""
    registers = (ctypes.c_uint32 * 4)()
    _instruction()[0](leaf, index, ctypes.addressof(registers))
    eax, ebx, ecx, edx = registers
    return eax, ebx, ecx, edx


def host_phys_bits() -> int:
    """Width of a physical address on this host, for `layout.compute`."""
    if host_cpuid(0x8000_0000)[0] < PHYS_BITS_LEAF:
        return DEFAULT_PHYS_BITS
    return host_cpuid(PHYS_BITS_LEAF)[0] & 0xFF
