"""shared.seccomp: lists as text, the program that comes of them, and what the kernel does with it in real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared import seccomp
from shared.errors import ConfigError
from shared.seccomp import Forbidden, Rule, assemble, parse, sock_fprog
from shared.seccomp import Test as Condition
from shared.syscall_numbers import NUMBERS
from tests.vmm import environment

LISTS = sorted(path.stem for path in Path(seccomp.FOLDER).glob(f"*{seccomp.SUFFIX}"))
ROOT = os.geteuid() == 0
ARCH = seccomp.AUDIT_ARCH_X86_64
# What no process that has a list may ever do, whatever its work.
NEVER = (
    "socket", "connect", "bind", "execve", "execveat", "fork", "vfork", "ptrace", "mount", "umount2", "unshare",
    "setns", "bpf", "pivot_root", "chroot", "process_vm_readv", "pidfd_open", "pidfd_getfd", "pidfd_send_signal",
    "io_uring_setup", "capset", "setrlimit", "openat2", "seccomp", "memfd_create", "ftruncate",
)  # fmt: skip
# Ways to have the kernel send a signal to another process, in its sender's name or nobody's.
F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY = 10, 15, 1024, 1026
FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI = 0x8901, 0x8902, 0x5452, 0x5412
NEVER_WITH = (
    ("fcntl", fcntl.F_SETOWN, 1), ("fcntl", F_SETSIG, signal.SIGKILL), ("fcntl", F_SETOWN_EX, 0),
    ("fcntl", F_SETLEASE, 0), ("fcntl", F_NOTIFY, 0), ("fcntl", fcntl.F_SETFL, os.O_ASYNC),
    ("fcntl", fcntl.F_SETFL, os.O_ASYNC | os.O_RDWR), ("ioctl", FIOSETOWN, 1), ("ioctl", SIOCSPGRP, 1),
    ("ioctl", FIOASYNC, 1), ("ioctl", TIOCSTI, 0),
)  # fmt: skip

TRY = """
import os, sys, threading
from shared import seccomp
from shared.linux import libc, prctl
prctl(38, 1)
started, go = threading.Event(), threading.Event()
found = []
def thread():
    started.set(); go.wait()
    found.append(libc.syscall(seccomp.NUMBERS["getppid"]))
if {threaded}:
    worker = threading.Thread(target=thread); worker.start(); started.wait()
seccomp.install(seccomp.parse(sys.argv[2]), seccomp.Forbidden[sys.argv[1]])
if {threaded}:
    go.set(); worker.join(); os._exit(0 if found == [-1] else 9)
{code}
"""


def run(program: sock_fprog, number: int, *arguments: int, arch: int = ARCH) -> int:
    """The program on one call, by an interpreter of our own: the kernel's reading of linux/filter.h."""
    words = {0: number, 4: arch}
    for at, argument in enumerate(arguments):
        words[16 + 8 * at] = argument & 0xFFFF_FFFF
    accumulator, at = 0, 0
    while True:
        step = program.filter[at]
        if step.code == 0x06:
            return int(step.k)
        if step.code == 0x20:
            accumulator = words.get(step.k, 0)
        else:
            true = accumulator == step.k if step.code == 0x15 else bool(accumulator & step.k)
            at += step.jt if true else step.jf
        at += 1
        assert at < program.len


def decide(text: str, call: str, *arguments: int, forbidden: Forbidden = Forbidden.KILL) -> int:
    return run(assemble(parse(text), forbidden), NUMBERS[call], *arguments)


ALLOW, KILL = seccomp.SECCOMP_RET_ALLOW, Forbidden.KILL


def test_parse_gives_rules() -> None:
    assert parse("# note\n\nread\nkill arg0==self  # itself\nopen errno=EACCES\nmmap arg2!&4 arg3&0x20") == (
        Rule("read"),
        Rule("kill", (Condition(0, "==", None),)),
        Rule("open", error=errno.EACCES),
        Rule("mmap", (Condition(2, "!&", 4), Condition(3, "&", 0x20))),
    )


@pytest.mark.parametrize(
    "line",
    [
        "sendfile64",
        "read arg0",
        "read arg6==1",
        "read arg0==x",
        "open errno=ENOTHING",
        "@none",
        "read errno=",
    ],
)
def test_a_line_that_is_none_is_refused_with_its_number(line: str) -> None:
    with pytest.raises(ConfigError, match=r"system call list"):
        parse(f"read\n{line}", "here")


def test_a_call_that_no_line_names_is_forbidden() -> None:
    assert decide("read", "read") == ALLOW
    assert decide("read", "write") == KILL


@pytest.mark.parametrize(
    ("condition", "value", "wanted"),
    [("arg1==5", 5, ALLOW), ("arg1==5", 4, KILL), ("arg1&6", 2, ALLOW), ("arg1&6", 9, KILL), ("arg1!&6", 9, ALLOW),
     ("arg1!&6", 2, KILL), ("arg1!&6", 0, ALLOW)],
)  # fmt: skip
def test_a_condition(condition: str, value: int, wanted: int) -> None:
    assert decide(f"ioctl {condition}\nread", "ioctl", 0, value) == wanted


def test_all_conditions_of_a_line_must_hold() -> None:
    text = "openat arg2&0x10000 arg2!&3 arg1==7\nread"
    assert decide(text, "openat", 0, 7, 0x10000) == ALLOW
    for arguments in ((0, 7, 0), (0, 7, 0x10001), (0, 8, 0x10000)):
        assert decide(text, "openat", *arguments) == KILL
    assert decide(text, "read") == ALLOW


