"""What `ch-remote` can ask for, and what Cloud Hypervisor's can that is not available yet."""

from __future__ import annotations

from typing import NamedTuple

API = "/api/v1/"


class Verb(NamedTuple):
    """One subcommand. argument: "" for none, in brackets when optional. flags and options, which have a value: of this
    subcommand alone."""

    method: str
    endpoint: str
    text: str
    argument: str = ""
    flags: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()  # (name, what its value is)

    @property
    def target(self) -> str:
        return API + self.endpoint


VERBS = {
    "add-net": Verb(
        "PUT", "vm.add-net", "Add a network device, as --net; prints its id and PCI address if the VM runs", "NET"
    ),
    "boot": Verb("PUT", "vm.boot", "Boot the VM that was created"),
    "cancel-migration": Verb(
        "PUT", "vm.cancel-migration", "Cancel the migration that goes on, sent or received"
    ),
    "counters": Verb("GET", "vm.counters", "Counters of the VM's devices"),
    "create": Verb(
        "PUT", "vm.create", "Create a VM from a VmConfig in JSON; - or nothing reads it from stdin", "[PATH]"
    ),
    "delete": Verb("PUT", "vm.delete", "Delete the VM"),
    "fault-inject": Verb(
        "PUT", "vmm.fault-inject", "Make a process fail, with --allow-fault-injection at the VMM's start", "FAULT"
    ),
    "fleet": Verb(
        "GET",
        "vmm.fleet",
        "Every process of the VM; --table for people, --watch the same until Ctrl-C",
        flags=("--table", "--watch"),
    ),
    "info": Verb("GET", "vm.info", "Configuration and state of the VM"),
    "migration-estimate": Verb(
        "GET", "vm.migration-estimate", "How long a remote migration would take, and its pause; takes a second"
    ),
    "migration-progress": Verb(
        "GET",
        "vm.migration-progress",
        "State of the migration; --watch follows it to its end (on a terminal with a bar)",
        flags=("--watch",),
    ),
    "migration-resolve": Verb(
        "PUT",
        "vm.migration-resolve",
        "Of a migration in doubt: say that the guest runs there, or that it does not and stays here",
        flags=("--here", "--there"),
    ),
    "pause": Verb("PUT", "vm.pause", "Pause the VM"),
    "ping": Verb("GET", "vmm.ping", "Ask the VMM for its version and process id"),
    "power-button": Verb("PUT", "vm.power-button", "Press the VM's power button"),
    "reboot": Verb("PUT", "vm.reboot", "Restart the VM in place"),
    "receive-migration": Verb(
        "PUT", "vm.receive-migration", "Receive a VM; returns when it runs here", "URL"
    ),
    "resume": Verb("PUT", "vm.resume", "Let a paused VM go on"),
    "sandbox": Verb(
        "GET", "vmm.sandbox", "What each process is kept from, as the kernel tells it; --table for people",
        flags=("--table",),
    ),
    "send-migration": Verb(
        "PUT", "vm.send-migration", "Send the VM away; returns when it runs there", "URL", flags=("--local",)
    ),
    "shutdown": Verb("PUT", "vm.shutdown", "Switch the VM off at once"),
    "shutdown-vmm": Verb("PUT", "vmm.shutdown", "End the VMM and its VM"),
    "worker-upgrade": Verb(
        "PUT",
        "vm.worker-upgrade",
        "Let another process take over a running device; prints pids and how long the guest waited",
        "ID",
        options=(("--exec", "PATH"), ("--timeout-ms", "N")),
    ),
}
OPTIONS = {name for verb in VERBS.values() for name, _ in verb.options}
MIGRATIONS = ("send-migration", "receive-migration")

REFUSED = (
    "add-device",
    "add-disk",
    "add-fs",
    "add-generic-vhost-user",
    "add-pmem",
    "add-user-device",
    "add-vdpa",
    "add-vsock",
    "coredump",
    "nmi",
    "remove-device",
    "resize",
    "resize-disk",
    "resize-zone",
    "restore",
    "snapshot",
)
REFUSED_FLAGS = ("--dbus-object-path", "--dbus-service-name", "--dbus-system-bus")

USAGE = "Usage: ch-remote --api-socket <PATH> <COMMAND> [ARGUMENTS]"


def help_text() -> str:
    lines = ["Control a VMM over its API socket.", "", USAGE, "", "Commands:"]
    for name in sorted(VERBS):
        verb = VERBS[name]
        usage = " ".join(
            [name, *(f"[{flag}]" for flag in verb.flags), *([verb.argument] if verb.argument else [])]
            + [f"[{option} {value}]" for option, value in verb.options]
        )
        lines.append(f"  {usage:<32}  {verb.text}")
    lines += [
        "",
        "URL of send-migration, all of these:",
        "  [--local] unix:<path>",
        "  destination_url=unix:<path>[,local=on|off][,downtime_ms=<n>][,timeout_s=<n>]",
        "      [,timeout_strategy=cancel|ignore]",
        "URL of receive-migration, both of these:",
        "  unix:<path>",
        "  receiver_url=unix:<path>",
        "FAULT: process=<name of fleet>,fault=<kind>, and what the kind has (docs/chaos.md):",
        "  process=_disk0,fault=kill,request=100 | process=vcpu0,fault=stop,duration_ms=500",
        "Instead of unix:<path>, also tcp:<host>:<port>, except with local. Ctrl-C cancels the migration.",
        "",
        "Options:",
        "      --api-socket <PATH>           The VMM's API socket, before or after the command",
        "  -h, --help                        Print this help",
        "  -V, --version                     Print the version",
        "",
        "Exit codes: 0 done, 1 failed, 2 not understood, 130 cancelled by Ctrl-C.",
        "",
        "Known to Cloud Hypervisor and not available yet (refused by name):",
        "  " + " ".join(REFUSED[: len(REFUSED) // 2]),
        "  " + " ".join(REFUSED[len(REFUSED) // 2 :]),
        "",
    ]
    return "\n".join(lines)
