"""Numbers of the system calls that an allow-list may name, on x86-64.

Source: arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

from shared.typed import Final

NUMBERS: Final[dict[str, int]] = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "msync": 26, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getpid": 39,
    "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
    "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51, "getpeername": 52, "socketpair": 53, "setsockopt": 54,
    "getsockopt": 55, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "exit": 60, "kill": 62, "uname": 63,
    "fcntl": 72, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "rename": 82,
    "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90,
    "gettimeofday": 96, "getrlimit": 97, "sysinfo": 99, "ptrace": 101, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "getpgrp": 111, "setsid": 112, "capset": 126, "sigaltstack": 131, "mknod": 133,
    "prctl": 157, "setrlimit": 160, "chroot": 161, "mount": 165, "umount2": 166, "gettid": 186, "futex": 202,
    "sched_getparam": 143, "sched_setscheduler": 144, "sched_getscheduler": 145,
    "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232,
    "epoll_ctl": 233, "tgkill": 234, "openat": 257, "newfstatat": 262, "unlinkat": 263, "readlinkat": 267,
    "faccessat": 269, "ppoll": 271, "unshare": 272, "set_robust_list": 273, "epoll_pwait": 281, "fallocate": 285,
    "accept4": 288, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296,
    # tried by flotilla doctor --sandbox
    "shmget": 29, "setuid": 105, "rt_sigqueueinfo": 129, "pivot_root": 155, "reboot": 169, "init_module": 175,
    "mq_open": 240, "kexec_load": 246, "keyctl": 250, "inotify_init1": 294, "perf_event_open": 298,
    "open_by_handle_at": 304, "userfaultfd": 323, "fsopen": 430, "process_madvise": 440,
    "prlimit64": 302, "setns": 308, "getcpu": 309, "process_vm_readv": 310, "seccomp": 317, "getrandom": 318,
    "memfd_create": 319, "bpf": 321, "execveat": 322, "membarrier": 324, "preadv2": 327, "pwritev2": 328, "statx": 332,
    "rseq": 334, "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "openat2": 437,
    "pidfd_getfd": 438, "faccessat2": 439, "epoll_pwait2": 441,
}  # fmt: skip
