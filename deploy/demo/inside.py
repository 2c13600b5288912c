"""The document's local example, step by step, where KVM runs Linux; `python3 -m deploy.demo.inside [--hops N] …`.

With `--way tcp` or `unix` the same guest takes the way to another host.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from deploy.demo import example, vmm
from deploy.demo.example import Example, Way
from deploy.demo.play import Play, perform
from deploy.demo.report import DemoError, Events, Hop, Report
from deploy.demo.terminal import Terminal

WRITTEN_BYTES = 4 << 20
# Seconds. On an idle machine everything takes a fraction of these, in the lab too; they end what hangs.
BOOT, ANSWER, MIGRATION = 300.0, 120.0, 180.0
# Bytes. Devices and vCPUs have some 20 KiB of state; this is less than the RAM that a guest touches in one second. What
# is less is state alone.
MOST_STATE = 256 << 10
READ_ONLY_FILE = "/usr/bin/bash"
DOCUMENT = Example()


class Local(Play):
    """One guest and its way through the VMMs."""

    def __init__(self, setting: Example, hops: int, each: int, way: Way, folder: Path, events: Events) -> None:
        """`each`: how many lines "equal" are waited for before the first and after every hop."""
        super().__init__(folder, events, Report(), "vmm")
        self._setting = setting
        self._hops = hops
        self._each = each
        self._way = way
        self._targets: list[Terminal] = []  # that wait for their turn

    def play(self) -> None:
        guest = self._boot()
        self.which_boot(guest, ANSWER)
        if self._hops > 1:  # before the guest's load makes every start slow where the CPU is emulated
            self.step("all destinations start")
            self._targets = [self._destination(number + 1) for number in range(1, self._hops + 1)]
        self._start_load(guest)
        self._fleet(1)
        self.took("until_load", self.began)
        for number in range(1, self._hops + 1):
            guest = self._hop(number, guest)
        self._check_load(guest)
        self._power_off(guest)

    def _boot(self) -> Terminal:
        if self._setting.disks > 2:
            os.truncate(os.open(Path.home() / "workloads/written.img", os.O_CREAT | os.O_WRONLY, 0o644), WRITTEN_BYTES)
        self.step("the source VMM boots Debian")
        guest = self._vmm(1, self._setting.source())
        guest.await_match(r"root@focal:", BOOT, "shell prompt of the guest")
        return guest

    def _start_load(self, guest: Terminal) -> None:
        self.step("the guest checksums its second disk in a loop")
        if self._setting.disks > 2:
            guest.type("verify /dev/vdc &\n")
            guest.await_match(r"verify: ok \d", ANSWER, "verified block of the third disk")
        guest.type("./equal.sh /dev/vdb\n" if self._setting.disks > 1 else f"./equal.sh {READ_ONLY_FILE}\n")
        guest.await_lines("equal", self._each, ANSWER)

    def _fleet(self, number: int) -> None:
        rows = vmm.ch_remote(example.api(number), "fleet")
        self.report.processes = rows
        self.events.emit("fleet", name=f"vmm{number}", rows=rows)

    def _hop(self, number: int, source: Terminal) -> Terminal:
        """Migration `number`: from the VMM of the same number to the next."""
        before, after = example.api(number), example.api(number + 1)
        hop = Hop(number)
        self.report.hops.append(hop)
        self.step(f"hop {number}: {before} to {after}")
        target = self._targets.pop(0) if self._targets else self._destination(number + 1)
        receive = self.type(f"receive{number}", example.receive(number + 1, self._way))
        if self._way is Way.TCP:
            vmm.await_true(f"listener on port {example.PORT}", ANSWER, lambda: vmm.listens(example.PORT))
        else:
            self.await_socket(example.SOCKET, receive, ANSWER)
        ram = vmm.ram_identity(source.pid)
        send = self.type(f"send{number}", example.send(number, self._way))
        self._follow(hop, after, send)
        hop.send, hop.receive = send.expect_end(MIGRATION), receive.expect_end(MIGRATION)
        hop.source_exit = source.expect_end(MIGRATION)
        target.await_lines("equal", self._each, ANSWER)
        self._check_hop(hop, source, target, ram)
        self.events.emit("hop", **asdict(hop))
        if number == self._hops:
            self._fleet(number + 1)
        return target

    def _vmm(self, number: int, command: str) -> Terminal:
        """Start a VMM; a subclass says where."""
        return self.type(f"vmm{number}", command)

    def _destination(self, number: int) -> Terminal:
        target = self._vmm(number, example.destination(number))
        self.await_socket(example.api(number), target, ANSWER)
        return target

    def _follow(self, hop: Hop, api: str, send: Terminal) -> None:
        """Phases of the receiving side, until the sender's command is done."""
        phase = ""
        while send.process.poll() is None:
            report = vmm.ask(api, "vm.migration-progress")
            if report.get("phase", phase) != phase:
                phase = str(report["phase"])
                self.events.emit("migration", hop=hop.hop, phase=phase, total_ms=report.get("total_ms"))
            with contextlib.suppress(Exception):
                send.process.wait(0.2)

    def _check_hop(self, hop: Hop, source: Terminal, target: Terminal, ram: set[str]) -> None:
        """Everything that the document and we promise of one migration."""
        before, after = example.api(hop.hop), example.api(hop.hop + 1)
        progress = vmm.ask(after, "vm.migration-progress")
        hop.downtime_ms, hop.total_ms = progress.get("downtime_ms"), progress.get("total_ms")
        hop.bytes_transferred = progress.get("bytes_transferred")
        hop.breakdown = progress.get("breakdown") or {}
        hop.ram_stayed = bool(ram) and ram == vmm.ram_identity(target.pid)
        hop.gap_ms = _gap(source, target)
        copied = self._way is not Way.LOCAL
        info = vmm.ch_remote(after, "info") if hop.hop == self._hops else vmm.ask(after, "vm.info")
        problems = {
            f"the state of the destination's VM is {info.get('state')}, not Running": info.get("state") != "Running",
            f"{before} of the source is still there": os.path.exists(before),
            f"{example.SOCKET} is still there": os.path.exists(example.SOCKET),
            f"guest RAM {'stayed in its file' if hop.ram_stayed else 'is another file'}": hop.ram_stayed is copied,
            f"{hop.bytes_transferred} bytes were sent": _state_alone(hop) is copied,
            "the progress has no downtime": hop.downtime_ms is None,
        }
        if found := [text for text, is_so in problems.items() if is_so]:
            raise DemoError(f"hop {hop.hop}: {'; '.join(found)}\n{source.tail()}\n{target.tail()}")

    def _check_load(self, guest: Terminal) -> None:
        """End the loop with Ctrl-C and ask which boot this is."""
        self.step("Ctrl-C into the console; is it the same boot?")
        if self._setting.disks > 2:
            guest.await_match(r"verify: ok \d", ANSWER, "verified block at the destination")
        self.interrupt(partial(guest.type, "\x03"), partial(self.which_boot, guest), ANSWER)
        self.count()
        if self.report.not_equal:
            raise DemoError(f"a disk says something else than before:\n{guest.tail()}")

    def _power_off(self, guest: Terminal) -> None:
        self.step("poweroff in the guest ends its VMM")
        guest.type("poweroff\n")
        self.report.destination_exit = guest.expect_end(ANSWER)


