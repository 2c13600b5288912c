"""Who this process is and whose child, as its parent would say it.

In a pid namespace of its own getpid() is 1 and getppid() 0. The host's numbers are in /proc/self/stat, which is opened
while there is a file system and can be read for as long as it is needed.
"""

from __future__ import annotations

import os
import signal

from shared.linux import PR_SET_PDEATHSIG, die_with_parent, prctl

# Fields of proc_pid_stat(5) behind the name, which may have blanks and brackets in it.
PPID = 1
MAX_STAT = 1024


def parent_in_proc() -> int:
    """Our parent as /proc numbers it, which may be that of a namespace above ours. Raises OSError without a /proc."""
    fd = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _parent(os.pread(fd, MAX_STAT, 0))
    finally:
        os.close(fd)


def _parent(stat: bytes) -> int:
    return int(stat[stat.rindex(b")") + 2 :].split()[PPID])


class Ancestry:
    """`pid` is ours. `parent`: the pid that the parent had before the fork; `in_proc`: as a sibling's
    parent_in_proc(). `orphan`: the parent's death is no reason to go. Raises OSError without a /proc."""

    def __init__(self, parent: int, in_proc: int, *, orphan: bool = False) -> None:
        self.pid = os.getpid()
        self._parent = parent
        self._in_proc = in_proc
        self._orphan = orphan
        self._stat = -1
        if os.getppid() == 0:  # the parent is in a namespace above ours
            self._stat = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
            self.pid = int(os.pread(self._stat, MAX_STAT, 0).split()[0])

    def die_with_parent(self) -> None:
        """shared.linux.die_with_parent(), to be called again whenever credentials have changed: the kernel forgets
        PDEATHSIG then."""
        if self._orphan:
            return
        if self._stat < 0:
            die_with_parent(self._parent)
            return
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if _parent(os.pread(self._stat, MAX_STAT, 0)) != self._in_proc:
            os._exit(125)

    def settle(self) -> None:
        """The last change of credentials has been made."""
        self.die_with_parent()
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1
