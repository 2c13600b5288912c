"""The commands of the fault example: the document's first VM with a disk and a card to load, and `flotilla chaos`."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.demo.example import CMDLINE, api

# In the order in which they are struck; `vmm.fleet` calls them so. A migration agent lives only while a VM moves.
PROCESSES = ("vcpu", "blk", "net", "console", "api", "metrics", "zygote", "janitor")
LOADED = "/tmp/loaded.img"
LOADED_BYTES = 16 << 20
HOST, GUEST = "192.168.249.1", "192.168.249.2"
ECHO_PORT = 7
SEED = 7
METRICS = "/tmp/metrics1"


@dataclass(frozen=True, slots=True)
class Strikes:
    """A fault, and how often it hits; `rate`: a second, on average and at most."""

    fault: str
    count: int
    rate: float


STRIKES = (Strikes("kill", 20, 2.0), Strikes("stop", 5, 1.0))


def vmm() -> str:
    return (
        "cloud-hypervisor --kernel ~/workloads/vmlinux \\\n"
        f"    --disk path=~/workloads/focal.raw path={LOADED} \\\n"
        "    --cpus boot=2 --memory size=512M,shared=on \\\n"
        f'    --cmdline "{CMDLINE} quiet" --net ip={HOST} \\\n'
        f"    --serial tty --console off --api-socket={api(1)} --allow-fault-injection \\\n"
        f"    --metrics-socket {METRICS}"
    )


NETWORK = f"modprobe virtio_net; ip addr add {GUEST}/24 dev eth0 && ip link set up dev eth0"
ECHO = f"socat TCP-LISTEN:{ECHO_PORT},reuseaddr PIPE &"
LOAD = "./fio.sh /dev/vdb &"
ERRORS = "echo errors=$(dmesg -l emerg,alert,crit,err | wc -l)."


def chaos(process: str, strikes: Strikes, console: str, report: str) -> str:
    """`console`: the file with all that the guest's console has said."""
    return (
        f"flotilla chaos --api-socket {api(1)} --seed {SEED} --processes {process} --kinds {strikes.fault} \\\n"
        f"    --count {strikes.count} --rate {strikes.rate:g} --report {report} \\\n"
        f"    --verify-command \"test -r {console} && ! grep -aq '^fio: BAD' {console}\""
    )
