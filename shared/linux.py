"""System calls that Python's standard library lacks, under their kernel names. Errors are OSError.

Sources: the man pages of section 2 and include/uapi/linux/*.h.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct

from shared.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl.restype = ctypes.c_int
libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 0x1, 0x2, 0x4
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 15, 36, 38
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_NORESERVE = 1, 0x4000
MADV_DONTFORK, MADV_DONTDUMP = 10, 16
MAP_FAILED = ctypes.c_void_p(-1).value
SCM_MAX_FDS = 64
SYS_PIDFD_GETFD = 438


def check(result: int, what: str) -> int:
    """Turn a libc result of -1 into OSError(errno) that names the call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate, close-on-exec, of another process's descriptor (pidfd_getfd(2)): as much is asked as by ptrace."""
    return int(check(libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0), f"pidfd_getfd of {fd}"))


def prctl(option: int, a: int = 0, b: int = 0) -> None:
    check(libc.prctl(option, a, b, 0, 0), f"prctl {option}")


def set_name(name: str) -> None:
    """comm of this process, at most 15 bytes (prctl PR_SET_NAME)."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the parent's thread ends; exits at once if that has already happened.

    To be called after any change of credentials (the kernel clears the setting there), and with the parent's pid as
    it was before the fork: a parent that died in between has been replaced by a reaper.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(125)


def mmap_fd(fd: int, size: int, offset: int = 0, *, writable: bool = True) -> int:
    """Map `size` bytes of a file shared; the address. Python's mmap object would hold the GIL's idea of a lifetime."""
    prot = PROT_READ | (PROT_WRITE if writable else 0)
    address = libc.mmap(None, size, prot, MAP_SHARED | MAP_NORESERVE, fd, offset)
    if address is None or address == MAP_FAILED:
        check(-1, f"mmap of {size} bytes")
    return int(address)


def munmap(address: int, size: int) -> None:
    check(libc.munmap(address, size), "munmap")


def madvise(address: int, size: int, advice: int) -> None:
    check(libc.madvise(address, size, advice), "madvise")


def bytes_at(address: int, size: int) -> memoryview:
    """A writable byte view of mapped memory. The caller keeps the mapping alive."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def send_fds(sock: socket.socket, data: bytes, fds: list[int] | tuple[int, ...] = ()) -> int:
    """One sendmsg with SCM_RIGHTS; bytes sent. The fds belong to the first byte."""
    import socket

    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    return sock.sendmsg([data], ancillary)


def recv_fds(sock: socket.socket, size: int, max_fds: int = SCM_MAX_FDS) -> tuple[bytes, list[int]]:
    """One recvmsg; (data, fds), the fds close-on-exec. b"" means the peer has closed.

    Raises OSError when ancillary data was cut: fds that did not fit are gone, so the message can't be trusted.
    """
    import socket

    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(max_fds * 4), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(payload) - len(payload) % 4
            fds.extend(struct.unpack(f"{whole // 4}i", payload[:whole]))
    if flags & socket.MSG_CTRUNC:
        close_fds(fds)
        # The kernel does not say which: that many were sent, or there is no room for them here.
        raise OSError(f"descriptors were lost: more than {max_fds} in one message, or too many open files")
    return data, fds


def close_fds(fds: list[int]) -> None:
    """Close and forget: what is left of a list that failed half-way is still its owner's."""
    while fds:
        os.close(fds.pop())


def process_ended(pidfd: int) -> bool:
    """Whether the process behind a pidfd has ended (a pidfd polls readable then)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def memfd(name: str, size: int, *, seal: bool = True) -> int:
    """A memfd of a fixed size. Sealed so that no holder can shrink it and kill the others by SIGBUS."""
    import fcntl

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seal:
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd
