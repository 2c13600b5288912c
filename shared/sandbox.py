"""What a process of the fleet gives up, in three steps, before it sees its first guest byte.

    confine ──▶ (imports, opens) ──▶ leave_files ──▶ (control channel: threads) ──▶ seal ──▶ guest bytes
       │                                 │                                           │
       │ descriptors that aren't its     │ an empty file system                      │ another user, if wanted;
       │ own, namespaces, core dumps,    │ no capability                             │ only the system calls
       │ no_new_privs                                                                │ of its list

The order binds: capabilities belong to a thread, so they go before there is a second one; an empty file system takes
CAP_SYS_ADMIN, so it comes before that; the control channel's name is in a directory of the VMM's user, so the user
changes after it, for all threads at once by libc, and takes the two capabilities for that with it; the filter is for
all threads too and refuses what start-up needs.

Profiles are data: one row per kind of process. A step that this host can't do (no CAP_SYS_ADMIN for a network
namespace, say) is skipped with a debug line: a VM of an unprivileged user must run too. What holds in the end
`vmm.sandbox` reads from the kernel (controller/sandbox_report.py).

A pid namespace begins with a fork, so it is the zygote's to make: its child is pid 1 there, alone, and the controller's
child (CLONE_PARENT) outside. Of signals from inside, pid 1 takes only those that it has a handler for.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shared import log, seccomp
from shared.errors import HostError
from shared.linux import PR_SET_NO_NEW_PRIVS, check, libc, prctl

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x2_0000, 0x400_0000, 0x800_0000, 0x4000_0000
CLONE_NEWPID = 0x2000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
MNT_DETACH = 2
SYS_PIVOT_ROOT = 155
PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 2, 4
CAP_LAST_CAP = 40
CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 1, 3, 5, 6, 7, 21
LINUX_CAPABILITY_VERSION_3 = 0x2008_0522
# Any directory that every host has; only in the process's own mount namespace something is mounted over it.
MOUNT_POINT = b"/proc"

libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Profile:
    """`namespaces`: CLONE_NEW… flags of those that it gets of its own, all empty. `files`: it keeps the file system."""

    namespaces: int
    files: bool
    capabilities: tuple[int, ...] = ()  # that it keeps
    open_files: int = 1024  # RLIMIT_NOFILE
    user: bool = True  # may be given a user of its own


# All processes and threads of a user id count together for RLIMIT_NPROC, those of other VMMs too; root's don't count.
THREADS_OF_A_USER = 4096

ALONE = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID

PROFILES: dict[str, Profile] = {
    "worker": Profile(ALONE, files=False),
    # Finds names, sockets and hosts until it is connected, and can't know before which.
    "agent": Profile(CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID, files=True),
    # Removes names, of whoever's directories the VMM could write to: as another user it could not.
    "janitor": Profile(
        CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID, True, (CAP_DAC_OVERRIDE, CAP_FOWNER), user=False
    ),
    "api": Profile(ALONE, files=False),
    "exporter": Profile(ALONE, files=False),
}


class cap_user_header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class cap_user_data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class Sandbox:
    """This process's steps after confine(). Each is taken once; seal() may be called again and does nothing then."""

    def __init__(
        self,
        profile: Profile,
        rules: tuple[seccomp.Rule, ...],
        forbidden: seccomp.Forbidden | None,
        user: int = 0,
        on_credentials: Callable[[], None] = lambda: None,
        *,
        own_mounts: bool = False,
    ) -> None:
        self._profile = profile
        self._rules = rules
        self._forbidden = forbidden
        self._user = user if profile.user else 0
        self._on_credentials = on_credentials
        self._kept = (*profile.capabilities, CAP_SETUID, CAP_SETGID) if self._user else profile.capabilities
        self.own_mounts = own_mounts  # a mount namespace of its own
        self.sealed = False

    @contextmanager
    def leave_files(self, endpoint: str = "") -> Iterator[str]:
        """An empty file system and no capabilities from here on. Inside, the endpoint's name is yielded as it can be
        bound or connected to: the directory that it is in stays reachable until the end of the block."""
        if not self.own_mounts or self._profile.files:
            drop_capabilities(self._kept)
            yield endpoint
            return
        scheme, path = endpoint[: len("ipc://")], endpoint.removeprefix("ipc://")
        directory = os.open(os.path.dirname(path) or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _enter_empty_root()
            os.fchdir(directory)
        finally:
            os.close(directory)
        drop_capabilities(self._kept)
        try:
            yield scheme + os.path.basename(path)
        finally:
            os.chdir("/")

    def seal(self) -> None:
        """Its own user and only the calls of the list from here on, for every thread. Raises OSError, HostError."""
        if self.sealed:
            return
        self.sealed = True
        self._become_user()
        if self._forbidden is not None:
            seccomp.install(self._rules, self._forbidden)

    def _become_user(self) -> None:
        """User and group of the same number, no other groups. libc has every thread do it; whoever stops being root in
        all of real, effective and saved id loses every capability by that."""
        if self._user:
            try:
                os.setgroups([])
                os.setresgid(self._user, self._user, self._user)
                os.setresuid(self._user, self._user, self._user)
            except OSError as error:
                raise HostError(f"--worker-uid: user {self._user} can't be taken on: {error.strerror}") from error
        self._on_credentials()

    def confine(self, *, execs: bool = False) -> None:
        """`execs`: another program follows in this process. It finds this much done, and the capabilities with which
        it takes the next steps."""
        profile = self._profile
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold guest RAM
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = profile.open_files if hard == resource.RLIM_INFINITY else min(profile.open_files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        if self._user:
            _limit_threads()
        for flag, name in NAMESPACES.items():
            if profile.namespaces & flag and _unshare(flag, name) and flag == CLONE_NEWNS:
                self.own_mounts = _keep_mounts_private()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        left = (*self._kept, CAP_SYS_ADMIN) if self.own_mounts else self._kept
        carried = left if execs else ()
        _make_inheritable(carried)  # while the bounding set still has them
        drop_bounding_set(profile.capabilities)  # while CAP_SETPCAP is there
        drop_capabilities(left, carried)


NAMESPACES = {CLONE_NEWNET: "network", CLONE_NEWNS: "mount", CLONE_NEWIPC: "ipc", CLONE_NEWUTS: "uts"}
# Of a process that nobody confined: a worker as a program of its own, a test.
NONE = Sandbox(Profile(0, files=True, capabilities=tuple(range(CAP_LAST_CAP + 1))), (), None)


def confine(
    name: str,
    calls: str = "worker",
    mode: str = "false",
    user: int = 0,
    on_credentials: Callable[[], None] = lambda: None,
    *,
    execs: bool = False,
) -> Sandbox:
    """The first step of a profile; the next ones are the answer's. `calls`: a list of shared/syscalls, `mode` as of
    `--seccomp`, `user` of `--worker-uid` or 0; `on_credentials()` once they change no more (the kernel forgets
    PDEATHSIG then). Raises KeyError for a name that is none, ConfigError for a list that can't be read."""
    sandbox = confined(name, calls, mode, user, on_credentials, own_mounts=False)
    sandbox.confine(execs=execs)
    return sandbox


def confined(
    name: str, calls: str, mode: str, user: int, on_credentials: Callable[[], None], *, own_mounts: bool
) -> Sandbox:
    """The same for a program that was exec'd behind that first step. Raises what confine() does."""
    forbidden = seccomp.MODES[mode]
    rules = seccomp.load(calls) if forbidden is not None else ()
    return Sandbox(PROFILES[name], rules, forbidden, user, on_credentials, own_mounts=own_mounts)


def list_for(module: str) -> str:
    """The list of shared/syscalls for a process whose main is in this module: that of its package, or of a part of its
    name in a package of many processes; for others the shortest."""
    return next((name for name in module.split(".") if seccomp.exists(name)), "worker")


def keep_descriptors(keep: Iterable[int]) -> None:
    """Close every descriptor but these. Standard input and output, which may be a user's terminal, become /dev/null
    unless they are among them; standard error stays, to be written only: log and last messages go there. Raises
    OSError."""
    kept = sorted({2, *(fd for fd in keep if fd >= 0)})
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    if os.isatty(2):
        _write_only(2, null)
    for fd in (0, 1):
        if fd not in kept:
            os.dup2(null, fd)
    start = 2
    for fd in kept:
        if fd >= start:
            os.closerange(start, fd)
            start = fd + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def _write_only(terminal: int, null: int) -> None:
    """Shells open a terminal once, for input too: whoever has that can read what is typed for a console."""
    # Not to wait for a serial line's carrier: O_NONBLOCK, which then goes, as whoever prints expects.
    flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        writer = os.open(f"/proc/self/fd/{terminal}", flags)
    except OSError as error:  # another user's, as under su
        log.warn(f"this process's messages are lost, its terminal can't be opened to write only: {error.strerror}")
        writer = os.dup(null)
    try:
        os.set_blocking(writer, True)
        os.dup2(writer, terminal)
    finally:
        os.close(writer)


def _limit_threads() -> None:
    """Whatever the VMM's own limit is: it is a user's, and this one is to be another. Raises OSError."""
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    try:
        resource.setrlimit(resource.RLIMIT_NPROC, (THREADS_OF_A_USER, THREADS_OF_A_USER))
    except ValueError:  # a lower hard limit, and no CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))


def _unshare(flag: int, name: str) -> bool:
    if libc.unshare(flag) < 0:
        log.debug(f"no {name} namespace of its own: {os.strerror(ctypes.get_errno())}")
        return False
    return True


def _keep_mounts_private() -> bool:
    """Nothing that happens to the mounts here may reach the host. False where / can't be left either: in a chroot it
    need not be a mount point, which pivot_root(2) wants, too."""
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) < 0:
        log.debug(f"the file system is kept: / is no mount of its own: {os.strerror(ctypes.get_errno())}")
        return False
    return True


def _enter_empty_root() -> None:
    """An empty, read-only file system as root, and nothing else mounted. Raises OSError."""
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    check(
        libc.mount(b"empty", MOUNT_POINT, b"tmpfs", flags, b"size=4k,nr_inodes=1,mode=0555"), "mount tmpfs"
    )
    os.chdir(MOUNT_POINT)
    # The old root comes to lie over the new one, where it can be named and let go of: pivot_root(2), NOTES.
    check(libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def drop_bounding_set(keep: tuple[int, ...] = ()) -> None:
    """No exec may ever give back what is not in `keep`. Left as it is where that is not allowed."""
    for capability in range(CAP_LAST_CAP + 1):
        if capability not in keep:
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def drop_capabilities(keep: tuple[int, ...] = (), carried: tuple[int, ...] = ()) -> None:
    """Empty the other capability sets of this thread but for `keep`; `carried` of them outlive an exec."""
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, data = _capabilities()
    for word in range(2):
        data[word].effective &= _mask(keep, word)
        data[word].permitted &= _mask(keep, word)
        data[word].inheritable &= _mask(carried, word)
    if libc.capset(ctypes.byref(header), ctypes.byref(data)) < 0:
        log.debug(f"capabilities kept: {os.strerror(ctypes.get_errno())}")
    for capability in carried:
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def _make_inheritable(capabilities: tuple[int, ...]) -> None:
    header, data = _capabilities()
    for word in range(2):
        data[word].inheritable |= _mask(capabilities, word)
    if capabilities and libc.capset(ctypes.byref(header), ctypes.byref(data)) < 0:
        log.debug(f"capabilities not inheritable: {os.strerror(ctypes.get_errno())}")


def _capabilities() -> tuple[cap_user_header, Any]:
    """Of this thread, two words of each set."""
    header = cap_user_header(LINUX_CAPABILITY_VERSION_3, 0)
    data = (cap_user_data * 2)()
    if libc.capget(ctypes.byref(header), ctypes.byref(data)) < 0:
        log.debug(f"capabilities can't be read: {os.strerror(ctypes.get_errno())}")
    return header, data


def _mask(capabilities: tuple[int, ...], word: int) -> int:
    return sum(1 << capability % 32 for capability in capabilities if capability // 32 == word)
