"""The flags of `cloud-hypervisor` as one table, its help text, and the flags that are refused by name."""

from __future__ import annotations

from controller.config import options
from shared.records import NamedTuple


class Flag(NamedTuple):
    """value: how the help shows it, "" for a flag without one. many: several values, repeatable. vm: needs a
    payload.
    """

    name: str
    value: str
    syntax: str
    text: str
    many: bool = False
    vm: bool = False


_TABLE = (
    Flag("--allow-fault-injection", "", "", "Serve vmm.fault-inject: rehearse failures (flotilla chaos)"),
    Flag("--api-socket", "PATH", "<path>|path=<path>|fd=<fd>", "Serve the HTTP API on this unix socket"),
    Flag("--cmdline", "STRING", "", "Kernel command line, passed verbatim", vm=True),
    Flag("--cgroup", "PATH", "", "Put each process into a cgroup of its own below this one (cgroup v2)"),
    Flag("--console", "CONSOLE", options.CONSOLE_SYNTAX, "Virtio console (hvc0) [default: tty]", vm=True),
    Flag("--cpus", "CPUS", options.CPUS_SYNTAX, "Virtual CPUs [default: boot=1,max_phys_bits=46]", vm=True),
    Flag("--disk", "DISK", options.DISK_SYNTAX, "Disks, one value each", many=True, vm=True),
    Flag(
        "--event-monitor",
        "TARGET",
        "path=<path>|fd=<fd>",
        "Write events as JSON to a file or file descriptor",
    ),
    Flag("--initramfs", "PATH", "", "Initramfs image", vm=True),
    Flag(
        "--kernel", "PATH", "", "Kernel: vmlinux with a PVH note, bzImage, or one that carries its initramfs"
    ),
    Flag("--log-file", "PATH", "", "Write log lines to this file [default: standard error]"),
    Flag("--memory", "MEMORY", options.MEMORY_SYNTAX, "Guest memory [default: size=512M]", vm=True),
    Flag("--metrics", "ADDRESS", "127.0.0.1:<port>|[::1]:<port>", "Serve figures for Prometheus at /metrics there"),
    Flag("--metrics-socket", "PATH", "", "Serve them on this unix socket instead"),
    Flag("--net", "NET", options.NET_SYNTAX, "Network devices, one value each", many=True, vm=True),
    Flag("--no-shutdown", "", "", "Keep the VMM when the guest powers off"),
    Flag("--rng", "RNG", options.RNG_SYNTAX, "Entropy source [default: src=/dev/urandom]", vm=True),
    Flag("--seccomp", "MODE", "true|false|log|errno", "Seccomp filters of all processes that have one [default: true]"),
    Flag("--serial", "SERIAL", options.SERIAL_SYNTAX, "First serial port, ttyS0 [default: null]", vm=True),
    Flag("--worker-uid", "UID", "<uid>|base=<uid>", "Run workers as this user, or each as its own from there on"),
)
FLAGS = {flag.name: flag for flag in _TABLE}

# Flags of Cloud Hypervisor, some of them behind build features of its own, each with what it would need
# here.
REFUSED = {
    "--balloon": "the memory balloon",
    "--dbus-object-path": "the D-Bus API",
    "--dbus-service-name": "the D-Bus API",
    "--dbus-system-bus": "the D-Bus API",
    "--debug-console": "the debug console",
    "--device": "VFIO device passthrough",
    "--firmware": "booting firmware",
    "--fs": "virtio-fs",
    "--fw-cfg-config": "fw_cfg",
    "--gdb": "the gdb stub",
    "--generic-vhost-user": "generic vhost-user devices",
    "--host-data": "confidential VMs",
    "--igvm": "IGVM payloads",
    "--ivshmem": "inter-VM shared memory",
    "--landlock": "Landlock",
    "--landlock-rules": "Landlock",
    "--log-format": "log formats",
    "--memory-zone": "memory zones",
    "--numa": "guest NUMA nodes",
    "--pci-segment": "PCI segments",
    "--platform": "platform settings",
    "--pmem": "persistent memory devices",
    "--pvmemcontrol": "pvmemcontrol",
    "--pvpanic": "the pvpanic device",
    "--rate-limit-group": "I/O rate limits",
    "--restore": "restoring snapshots",
    "--rtc": "the virtio clock",
    "--tpm": "the TPM",
    "--user-device": "vfio-user devices",
    "--vdpa": "vDPA devices",
    "--vsock": "virtio-vsock",
    "--watchdog": "the virtio watchdog",
}

USAGE = "Usage: cloud-hypervisor [OPTIONS]"
_INDENT = 32
_WIDTH = 104


def _entry(head: str, lines: list[str]) -> str:
    first = f"  {head}".ljust(_INDENT)
    if len(first) > _INDENT:
        lines = ["", *lines]
        first = first.rstrip()
    return "\n".join([first + lines[0], *(" " * _INDENT + line for line in lines[1:])]).rstrip()


def _wrapped(text: str, separator: str) -> list[str]:
    """Lines of at most _WIDTH columns, cut behind separators."""
    lines = [""]
    pieces = text.split(separator)
    for number, piece in enumerate(pieces):
        piece += separator if number + 1 < len(pieces) else ""
        if lines[-1] and len(lines[-1]) + len(piece) > _WIDTH - _INDENT:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip(" ") for line in lines]


def help_text() -> str:
    entries = {}
    for flag in _TABLE:
        dots = "..." if flag.many else ""
        head = f"    {flag.name} <{flag.value}>{dots}" if flag.value else f"    {flag.name}"
        entries[flag.name] = _entry(head, [flag.text, *(_wrapped(flag.syntax, ",") if flag.syntax else ())])
    entries["--help"] = _entry("-h, --help", ["Print this help"])
    entries["--v"] = _entry("-v...", ["More log lines: -v info, -vv debug, -vvv trace [default: warnings]"])
    entries["--version"] = _entry("-V, --version", ["Print the version"])
    return "\n".join(
        [
            "Launch a Cloud-Hypervisor-compatible VMM whose vCPUs and devices are processes of their own.",
            "",
            USAGE,
            "",
            "Options:",
            *(entries[name] for name in sorted(entries)),
            "",
            "With --kernel a VM is created and booted at once; with --api-socket alone the VMM waits for",
            "requests, for instance `ch-remote --api-socket PATH receive-migration unix:SOCKET`.",
            "",
            "Known to Cloud Hypervisor and not available yet (refused, never ignored):",
            *("  " + line for line in _wrapped(" ".join(sorted(REFUSED)), " ")),
            "",
        ]
    )
