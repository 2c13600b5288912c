"""`vmm.sandbox`: what holds for each process of the fleet, read from the kernel and not from what was intended.

A row, of plain values: kind, device, pid, uid and gid (those that hold for what it does), groups (beside its gid),
seccomp ("none", "strict", "filter"), filters (how many),
no_new_privs, capabilities (hexadecimal: what it could still use, all sets but the bounding one), bounding, namespaces
(those that are not the controller's), root ("shared", "empty", "own"), descriptors (how many are open), open_files and
core (limits), cgroup. What can't be read, because the process has ended, is left out.

Sources: proc(5): status, ns, limits, root, fd, cgroup.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from shared.typed import Any

SECCOMP = {"0": "none", "1": "strict", "2": "filter"}
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
LIMITS = {"Max open files": "open_files", "Max core file size": "core"}


def rows(who: Iterable[tuple[str, str, int]]) -> list[dict[str, Any]]:
    """(kind, device, pid) each. Our own process is what the others' namespaces and root are compared with."""
    return [{"kind": kind, "device": device, "pid": pid, **look(pid)} for kind, device, pid in sorted(who)]


def look(pid: int) -> dict[str, Any]:
    """What the kernel says of one process."""
    found: dict[str, Any] = {}
    for part in (_status, _namespaces, _root, _descriptors, _limits, _cgroup):
        try:
            found.update(part(f"/proc/{pid}"))
        except (OSError, LookupError):
            pass  # it has just ended, or /proc shows less here
    return found


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _status(proc: str) -> dict[str, Any]:
    lines = (line.partition(":") for line in _read(f"{proc}/status").splitlines())
    status = {name: value.strip() for name, _, value in lines}
    left = 0
    for name in CAPABILITY_SETS:
        left |= int(status[name], 16)
    return {
        "uid": int(status["Uid"].split()[1]),
        "gid": int(status["Gid"].split()[1]),
        "groups": [int(group) for group in status["Groups"].split()],
        "seccomp": SECCOMP[status["Seccomp"]],
        "filters": int(status.get("Seccomp_filters", 0)),
        "no_new_privs": status["NoNewPrivs"] == "1",
        "capabilities": f"{left:x}",
        "bounding": f"{int(status['CapBnd'], 16):x}",
    }


def _namespaces(proc: str) -> dict[str, Any]:
    own = [
        name
        for name in NAMESPACES
        if os.readlink(f"{proc}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    ]
    return {"namespaces": own}


def _root(proc: str) -> dict[str, Any]:
    theirs, ours = os.stat(f"{proc}/root/"), os.stat("/")
    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
        return {"root": "shared"}
    return {"root": "own" if os.listdir(f"{proc}/root/") else "empty"}


def _descriptors(proc: str) -> dict[str, Any]:
    return {"descriptors": len(os.listdir(f"{proc}/fd"))}


def _limits(proc: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in _read(f"{proc}/limits").splitlines():
        name, soft = line[:25].strip(), line[25:].split()[:1]
        if name in LIMITS and soft:
            found[LIMITS[name]] = int(soft[0]) if soft[0].isdigit() else soft[0]
    return found


def _cgroup(proc: str) -> dict[str, Any]:
    """Of the unified hierarchy, as /proc names it: relative to our own cgroup namespace."""
    for line in _read(f"{proc}/cgroup").splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            return {"cgroup": path}
    return {}
