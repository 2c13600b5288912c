"""VmConfig and its parts: field names and defaults are those of Cloud Hypervisor's JSON.

Only what this version carries out has a field. Keys that Cloud Hypervisor knows and this version lacks are
listed in `codec` (JSON) and `options` (command line), where any value but the one that changes nothing is
refused by name. The classes hold what was asked; `validate` says whether it makes sense. Sizes are in bytes.
"""

from __future__ import annotations

from enum import Enum

from controller.machine.topology import Topology
from shared.records import Record


class ConsoleMode(Enum):
    """Where a serial port or virtio-console goes; the value is the JSON name, in lower case the command
    line's.
    """

    OFF = "Off"
    NULL = "Null"
    PTY = "Pty"
    TTY = "Tty"
    FILE = "File"
    SOCKET = "Socket"


class ImageType(Enum):
    """Disk image formats of Cloud Hypervisor. UNKNOWN: not given, to be detected. Only RAW can be served."""

    RAW = "Raw"
    QCOW2 = "Qcow2"
    VHD = "FixedVhd"
    VHDX = "Vhdx"
    UNKNOWN = "Unknown"


class LockGranularity(Enum):
    """Which bytes of an image an OFD lock covers."""

    BYTE_RANGE = "ByteRange"
    FULL = "Full"


class DiskLock(Enum):
    """Ours alone (JSON: `flotilla.lock` of a disk): what a lock that another VM holds on the image means."""

    EXCLUSIVE = "exclusive"
    SHARED = "shared"


class VhostMode(Enum):
    """Who connects to a vhost-user socket: CLIENT, we do."""

    CLIENT = "Client"
    SERVER = "Server"


class CpusConfig(Record):
    """`--cpus`. `nested`: the guest may see VMX or SVM. `max_phys_bits`: upper bound of the guest's address
    width.
    """

    boot_vcpus: int = 1
    max_vcpus: int = 1
    topology: Topology | None = None
    max_phys_bits: int = 46
    nested: bool = True


class MemoryConfig(Record):
    """`--memory`. Guest RAM is shared whatever `shared` says; `mergeable` exists to be refused with a
    reason.
    """

    size: int = 512 << 20
    mergeable: bool = False
    shared: bool = False
    thp: bool = True


class PayloadConfig(Record):
    """What is booted; all three as given: paths, and the kernel's command line verbatim."""

    kernel: str | None = None
    cmdline: str | None = None
    initramfs: str | None = None


class DiskConfig(Record):
    """One `--disk`. `serial` is at most 20 bytes; `path` is None only with `vhost_user`, which needs
    `vhost_socket`.
    """

    path: str | None = None
    readonly: bool = False
    direct: bool = False
    num_queues: int = 1
    queue_size: int = 128
    vhost_user: bool = False
    vhost_socket: str | None = None
    id: str | None = None
    pci_device_id: int | None = None
    disable_io_uring: bool = False
    disable_aio: bool = False
    serial: str | None = None
    sparse: bool = True
    image_type: ImageType = ImageType.UNKNOWN
    lock_granularity: LockGranularity = LockGranularity.BYTE_RANGE
    lock: DiskLock | None = None


class NetConfig(Record):
    """One `--net`. Without `tap` and `fds` a TAP `vmtapN` is made; `fds` are inherited descriptors of one, one per
    queue pair. `num_queues` counts rx and tx queues. `ip`, `mask`, `host_mac` are the host's side, `mac` the guest's.
    """

    tap: str | None = None
    ip: str | None = None
    mask: str | None = None
    mac: str | None = None
    host_mac: str | None = None
    mtu: int | None = None
    num_queues: int = 2
    queue_size: int = 256
    vhost_user: bool = False
    vhost_socket: str | None = None
    vhost_mode: VhostMode = VhostMode.CLIENT
    id: str | None = None
    pci_device_id: int | None = None
    fds: tuple[int, ...] = ()
    offload_tso: bool = True
    offload_ufo: bool = True
    offload_csum: bool = True

    @property
    def queue_pairs(self) -> int:
        return self.num_queues // 2


class RngConfig(Record):
    """`--rng`; the device always exists."""

    src: str = "/dev/urandom"
    id: str | None = None
    pci_device_id: int | None = None


class SerialConfig(Record):
    """`--serial`: COM1. `file` goes with FILE (and holds the device's path of a PTY in use), `socket` with
    SOCKET.
    """

    mode: ConsoleMode = ConsoleMode.NULL
    file: str | None = None
    socket: str | None = None


class ConsoleConfig(Record):
    """`--console`: virtio-console, hvc0 of the guest. OFF means that there is no such PCI device."""

    mode: ConsoleMode = ConsoleMode.TTY
    file: str | None = None
    socket: str | None = None
    id: str | None = None
    pci_device_id: int | None = None


class VmConfig(Record):
    """The body of vm.create and `config` of vm.info."""

    payload: PayloadConfig
    cpus: CpusConfig = CpusConfig()
    memory: MemoryConfig = MemoryConfig()
    disks: tuple[DiskConfig, ...] = ()
    net: tuple[NetConfig, ...] = ()
    rng: RngConfig = RngConfig()
    serial: SerialConfig = SerialConfig()
    console: ConsoleConfig = ConsoleConfig()
