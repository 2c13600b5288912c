"""The commands of the document's local migration, as they stand (with its forgotten backslash), and the next ones.

The n-th VMM has the API socket /tmp/apin; migration n goes from the n-th to the next. The document's commands are those
of migration 1. Its nested example is where the second disk and its checksum loop come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SOCKET = "/tmp/sock"
CMDLINE = "root=/dev/vda1 console=ttyS0"
DISKS = ("~/workloads/focal.raw", "~/workloads/tmp.img", "~/workloads/written.img")


@dataclass(frozen=True, slots=True)
class Example:
    """What differs from the document. disks: 1 as there, 2 with tmp.img to read, 3 with another one to write."""

    cpus: int = 1
    memory: str = "1G,shared=on"
    disks: int = 2
    cmdline: str = CMDLINE

    def source(self) -> str:
        disks = " ".join(f"path={path}" for path in DISKS[: self.disks])
        return (
            "cloud-hypervisor \\\n"
            "    --kernel ~/workloads/vmlinux \\\n"
            f"    --disk {disks} \\\n"
            f"    --cpus boot={self.cpus} --memory size={self.memory} \\\n"
            f'    --cmdline "{self.cmdline}"  \\\n'
            f"    --serial tty --console off --api-socket={api(1)}"
        )


class Way(StrEnum):
    """How a guest gets to the next VMM: as the document has it, or with its RAM copied as if to another host."""

    LOCAL = "local"
    UNIX = "unix"
    TCP = "tcp"


PORT = 6000
_RECEIVE = {Way.LOCAL: f"unix:{SOCKET}", Way.UNIX: f"unix:{SOCKET}", Way.TCP: f"tcp:0.0.0.0:{PORT}"}
_SEND = {Way.LOCAL: f"--local unix:{SOCKET}", Way.UNIX: f"unix:{SOCKET}", Way.TCP: f"tcp:127.0.0.1:{PORT}"}


def api(vmm: int) -> str:
    return f"/tmp/api{vmm}"


def destination(vmm: int) -> str:
    return f"cloud-hypervisor --api-socket={api(vmm)}"


def receive(vmm: int, way: Way = Way.LOCAL) -> str:
    return f"ch-remote --api-socket={api(vmm)} receive-migration {_RECEIVE[way]}"


def send(vmm: int, way: Way = Way.LOCAL) -> str:
    return f"ch-remote --api-socket={api(vmm)} send-migration {_SEND[way]}"
