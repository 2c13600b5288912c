"""What a worker gives up before it sees its first guest byte.

Profiles are data: one row per kind of process. A step that this host can't do (no CAP_SYS_ADMIN for a network
namespace, say) is skipped with a debug line: a VM of an unprivileged user must run too.
"""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass

from shared import log
from shared.linux import PR_SET_NO_NEW_PRIVS, libc, prctl

CLONE_NEWNET = 0x4000_0000
PR_CAPBSET_DROP = 24
CAP_LAST_CAP = 40
LINUX_CAPABILITY_VERSION_3 = 0x2008_0522


@dataclass(frozen=True, slots=True)
class Profile:
    network: bool  # keep the VM's network namespace
    capabilities: bool  # keep capabilities
    open_files: int  # RLIMIT_NOFILE


PROFILES: dict[str, Profile] = {
    "worker": Profile(network=False, capabilities=False, open_files=1024),
    "agent": Profile(network=True, capabilities=False, open_files=1024),
    "janitor": Profile(network=True, capabilities=True, open_files=1024),
}


class cap_user_header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class cap_user_data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def confine(name: str) -> None:
    """Apply a profile to this process. Raises KeyError for a name that is none."""
    profile = PROFILES[name]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold guest RAM
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = profile.open_files if hard == resource.RLIM_INFINITY else min(profile.open_files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if not profile.network and libc.unshare(CLONE_NEWNET) < 0:
        log.debug(f"no network namespace of its own: {os.strerror(ctypes.get_errno())}")
    if not profile.capabilities:
        drop_capabilities()
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Empty every capability set of this process, the bounding set included where that is allowed."""
    for capability in range(CAP_LAST_CAP + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = cap_user_header(LINUX_CAPABILITY_VERSION_3, 0)
    data = (cap_user_data * 2)()
    if libc.capset(ctypes.byref(header), ctypes.byref(data)) < 0:
        log.debug(f"capabilities kept: {os.strerror(ctypes.get_errno())}")
