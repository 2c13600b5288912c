"""Allow-lists of system calls: their text, and the BPF program that the kernel runs at every call.

A list is lines of text, read from the top; `#` begins a comment:

    read                      allowed
    ioctl arg1==0x541b        allowed with this argument: the low 32 bits, which is all that the kernel takes of those
    clone arg0&0x10000        allowed if this bit is set
    mmap arg2!&4              allowed if no bit of these is set; of several conditions on a line all must hold
    kill arg0==self           this process's pid
    openat errno=EACCES       refused with this error, also where a forbidden call is death: the interpreter and libc
                              call it on rare paths and go on without it
    @worker                   the lines of another list

A call that several lines name is allowed if one of them allows it. What no line names is forbidden, and `Forbidden`
says what that leads to. Other architectures' calls (32-bit, x32) are forbidden.

Sources: seccomp(2), linux/seccomp.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
from enum import IntEnum
from struct import Struct

from shared.errors import ConfigError
from shared.records import NamedTuple
from shared.syscall_numbers import NUMBERS
from shared.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

AUDIT_ARCH_X86_64: Final = 0xC000003E
SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO = 0x8000_0000, 0x0005_0000
SECCOMP_RET_LOG, SECCOMP_RET_ALLOW = 0x7FFC_0000, 0x7FFF_0000
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC = 1, 1
# offsets in struct seccomp_data
_NR, _ARCH, _ARGUMENTS = 0, 4, 16
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_INSTRUCTION: Final = Struct("HBBI")  # struct sock_filter
BPF_MAXINSNS: Final = 4096
FOLDER: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "syscalls")
SUFFIX: Final = ".txt"


class Forbidden(IntEnum):
    """What a system call outside the list leads to: seccomp's return value. Names are `--seccomp`'s values in ours."""

    KILL = SECCOMP_RET_KILL_PROCESS
    ERRNO = SECCOMP_RET_ERRNO | errno.EPERM
    LOG = SECCOMP_RET_LOG  # it is carried out, and the kernel's audit log names it


# By the value of `--seccomp`; None: no filter.
MODES: Final[dict[str, Forbidden | None]] = {
    "true": Forbidden.KILL, "errno": Forbidden.ERRNO, "log": Forbidden.LOG, "false": None,
}  # fmt: skip


class sock_filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class sock_fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(sock_filter)))


class Test(NamedTuple):
    """`kind` is "==", "&" or "!&"; `value` None is our own pid."""

    argument: int
    kind: str
    value: int | None


class Rule(NamedTuple):
    """One line of a list: allowed if all tests hold, or refused with `error`."""

    name: str
    tests: tuple[Test, ...] = ()
    error: int = 0


def parse(text: str, where: str = "") -> tuple[Rule, ...]:
    """The rules of a list's text. Raises ConfigError that names list, line and what is wrong."""
    rules: list[Rule] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            rules += load(words[0][1:]) if words[0].startswith("@") else [_rule(*words)]
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"system call list {where}, line {number}: {line.strip()!r}: {error}"
            ) from None
    return tuple(rules)


def _rule(name: str, *conditions: str) -> Rule:
    if name not in NUMBERS:
        raise ValueError("shared/syscall_numbers.py has no such call")
    if len(conditions) == 1 and conditions[0].startswith("errno="):
        return Rule(name, error=getattr(errno, conditions[0].removeprefix("errno=")))
    return Rule(name, tuple(_test(condition) for condition in conditions))


def _test(condition: str) -> Test:
    for kind in ("!&", "==", "&"):
        left, found, right = condition.partition(kind)
        if found:
            argument = int(left.removeprefix("arg"))
            if not 0 <= argument <= 5:
                raise ValueError("arguments are arg0 to arg5")
            return Test(argument, kind, None if right == "self" else int(right, 0))
    raise ValueError("a condition is argN==X, argN&X, argN!&X or errno=NAME")


def exists(name: str) -> bool:
    return name in _loaded or os.path.exists(os.path.join(FOLDER, name + SUFFIX))


def load_all() -> None:
    """Read every list now, so that no worker's start has to."""
    for entry in os.listdir(FOLDER):
        if entry.endswith(SUFFIX):
            load(entry.removesuffix(SUFFIX))


_loaded: dict[str, tuple[Rule, ...]] = {}


def load(name: str) -> tuple[Rule, ...]:
    """The rules of a list of shared/syscalls, read once. Raises ConfigError, also when there is none."""
    if name not in _loaded:
        _loaded[name] = _read(name)
    return _loaded[name]


def _read(name: str) -> tuple[Rule, ...]:
    path = os.path.join(FOLDER, name + SUFFIX)
    try:
        with open(path) as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"system call list {path}: {error.strerror}") from error
    return parse(text, path)


Instruction = tuple[int, int, int, int]


def assemble(rules: Iterable[Rule], forbidden: Forbidden = Forbidden.KILL) -> sock_fprog:
    """The program for this process. The kernel copies it when it is installed."""
    by_name: dict[str, list[Rule]] = {}
    for rule in rules:
        by_name.setdefault(rule.name, []).append(rule)
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, forbidden),
        (_LOAD, 0, 0, _NR),
    ]
    for name, alternatives in by_name.items():
        block = _block(alternatives, forbidden)
        code += [(_JUMP_IF_EQUAL, 0, len(block), NUMBERS[name]), *block]
    code.append((_RETURN, 0, 0, forbidden))
    assert len(code) <= BPF_MAXINSNS
    packed = b"".join([_INSTRUCTION.pack(*instruction) for instruction in code])
    return sock_fprog(len(code), (sock_filter * len(code)).from_buffer_copy(packed))


def _block(alternatives: list[Rule], forbidden: Forbidden) -> list[Instruction]:
    """The verdict on one call, known by its number."""
    block: list[Instruction] = []
    refusal: int = forbidden
    for rule in alternatives:
        if rule.error:
            # In `log` nothing is refused.
            refusal = forbidden if forbidden is Forbidden.LOG else SECCOMP_RET_ERRNO | rule.error
            continue
        for at, test in enumerate(rule.tests):
            value = os.getpid() if test.value is None else test.value
            jump = _JUMP_IF_EQUAL if test.kind == "==" else _JUMP_IF_SET
            past = 2 * (len(rule.tests) - at - 1) + 1  # the tests that are left, and the permission
            jumps = (past, 0) if test.kind == "!&" else (0, past)
            block += [(_LOAD, 0, 0, _ARGUMENTS + 8 * test.argument), (jump, *jumps, value & 0xFFFF_FFFF)]
        block.append((_RETURN, 0, 0, SECCOMP_RET_ALLOW))
        if not rule.tests:
            return [block[-1]]
    return [*block, (_RETURN, 0, 0, refusal)]


def install(rules: Iterable[Rule], forbidden: Forbidden) -> None:
    """From now on all threads of this process are held to the list. Needs no_new_privs. Raises OSError."""
    from shared.linux import check, libc

    program = assemble(rules, forbidden)
    flags = SECCOMP_FILTER_FLAG_TSYNC  # native threads and zmq's run already
    answer = libc.syscall(NUMBERS["seccomp"], SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program))
    if answer > 0:
        raise OSError(errno.ESRCH, f"seccomp: thread {answer} can't be held to the filter")
    check(answer, "seccomp")
