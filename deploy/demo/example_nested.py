"""The commands of the document's nested example, as they stand; each host VM has its number, 1 or 2.

Two things are not the document's: on the host machine the commands come from PATH, and inside a host VM, whose only
terminal is its serial port, what runs on is started in a window (deploy/lab/host/root/window).
"""

from __future__ import annotations

FOLDER = "nested"  # below the home folder
DUMMY = "head -c 1M < /dev/urandom > tmp.img"
SOURCE_API, DESTINATION_API = "/tmp/api1", "/tmp/api2"
SOURCE_SOCKET, DESTINATION_SOCKET = "/tmp/sock1", "/tmp/sock2"
PORT = 6000

def source(words: str = "") -> str:
    """`words`: more for the kernel's command line."""
    return f"""\
sudo ./cloud-hypervisor \\
        --serial tty --console off \\
        --memory size=128M \\
        --kernel vmlinux \\
        --cmdline "console=ttyS0 root=/dev/vda1{words}" \\
        --disk path=/dev/vdb path=/dev/vdc \\
        --api-socket={SOURCE_API} \\
        --net ip=192.168.100.1"""


DESTINATION = f"sudo ./cloud-hypervisor --api-socket={DESTINATION_API}"

RECEIVE = f"sudo ./ch-remote --api-socket={DESTINATION_API} receive-migration unix:{DESTINATION_SOCKET}"
RECEIVE_RELAY = f"sudo socat TCP-LISTEN:{PORT},reuseaddr UNIX-CLIENT:{DESTINATION_SOCKET}"
SEND_RELAY = f"sudo socat UNIX-LISTEN:{SOURCE_SOCKET},reuseaddr TCP:192.168.102.2:{PORT}"
SEND = f"sudo ./ch-remote --api-socket={SOURCE_API} send-migration unix:{SOURCE_SOCKET}"


def host(number: int, words: str = "") -> str:
    """The document has no blank before its last but one backslash, and it works all the same."""
    return (
        "cloud-hypervisor \\\n"
        "        --serial tty --console off \\\n"
        "        --cpus boot=1 --memory size=512M \\\n"
        "        --kernel vmlinux \\\n"
        f'        --cmdline "root=/dev/vda1 console=ttyS0{words}"  \\\n'
        f"        --disk path=focal-{number}.raw path=focal-nested.raw path=tmp.img\\\n"
        f"        --net ip=192.168.10{number}.1"
    )


def network(number: int) -> list[str]:
    return [
        f"sudo ip addr add 192.168.10{number}.2/24 dev ens4",
        "sudo ip link set up dev ens4",
        f"sudo ip r add default via 192.168.10{number}.1",
    ]


def ping(count: int) -> str:
    return f"ping -c {count} 192.168.101.2"