def test_one_of_several_lines_is_enough() -> None:
    text = "ioctl arg1==1\nioctl arg1==2\nioctl errno=ENOTTY"
    assert decide(text, "ioctl", 0, 1) == decide(text, "ioctl", 0, 2) == ALLOW
    assert decide(text, "ioctl", 0, 3) == seccomp.SECCOMP_RET_ERRNO | errno.ENOTTY


def test_only_the_low_word_of_an_argument_counts() -> None:
    assert decide("ioctl arg1==5", "ioctl", 0, 0xDEAD_0000_0005) == ALLOW


def test_log_refuses_nothing() -> None:
    assert decide("open errno=EACCES", "open", forbidden=Forbidden.LOG) == Forbidden.LOG


@pytest.mark.parametrize("name", LISTS)
def test_calls_of_another_architecture_are_forbidden(name: str) -> None:
    program = assemble(seccomp.load(name))
    assert run(program, NUMBERS["read"], arch=0x4000_0003) == KILL
    assert run(program, NUMBERS["read"] | 0x4000_0000) == KILL  # x32


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("call", NEVER)
def test_no_list_allows(name: str, call: str) -> None:
    program = assemble(seccomp.load(name), Forbidden.ERRNO)
    assert run(program, NUMBERS[call], 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF) != ALLOW
    assert run(program, NUMBERS[call]) != ALLOW


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(("call", "command", "value"), NEVER_WITH)
def test_no_list_allows_this_command(name: str, call: str, command: int, value: int) -> None:
    assert run(assemble(seccomp.load(name)), NUMBERS[call], 0, command, value) == KILL


@pytest.mark.parametrize("name", LISTS)
def test_what_every_list_allows_of_fcntl(name: str) -> None:
    program = assemble(seccomp.load(name))
    for command in (fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC):
        assert run(program, NUMBERS["fcntl"], 0, command, 0xFFFF_FFFF) == ALLOW
    assert run(program, NUMBERS["fcntl"], 0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT | os.O_RDWR) == ALLOW


@pytest.mark.parametrize("name", LISTS)
def test_what_every_list_allows_of_processes_signals_and_code(name: str) -> None:
    program = assemble(seccomp.load(name))
    assert run(program, NUMBERS["clone"], 0x10000) == ALLOW
    assert run(program, NUMBERS["clone"], signal.SIGCHLD) == KILL
    assert (
        run(program, NUMBERS["kill"], os.getpid()) == run(program, NUMBERS["tgkill"], os.getpid()) == ALLOW
    )
    assert run(program, NUMBERS["kill"], os.getppid()) == run(program, NUMBERS["kill"], -1) == KILL
    assert run(program, NUMBERS["mmap"], 0, 4096, 3) == ALLOW
    assert run(program, NUMBERS["mmap"], 0, 4096, 5) == run(program, NUMBERS["mprotect"], 0, 4096, 7) == KILL


@pytest.mark.parametrize("name", [name for name in LISTS if name != "janitor"])
@pytest.mark.parametrize("call", ["open", "openat", "unlink"])
def test_names_are_refused_without_a_death(name: str, call: str) -> None:
    program = assemble(seccomp.load(name))
    assert run(program, NUMBERS[call], 0, 0, 0x10000) == seccomp.SECCOMP_RET_ERRNO | errno.EACCES


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_DIRECTORY, os.O_RDWR | os.O_TMPFILE,
                                   os.O_CREAT | os.O_DIRECTORY, os.O_TMPFILE])  # fmt: skip
def test_the_janitor_opens_directories_to_read_them_and_nothing_else(flags: int) -> None:
    program = assemble(seccomp.load("janitor"))
    assert run(program, NUMBERS["openat"], 0, 0, flags) != ALLOW
    assert run(program, NUMBERS["openat"], 0, 0, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) == ALLOW


def test_a_list_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="nonesuch"):
        seccomp.load("nonesuch")


def attempt(forbidden: Forbidden, text: str, code: str, threaded: bool = False) -> int:
    command = [sys.executable, "-c", TRY.format(code=code, threaded=threaded), forbidden.name, text]
    return subprocess.run(
        command, env=environment(), timeout=30, check=False, stderr=subprocess.DEVNULL
    ).returncode


GETPPID = "os._exit(0 if libc.syscall(110) == -1 else 1)"


@pytest.mark.parametrize(
    ("forbidden", "status"), [(Forbidden.KILL, -signal.SIGSYS), (Forbidden.ERRNO, 0), (Forbidden.LOG, 1)]
)
def test_the_kernel_on_a_forbidden_call(forbidden: Forbidden, status: int) -> None:
    assert attempt(forbidden, "exit_group\nwrite", GETPPID) == status


def test_threads_that_run_already_are_held_to_it_too() -> None:
    calls = (
        "futex",
        "exit_group",
        "write",
        "exit",
        "madvise",
        "munmap",
        "rt_sigprocmask",
        "mmap",
        "read",
        "close",
    )
    assert attempt(Forbidden.ERRNO, "\n".join(calls), "", threaded=True) == 0


BARE = """
from shared import seccomp
try:
    seccomp.install(seccomp.parse("read"), seccomp.Forbidden.KILL)
except OSError as error:
    raise SystemExit(error.errno)
"""


def test_without_no_new_privs_nothing_is_installed_and_it_is_said() -> None:
    bare = (
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534", "--clear-groups"]
        if ROOT
        else []
    )
    done = subprocess.run(
        [*bare, sys.executable, "-c", BARE],
        env=environment(),
        timeout=30,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == errno.EACCES, done.stderr