def _state_alone(hop: Hop) -> bool:
    return hop.bytes_transferred is not None and hop.bytes_transferred < MOST_STATE


def _gap(source: Terminal, target: Terminal) -> float | None:
    """Milliseconds from the last line at the source to the first at the destination."""
    if not source.lines or not target.lines:
        return None
    return round((target.lines[0][0] - source.lines[-1][0]) * 1000, 1)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("inside", description="The document's local migration, step by step.")
    parser.add_argument("--hops", type=int, default=1, metavar="N", help="migrations in a row (default 1)")
    parser.add_argument("--equal", type=int, default=5, metavar="N", help='lines "equal" before and after each (5)')
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", default=DOCUMENT.memory, help=f"--memory size= (default {DOCUMENT.memory})")
    parser.add_argument("--disks", type=int, choices=(1, 2, 3), default=DOCUMENT.disks, help="3: one is written, too")
    parser.add_argument("--cmdline", default=DOCUMENT.cmdline)
    parser.add_argument("--way", type=Way, choices=list(Way), default=Way.LOCAL, help="unix, tcp: RAM is copied, too")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    setting = Example(options.cpus, options.memory, options.disks, options.cmdline)
    return perform(lambda folder, events: Local(setting, options.hops, options.equal, options.way, folder, events))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
